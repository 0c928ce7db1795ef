"""The paper's detectors on our ResNets, out of torchvision's parts (MoCo, section 4.2 and its appendix).

| name | backbone | heads |
| --- | --- | --- |
| c4 | up to conv4, stride 16 | box head: conv5 and its pooling, then the reference's extra batch norm |
| dilated_c5 | up to conv5 (dilation 2, stride 16), a 3x3 convolution to 512 | two linear layers of 1,024 |
| fpn | conv2 to conv5 and a pyramid of 256 | two linear layers of 1,024; convolutions for masks or keypoints |

Every layer is trained, every batch norm too; the new convolutions of pyramid, mask head and keypoint head have batch
norm of their own, as the features of an unsupervised encoder are of another scale than those of a supervised one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import Conv2dNormActivation
from torchvision.transforms.v2 import functional as tv

from model.encoders import Encoder
from model.sync_batchnorm import synchronise
from pipeline.pixels.views import MeanStd

Body = Literal["c4", "dilated_c5", "fpn"]
Task = Literal["boxes", "masks", "keypoints"]
LONGEST = 1333 / 800  # the long side at most, in short sides: Detectron2's


def build_detector(
    encoder: Encoder,
    body: Body,
    task: Task,
    classes: int,
    *,
    mean_std: MeanStd,
    short_side: Sequence[int] = (800,),
    long_side: int | None = None,
    keypoints: int = 17,
    detections: int = 100,
    least_score: float = 0.05,
    rois: int = 512,
    proposals: int = 1000,
) -> FasterRCNN:
    """A detector around the encoder's backbone, which it changes; in training mode, its batch norms synchronised.

    Takes a list of images fp32 [3, H, W] from 0 to 1 and, in training, of targets as torchvision's detectors do.
    classes: without the background, whose label is 0. short_side: sizes in pixels that training draws from; the largest
    judges. detections: at most so many an image, of at least that score. rois: boxes of an image that a step trains the
    heads on, and half as many anchors; proposals: boxes that the heads look at when judged.
    Raises ValueError for an encoder that is no ResNet, and for a task that the body has no heads for.
    """
    net = resnet_of(encoder)
    if (task, body) in (("keypoints", "c4"), ("keypoints", "dilated_c5"), ("masks", "dilated_c5")):
        raise ValueError(f"there is no {body} for {task} in the paper: take --body fpn")
    mean, std = mean_std
    common: dict[str, Any] = {
        "min_size": tuple(short_side), "max_size": long_side or round(max(short_side) * LONGEST), "image_mean": mean,
        "image_std": std, "box_detections_per_img": detections, "box_score_thresh": least_score,
        "box_batch_size_per_image": rois, "rpn_batch_size_per_image": max(2, rois // 2),
        "rpn_post_nms_top_n_test": proposals,
    }  # fmt: skip
    build = {"c4": _c4, "dilated_c5": _dilated_c5, "fpn": _fpn}[body]
    detector = build(net, task, classes + 1, keypoints, common)
    transform = detector.transform
    detector.transform = AntialiasedTransform(transform.min_size, transform.max_size, list(mean), list(std))
    return cast(FasterRCNN, synchronise(detector).train())


def resnet_of(encoder: Encoder) -> ResNet:
    """ValueError for an encoder whose stages are not those of a ResNet."""
    net = encoder.backbone
    if not isinstance(net, ResNet):
        raise ValueError(
            f"detection and segmentation take the stages of a ResNet, and this encoder is a {type(net).__name__}: "
            "take a run or file of a ResNet"
        )
    return net.requires_grad_(True)


def width_of(stage: nn.Module) -> int:
    """Channels that leave a stage of a ResNet."""
    block: Any = cast(nn.Sequential, stage)[-1]
    return int((block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels)


def dilate(stage: nn.Module) -> None:
    """Stride 1 instead of 2, and dilation 2 in every 3x3 convolution: the resolution of the stage before."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)


class AntialiasedTransform(GeneralizedRCNNTransform):
    """torchvision's, but for how it resizes: antialiased, as PIL and with it Detectron2 do."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        before = (image.shape[-2], image.shape[-1])
        short = self.torch_choice(self.min_size) if self.training else max(self.min_size)
        scale = min(short / min(before), self.max_size / max(before))
        size = [max(1, round(side * scale)) for side in before]
        image = tv.resize_image(image, size, antialias=True)
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], list(before), size)
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), size=size)[:, 0].byte()
            if "keypoints" in target:
                target["keypoints"] = resize_keypoints(target["keypoints"], list(before), size)
        return image, target


# --- corners in fp32 --------------------------------------------------------------------------------------------------
# torchvision decodes boxes in the dtype of what predicts them. In bf16 the corners of a box would lie on multiples of 2
# to 4 pixels.


class ExactRPNHead(RPNHead):
    """Its output in fp32, whatever the precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in deltas]


class ExactPredictor(FastRCNNPredictor):
    """Computed in fp32, whatever the precision: classes and corners of boxes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return cast(tuple[Tensor, Tensor], super().forward(x.float()))


# --- conv5 as the head of the boxes -----------------------------------------------------------------------------------


class RememberingPool(MultiScaleRoIAlign):
    """Pools boxes, and keeps which: the mask head of C4 needs to know where it finds them among the pooled."""

    boxes: list[Tensor]

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        self.boxes = boxes
        return super().forward(x, boxes, image_shapes)


class Res5Head(nn.Module):
    """conv5 and the extra batch norm, then the mean over the box (the reference's Res5ROIHeadsExtraNorm)."""

    maps: Tensor

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = nn.BatchNorm2d(width_of(layer4))

    def forward(self, pooled: Tensor) -> Tensor:
        self.maps = self.norm(self.layer4(pooled))  # [R, D, 7, 7] from [R, C, 14, 14]
        return self.maps.mean(dim=(2, 3))


class Res5Maps(nn.Module):
    """conv5's maps of the boxes that have masks. In training they are some of those that the box head has computed; in
    evaluation the detected boxes are others than the proposals, and go through conv5 themselves.
    """

    def __init__(self, pool: RememberingPool, head: Res5Head) -> None:
        super().__init__()
        self._box_head = (pool, head)  # a tuple, as their parameters are counted where they are

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        pool, head = self._box_head
        if not self.training:
            head(pool(x, boxes, image_shapes))
            return head.maps
        rows, first = [], 0
        for own, all_boxes in zip(boxes, pool.boxes):
            same = (own[:, None] == all_boxes[None]).all(dim=2)  # [own, all]; equal boxes have equal maps
            rows.append(first + same.int().argmax(dim=1))
            first += len(all_boxes)
        return head.maps[torch.cat(rows)]


def _anchors() -> AnchorGenerator:
    """Those of the bodies with one map: 15 at each place."""
    return AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))


def _c4(net: ResNet, task: Task, labels: int, keypoints: int, common: dict[str, Any]) -> FasterRCNN:
    head = Res5Head(net.layer4)
    backbone = IntermediateLayerGetter(net, {"layer3": "0"})
    backbone.out_channels = width_of(net.layer3)
    pool = RememberingPool(["0"], output_size=14, sampling_ratio=0)
    common |= {
        "rpn_anchor_generator": _anchors(), "rpn_head": ExactRPNHead(backbone.out_channels, 15),
        "rpn_pre_nms_top_n_train": 12000, "rpn_pre_nms_top_n_test": 6000,
        "box_roi_pool": pool, "box_head": head, "box_predictor": ExactPredictor(width_of(net.layer4), labels),
    }  # fmt: skip
    if task == "boxes":
        return FasterRCNN(backbone, **common)
    mask = {"mask_head": nn.Identity(), "mask_predictor": MaskRCNNPredictor(width_of(net.layer4), 256, labels)}
    detector = MaskRCNN(backbone, **common | mask)
    detector.roi_heads.mask_roi_pool = Res5Maps(pool, head)
    return detector


# --- the other two ----------------------------------------------------------------------------------------------------


class DilatedC5(nn.Module):
    """[N, 3, H, W] -> {"0": [N, 512, H/16, W/16]}."""

    out_channels = 512

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        dilate(net.layer4)
        self.body = IntermediateLayerGetter(net, {"layer4": "0"})
        self.reduce = Conv2dNormActivation(width_of(net.layer4), self.out_channels, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict([("0", self.reduce(self.body(images)["0"]))])


def _dilated_c5(net: ResNet, task: Task, labels: int, keypoints: int, common: dict[str, Any]) -> FasterRCNN:
    backbone = DilatedC5(net)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=_anchors(),
        rpn_head=ExactRPNHead(backbone.out_channels, 15),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=0),
        box_head=TwoMLPHead(backbone.out_channels * 49, 1024),
        box_predictor=ExactPredictor(1024, labels),
        **common,
    )


def _fpn(net: ResNet, task: Task, labels: int, keypoints: int, common: dict[str, Any]) -> FasterRCNN:
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(net, layers, [width_of(s) for s in stages], 256, norm_layer=nn.BatchNorm2d)
    about = common | {
        "rpn_head": ExactRPNHead(256, 3), "box_predictor": ExactPredictor(1024, labels),
        "rpn_post_nms_top_n_train": 1000,
    }  # fmt: skip
    if task == "masks":
        head = MaskRCNNHeads(256, (256,) * 4, 1, norm_layer=nn.BatchNorm2d)
        return MaskRCNN(backbone, mask_head=head, mask_predictor=MaskRCNNPredictor(256, 256, labels), **about)
    if task == "keypoints":
        head = MaskRCNNHeads(256, (512,) * 8, 1, norm_layer=nn.BatchNorm2d)  # the keypoint head, with batch norm
        return KeypointRCNN(backbone, keypoint_head=head, num_keypoints=keypoints, **about)
    return FasterRCNN(backbone, **about)
