"""Encoders: parameter counts of the paper's Table 1, names that transfer, stems, timm models."""

import pytest
import torch
import torchvision

from model.encoders import RESNETS, build_encoder


def backbone_parameters(arch: str, width: int = 1) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in build_encoder(arch, width=width).backbone.parameters()) / 1e6


def test_table_1_parameter_counts() -> None:
    counts = {
        "R50": round(backbone_parameters("resnet50")),
        "RX50": round(backbone_parameters("resnext50_32x8d")),
        "R50w2x": round(backbone_parameters("resnet50", width=2)),
        "R50w4x": round(backbone_parameters("resnet50", width=4)),
    }
    assert counts == {"R50": 24, "RX50": 46, "R50w2x": 94, "R50w4x": 375}


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d"])
def test_backbone_is_torchvisions(arch: str) -> None:
    """The same names and shapes as torchvision's model of that name, but for its classifier."""
    with torch.device("meta"):
        ours = build_encoder(arch).backbone.state_dict()
        theirs = getattr(torchvision.models, arch)().state_dict()
    expected = {name: t.shape for name, t in theirs.items() if not name.startswith("fc.")}
    assert {name: t.shape for name, t in ours.items()} == expected


@pytest.mark.slow
def test_same_numbers_as_torchvision() -> None:
    ours = build_encoder("resnet50", dim=10)
    theirs = torchvision.models.resnet50(num_classes=10)
    theirs.load_state_dict(
        {name.removeprefix("backbone.").replace("head.", "fc."): t for name, t in ours.state_dict().items()}
    )
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.initial
def test_initialisation_is_torchvisions_rule_for_replaced_layers_too() -> None:
    encoder = build_encoder("resnet18", width=2)
    for name, p in encoder.backbone.named_parameters():
        if p.dim() == 4:
            fan_out = p.shape[0] * p.shape[2] * p.shape[3]
            assert p.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06), name
        else:
            assert torch.all(p == (0 if name.endswith("bias") else 1)), name


@pytest.mark.slow
def test_widths_multiply_everywhere() -> None:
    encoder = build_encoder("resnet50", width=2, small_stem=True, dim=16)
    assert encoder.features == 4096
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    assert encoder.backbone.conv1.weight.shape == (128, 3, 3, 3)  # type: ignore[union-attr]


def test_small_stem_keeps_the_resolution() -> None:
    backbone = build_encoder("resnet18", small_stem=True).backbone
    assert torch.nn.Sequential(*list(backbone.children())[:4])(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_small_stem_begins_as_the_demos() -> None:
    """It replaces conv1 after torchvision has initialised the others, so PyTorch's own rule stays: std 0.111."""
    torch.manual_seed(0)
    net = build_encoder("resnet18", small_stem=True).backbone
    demo = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    weight = net.get_parameter("conv1.weight").detach()
    assert weight.std().item() == pytest.approx(1 / 27**0.5 / 3**0.5, rel=0.04) and weight.abs().max() <= 1 / 27**0.5
    assert weight.std().item() == pytest.approx(demo.weight.detach().std().item(), rel=0.06)
    other = net.get_parameter("layer1.0.conv1.weight").detach()
    assert other.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.06)


@pytest.mark.parametrize(
    ("mlp", "names"), [(False, ["weight", "bias"]), (True, ["0.weight", "0.bias", "2.weight", "2.bias"])]
)
def test_heads(mlp: bool, names: list[str]) -> None:
    encoder = build_encoder("resnet18", dim=32, mlp=mlp)
    assert list(encoder.head.state_dict()) == names
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 32)


@pytest.mark.slow
def test_every_known_arch_builds() -> None:
    for arch in RESNETS:
        with torch.device("meta"):
            encoder = build_encoder(arch)
        assert encoder.has_batchnorm and encoder.features == encoder.head.in_features


@pytest.mark.parametrize(
    ("name", "batchnorm"), [("convnext_atto", False), ("resnet10t", True), ("mobilenetv3_small_050", True)]
)
def test_timm_models(name: str, batchnorm: bool) -> None:
    pytest.importorskip("timm")
    encoder = build_encoder(f"timm:{name}", dim=8, mlp=True)
    assert encoder.has_batchnorm is batchnorm
    assert encoder.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 8)


def test_the_image_size_goes_into_a_vit() -> None:
    pytest.importorskip("timm")
    encoder = build_encoder("timm:test_vit", dim=8, image_size=32)
    assert encoder.training and encoder(torch.randn(2, 3, 32, 32)).shape == (2, 8)
    torch.manual_seed(0)
    usual = build_encoder("timm:test_vit", dim=8).state_dict()
    torch.manual_seed(0)
    same = build_encoder("timm:test_vit", dim=8, image_size=160).state_dict()  # its own: the same weights from a seed
    assert all(torch.equal(usual[name], same[name]) for name in usual)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 9), ("inception_v4", 32)])
def test_a_size_that_a_timm_model_does_not_take_is_one_clear_error(name: str, size: int) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=f"^timm:{name} does not take images of {size} pixels: .*--image_size or --arch$"
    ):
        build_encoder(f"timm:{name}", image_size=size)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet51", {}, "known are resnet18"),
        ("timm:resnet_of_dreams", {}, "no model 'resnet_of_dreams'"),
        ("timm:convnext_atto", {"small_stem": True}, "for ResNets"),
        ("timm:convnext_atto", {"width": 2}, "for ResNets"),
        ("resnet18", {"width": 0}, "1 or more"),
    ],
)
def test_errors(arch: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(arch, **options)  # type: ignore[arg-type]
