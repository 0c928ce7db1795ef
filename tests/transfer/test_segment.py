"""The FCN: its parts, class maps of VOC and Cityscapes, mean IoU by hand, and a training that goes on."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from annotated_folders import drawing, narrow_encoder, voc_folder
from conftest import REPOSITORY
from PIL import Image
from test_detect import StopAfter, rows_of
from torch import nn

from model.encoders import build_encoder
from transfer import dense_arguments
from transfer.class_maps import IGNORED, ClassMaps, Labelled, augmented, load_labelled, open_class_maps, shrunk
from transfer.dense_training import Schedule, schedule_of
from transfer.segment import PICTURE, Protocol, build_fcn, count_pairs, mean_iou, segment
from transfer.training import Session

SMALL = Protocol(Schedule(4, 2, 0.02, (0.7, 0.9), warmup=0), crop=33)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ClassMaps:
    return open_class_maps(voc_folder(tmp_path_factory.mktemp("maps") / "kit"), ["2007_train"])


def run(data: ClassMaps, out: Path, protocol: Protocol, stop: int = 1000) -> tuple[int, dict[str, float]]:
    out.mkdir(exist_ok=True)
    session = Session(out, stop=StopAfter(stop))  # type: ignore[arg-type]
    return segment(narrow_encoder(), data, data, session, protocol, num_threads=1, log_every=1)


def test_the_fcn_of_the_appendix() -> None:
    """Stride 16 by dilation in conv5, two 3x3 convolutions of 256 with batch norm and dilation 6, a 1x1."""
    net = build_fcn(build_encoder("resnet50"), 21)
    convs = [m for m in net.classifier.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.dilation) for c in convs] == [
        (2048, 256, (3, 3), (6, 6)), (256, 256, (3, 3), (6, 6)), (256, 21, (1, 1), (1, 1)),
    ]  # fmt: skip
    assert sum(isinstance(m, nn.ReLU) for m in net.classifier.modules()) == 2
    small = build_fcn(narrow_encoder().encoder, 5).eval()
    assert small.backbone(torch.rand(1, 3, 64, 96))["out"].shape == (1, 64, 4, 6)
    assert small(torch.rand(1, 3, 65, 90))["out"].shape == (1, 5, 65, 90)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.slow
def test_a_training_learns_and_goes_on_where_it_stopped(drawn: ClassMaps, tmp_path: Path) -> None:
    step, figures = run(drawn, tmp_path / "whole", SMALL)
    assert step == 4 and run(drawn, tmp_path / "cut", SMALL, stop=2) == (2, {})
    assert run(drawn, tmp_path / "cut", SMALL) == (4, figures)
    whole, cut = ([(row["step"], row.get("loss")) for row in rows_of(tmp_path / n)] for n in ("whole", "cut"))
    assert whole == cut
    with Image.open(tmp_path / "cut" / PICTURE) as picture:
        assert picture.width > 960
    with pytest.raises(ValueError, match="another experiment: crop was 33 and is 49"):
        run(drawn, tmp_path / "cut", replace(SMALL, crop=49))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / PICTURE).write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"segmentation\.png is of no training that was here"):
        run(drawn, tmp_path / "theirs", SMALL)
    longer = replace(SMALL, schedule=replace(SMALL.schedule, iterations=60))
    _, learned = run(drawn, tmp_path / "long", longer)
    assert learned["mIoU"] > 30  # background alone: 18


def test_class_maps_of_voc(drawn: ClassMaps, tmp_path: Path) -> None:
    one = load_labelled(drawn, 4)
    _, (x0, y0, x1, y1), _ = drawing(4)
    assert len(drawn.classes) == 21 and drawn.classes[12] == "dog" and one.image.shape == (3, 48, 64)
    assert (one.classes[y0 + 1 : y1, x0:x1] == 12).all() and (one.classes[y0, x0:x1] == IGNORED).all()
    assert (one.classes == 0).sum() == 48 * 64 - (y1 - y0) * (x1 - x0)
    kit = voc_folder(tmp_path / "kit", images=2)
    path = kit / "VOC2007" / "SegmentationClass" / "000001.png"
    data = open_class_maps(kit, ["2007_train"])
    for picture, said in [
        (Image.new("RGB", (64, 48)), "no class map: its pixels are RGB"),
        (Image.new("L", (64, 48), 77), "holds 77, which is none of the 21 classes"),
        (Image.new("L", (64, 50)), r"is 64x48 pixels and its annotation says 64x50"),
    ]:
        picture.save(path)
        with pytest.raises(ValueError, match=said):
            load_labelled(data, 1)
    path.unlink()
    with pytest.raises(ValueError, match=r"1 of 2 class maps are missing, the first .*000001"):
        open_class_maps(kit, ["2007_train"])
    with pytest.raises(ValueError, match=r"neither a VOCdevkit .* nor Cityscapes .*: give"):
        open_class_maps(kit.parent, ["train"])
    with pytest.raises(ValueError, match=r"neither a VOCdevkit .* nor Cityscapes .*: give"):
        open_class_maps(kit / "VOC2007", ["train"])


def test_class_maps_of_cityscapes(tmp_path: Path) -> None:
    """labelIds become the 19 classes that are judged; the others, like "ego vehicle", count for nothing."""
    for kind, name in [("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")]:
        folder = tmp_path / kind / "val" / "ulm"
        folder.mkdir(parents=True)
        pixels = (
            np.tile(np.array([7, 1, 26, 33, 9], np.uint8), (4, 1)) if kind == "gtFine" else np.zeros((4, 5, 3), "u1")
        )
        Image.fromarray(pixels).save(folder / f"ulm_000001_000019_{name}.png")
    data = open_class_maps(tmp_path, ["val"])
    assert len(data.classes) == 19 and data.classes[0] == "road" and data.classes[18] == "bicycle"
    assert load_labelled(data, 0).classes[0].tolist() == [0, IGNORED, 13, 18, IGNORED]
    with pytest.raises(ValueError, match=r"no images in the sets train of .*; there are val"):
        open_class_maps(tmp_path, ["train"])


def test_augmentation_moves_image_and_classes_together(drawn: ClassMaps) -> None:
    one = load_labelled(drawn, 2)
    coded = Labelled(one.classes.clamp(max=30).mul(8)[None].repeat(3, 1, 1), one.classes)  # the image says the class
    sizes = set()
    for seed in range(12):
        got = augmented(coded, 60, (0.5, 0.5, 0.5), np.random.default_rng(seed))
        assert got.image.shape == (3, 60, 60) and got.classes.shape == (60, 60)
        inside = (got.classes != IGNORED) & (got.image[0] % 8 == 0)  # away from edges, where colours mix
        assert (got.image[0][inside] == got.classes[inside] * 8).float().mean() > 0.9
        sizes.add(int((got.classes == 7).sum()))
    assert len(sizes) > 6  # scaled and cropped otherwise each time
    beyond = augmented(coded, 200, (0.5, 0.5, 0.5), np.random.default_rng(0))
    assert (beyond.classes[-1] == IGNORED).all() and (beyond.image[:, -1] == 127).all()
    assert shrunk(one, 24).classes.shape == (24, 32) and shrunk(one, None) is one and shrunk(one, 100) is one


def test_mean_iou_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, IGNORED])
    predicted = torch.tensor([0, 0, 1, 1, 1, 2])
    counts = count_pairs(truth, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    got = mean_iou(counts)
    assert got["mIoU"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2) and got["pixel_accuracy"] == pytest.approx(80)
    assert mean_iou(count_pairs(truth, truth.clamp(max=3), 4))["mIoU"] == pytest.approx(100)
    assert mean_iou(torch.zeros(2, 2, dtype=torch.int64)) == {"mIoU": 0.0, "pixel_accuracy": 0.0}


@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REPOSITORY / "recipes" / "segmentation" / f"{name}.yaml"
    monkeypatch.setattr(sys, "argv", f"segment --config {path} --run r --data d".split())
    args: Any = dense_arguments.segment()
    crop, iterations, lr = {"voc": (513, 30000, 0.003), "cityscapes": (769, 90000, 0.01)}[name]
    assert (args.crop, args.iterations, args.lr, args.batch_size) == (crop, iterations, lr, 16)
    schedule = schedule_of(args)
    steps = (0, 0.7 * iterations - 1, 0.7 * iterations, 0.9 * iterations)
    assert [schedule.rate(round(s)) for s in steps] == pytest.approx([lr, lr, lr / 10, lr / 100])
    assert set(yaml.safe_load(path.read_text())) <= set(vars(args))
