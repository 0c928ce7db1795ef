"""The detectors: which parts they have, that all of it learns, and C4's shared conv5."""

from typing import Any

import numpy as np
import pytest
import torch
from annotated_folders import narrow_encoder
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.encoders import Encoder, build_encoder
from model.sync_batchnorm import SyncedBatchNorm
from pipeline.pixels.views import mean_std
from transfer.detectors import AntialiasedTransform, ExactPredictor, Res5Maps, build_detector, dilate, width_of

CASES = [("c4", "boxes"), ("c4", "masks"), ("dilated_c5", "boxes"), ("fpn", "masks"), ("fpn", "keypoints")]


def detector(body: Any, task: Any, encoder: Encoder | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"short_side": (48, 64), "keypoints": 3, "rois": 8, "proposals": 6, "detections": 4} | options
    net = encoder or narrow_encoder().encoder
    return build_detector(net, body, task, 3, mean_std=mean_std("v1"), least_score=0.0, **options)


def example() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    torch.manual_seed(1)
    images = [torch.rand(3, 50, 70), torch.rand(3, 60, 40)]
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[:, 10:40, 8:38] = 1
        boxes = torch.tensor([[5.0, 5, 38, 45], [20, 10, 39, 30]])
        points = torch.tensor([[[10.0, 10, 2], [20, 20, 2], [30, 12, 0]]] * 2)
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, "keypoints": points})
    return images, targets


@pytest.mark.slow
@pytest.mark.parametrize(("body", "task"), CASES)
def test_every_layer_learns_and_every_batch_norm_is_synchronised(body: str, task: str) -> None:
    net = detector(body, task)
    losses = net(*example())
    extra = {"boxes": set(), "masks": {"loss_mask"}, "keypoints": {"loss_keypoint"}}[task]
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} | extra
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.requires_grad] == []
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(module, SyncedBatchNorm) and module.training for module in norms)
    new = {"c4": "roi_heads.box_head.norm", "dilated_c5": "backbone.reduce.1", "fpn": "backbone.fpn.inner_blocks.0.1"}
    assert isinstance(net.get_submodule(new[body]), SyncedBatchNorm)
    with torch.no_grad():
        found = net.eval()(example()[0])[0]
    shape = {"masks": (4, 1, 50, 70), "keypoints": (4, 3, 3)}
    assert found["boxes"].shape == (4, 4) and (task == "boxes" or found[task].shape == shape[task])


def test_boxes_are_exact_in_bf16() -> None:
    """In bf16 itself a corner at 300 could only be at 300 or 302."""
    net = detector("c4", "masks")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = net.eval()(example()[0])[0]
        features = net.backbone(torch.rand(1, 3, 64, 64))["0"]
        assert features.dtype == torch.bfloat16
        logits, deltas = net.rpn.head([features])
    assert found["boxes"].dtype == found["scores"].dtype == logits[0].dtype == deltas[0].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())
    assert isinstance(detector("fpn", "boxes").roi_heads.box_predictor, ExactPredictor)


def test_the_parts_of_resnet_50() -> None:
    """Widths and strides of the paper's bodies."""
    c4 = detector("c4", "masks", build_encoder("resnet50"))
    assert c4.backbone.out_channels == 1024 and c4.roi_heads.box_head.norm.num_features == 2048
    assert c4.roi_heads.mask_predictor[0].in_channels == 2048 and c4.roi_heads.box_roi_pool.output_size == (14, 14)
    assert c4.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),) and c4.rpn.head.cls_logits.out_channels == 15
    encoder = build_encoder("resnet50")
    c5 = detector("dilated_c5", "boxes", encoder)
    assert c5.backbone.out_channels == 512 and c5.roi_heads.box_head.fc6.out_features == 1024
    convs = [m for m in encoder.backbone.layer4.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.stride == (1, 1) for conv in convs)
    assert [conv.dilation for conv in convs if conv.kernel_size == (3, 3)] == [(2, 2)] * 3
    assert width_of(encoder.backbone.layer3) == 1024


def test_dilation_keeps_the_size() -> None:
    net: Any = narrow_encoder().encoder.backbone
    x = torch.rand(1, 32, 9, 11)
    dilate(net.layer4)
    assert net.layer4(x).shape == (1, 64, 9, 11)


def test_masks_of_c4_are_on_conv5_of_their_own_boxes() -> None:
    """Rows of the box head's maps, found by the boxes; in evaluation conv5 looks at the detected boxes themselves."""
    net = detector("c4", "masks")
    maps, head, pool = net.roi_heads.mask_roi_pool, net.roi_heads.box_head, net.roi_heads.box_roi_pool
    assert isinstance(maps, Res5Maps) and not list(maps.parameters())
    features, shapes = {"0": torch.rand(2, 32, 4, 4)}, [(64, 64), (64, 64)]
    boxes = [torch.tensor([[0.0, 0, 30, 30], [5, 5, 60, 60], [8, 0, 20, 40]]), torch.tensor([[1.0, 1, 50, 50]])]
    head(pool(features, boxes, shapes))
    some = maps(features, [boxes[0][[2, 1]], boxes[1]], shapes)
    assert torch.equal(some, head.maps[[2, 1, 3]]) and some.shape == (3, 64, 7, 7)
    net.eval()
    all_of_it = maps(features, boxes, shapes)
    torch.testing.assert_close(maps(features, [boxes[0][1:2], boxes[1]], shapes), all_of_it[[1, 3]])


def test_images_are_resized_as_pil_does() -> None:
    """Antialiased, and boxes, masks and joints along; the long side at most so long."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    transform = AntialiasedTransform((60, 48), 90, [0.0] * 3, [1.0] * 3).eval()
    target = {"boxes": torch.tensor([[20.0, 12, 100, 120]]), "masks": torch.ones(1, 120, 200, dtype=torch.uint8)}
    image, small = transform.resize(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, target)
    assert small is not None and image.shape == (3, 54, 90)  # 60 would be 100 wide
    expected = np.asarray(Image.fromarray(pixels).resize((90, 54), Image.Resampling.BILINEAR))
    assert np.abs(image.permute(1, 2, 0).numpy() * 255 - expected).max() < 1.5
    torch.testing.assert_close(small["boxes"], torch.tensor([[9.0, 5.4, 45, 54]]))
    assert small["masks"].shape == (1, 54, 90) and small["masks"].all()
    sizes = {transform.train().resize(torch.rand(3, 100, 100))[0].shape[1] for _ in range(20)}
    assert sizes == {48, 60}


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="there is no c4 for keypoints in the paper: take --body fpn"):
        detector("c4", "keypoints")
    with pytest.raises(ValueError, match="stages of a ResNet, and this encoder is a Sequential"):
        detector("c4", "boxes", Encoder(nn.Sequential(nn.Conv2d(3, 4, 3)), 4, dim=2))
