"""Encoders: images [N, 3, H, W] -> vectors [N, dim], not normalised. A pooled backbone, then a projection head.

torchvision's ResNets and the paper's variants (Table 1: ResNeXt 32x8d, widths times 2 and 4), or any timm model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

# arch -> block, blocks per stage, convolution groups, width of one group
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int], int, int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 1, 64),
    "resnext50_32x8d": (Bottleneck, [3, 4, 6, 3], 32, 8),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], 32, 8),
}


class Encoder(nn.Module):
    """`head(backbone(images))`: [N, 3, H, W] -> [N, dim].

    `features` is the width of the backbone's output, which is what transfers. The state dict's keys are `backbone.*`
    (torchvision's or timm's own names, without their classifier) and `head.*` (`head.0`, `head.2` for the MLP).
    """

    def __init__(self, backbone: nn.Module, features: int, *, dim: int = 128, mlp: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = features
        self.head: nn.Module
        if mlp:  # MoCo v2: two layers, no batch norm in between
            self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))
        else:
            self.head = nn.Linear(features, dim)

    @property
    def has_batchnorm(self) -> bool:
        """Whether any layer takes statistics over the batch: without one there is nothing for shuffle BN to do."""
        return any(isinstance(module, _BatchNorm) for module in self.modules())

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.backbone(images)))


def build_encoder(
    arch: str,
    *,
    width: int = 1,
    small_stem: bool = False,
    dim: int = 128,
    mlp: bool = False,
    image_size: int | None = None,
) -> Encoder:
    """A freshly initialised encoder.

    arch: a name of `RESNETS`, or `timm:NAME` for any timm classification model. width: all widths of a ResNet times
    this (Table 1: R50-w2x, R50-w4x). small_stem: a 3x3 stride-1 first convolution and no max-pooling, for images of
    32 pixels or so. image_size: side of the images, which a timm model whose weights depend on it (a ViT) is built
    for; None: its usual one. ValueError for an unknown name, or an option or size that the model does not take.
    """
    if arch.startswith("timm:"):
        if width != 1 or small_stem:
            raise ValueError(f"width {width} and small_stem {small_stem} are for ResNets; {arch} has neither")
        backbone, features = _timm_backbone(arch.removeprefix("timm:"), image_size)
    elif arch in RESNETS:
        if width < 1:
            raise ValueError(f"width is {width}; it multiplies the channels, so it must be 1 or more")
        backbone, features = _resnet_backbone(arch, width, small_stem)
    else:
        raise ValueError(f"unknown arch {arch!r}; known are {', '.join(RESNETS)} and timm:NAME")
    return Encoder(backbone, features, dim=dim, mlp=mlp)


def _resnet_backbone(arch: str, width: int, small_stem: bool) -> tuple[nn.Module, int]:
    block, layers, groups, width_per_group = RESNETS[arch]
    net = ResNet(block, layers, groups=groups, width_per_group=width_per_group, num_classes=1)
    features = 512 * block.expansion * width
    net.fc = nn.Identity()
    if small_stem:
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    if width > 1:
        _widen(net, width)
    for module in net.modules():  # torchvision's own rule, again for the layers replaced here
        # The CIFAR-10 demo leaves its 3x3 first convolution as PyTorch initialises it: std 0.111, not 0.059.
        if isinstance(module, nn.Conv2d) and not (small_stem and module is net.conv1):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net, features


def _widen(module: nn.Module, width: int) -> None:
    """Replaces every convolution and batch norm by one with `width` times the channels (the image keeps its three)."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            wide = nn.Conv2d(
                child.in_channels if child.in_channels == 3 else child.in_channels * width,
                child.out_channels * width,
                kernel_size=cast(tuple[int, int], child.kernel_size),
                stride=cast(tuple[int, int], child.stride),
                padding=cast(tuple[int, int], child.padding),
                groups=child.groups,
                bias=False,
            )
            setattr(module, name, wide)
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.num_features * width))
        else:
            _widen(child, width)


def timm_options(name: str, image_size: int | None) -> dict[str, int]:
    """Arguments of timm.create_model: `img_size` for a model that is made for one size of images, else nothing."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if image_size and getattr(config, "fixed_input_size", False) else {}


def _timm_backbone(name: str, image_size: int | None) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"arch timm:{name} needs timm: pip install -e '.[timm]'") from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "see timm.list_models()"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; near it: {near}")
    with _refusing(f"timm:{name}", image_size):
        net = timm.create_model(name, pretrained=False, num_classes=0, **timm_options(name, image_size))
    if image_size is not None:
        check_image_size(net, f"timm:{name}", image_size)
    # head_hidden_size is what leaves the pooling when a model has layers between it and the classifier
    return net, int(getattr(net, "head_hidden_size", None) or net.num_features)


def check_image_size(net: nn.Module, arch: str, image_size: int) -> None:
    """One image through `net`, whose state and the random generators stay as they are. ValueError when it does not take
    images of that size."""
    training = net.training
    with _refusing(arch, image_size), torch.no_grad(), torch.random.fork_rng(devices=[]):
        net.eval()(torch.zeros(1, 3, image_size, image_size))
    net.train(training)


@contextmanager
def _refusing(arch: str, image_size: int | None) -> Iterator[None]:
    """Whatever a model raises at a size that it was not made for becomes one ValueError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{arch} does not take images of {image_size} pixels: {reason[:160]}; give another --image_size or --arch"
        ) from error
