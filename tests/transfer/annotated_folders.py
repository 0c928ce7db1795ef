"""Small drawn sets with boxes, masks, joints and class maps, in the layouts of COCO and VOC; and a narrow encoder."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from model.encoders import Encoder
from pipeline.pixels.views import mean_std
from recipe import Recipe
from transfer.load import LoadedEncoder

COLOURS = ((200, 40, 40), (40, 160, 40), (40, 40, 200))
KINDS = ("person", "dog", "car")  # of VOC, in COCO's folder too
SIDES = (64, 48)  # width, height


def drawing(i: int) -> tuple[np.ndarray, tuple[int, int, int, int], int]:
    """Pixels uint8 [48, 64, 3] with one rectangle, its box x0 y0 x1 y1 and its kind, 0 to 2."""
    rng = np.random.default_rng(i)
    width, height = SIDES
    pixels = rng.integers(100, 130, (height, width, 3)).astype(np.uint8)
    x, y = int(rng.integers(4, 24)), int(rng.integers(4, 14))
    w, h = int(rng.integers(20, 34)), int(rng.integers(16, 28))
    pixels[y : y + h, x : x + w] = COLOURS[i % 3]
    return pixels, (x, y, x + w, y + h), i % 3


def coco_folder(root: Path, images: int = 6) -> Path:
    """annotations/instances_train2017.json with boxes, polygons and three joints, and its images in train2017."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    pictures, objects = [], list[dict[str, Any]]()
    for i in range(images):
        pixels, (x0, y0, x1, y1), kind = drawing(i)
        Image.fromarray(pixels).save(root / "train2017" / f"{i}.png")
        pictures.append({"id": 100 + i, "file_name": f"{i}.png", "width": SIDES[0], "height": SIDES[1]})
        about = {"id": i + 1, "image_id": 100 + i, "category_id": 10 * (kind + 1), "iscrowd": 0}
        about |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        about |= {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], "num_keypoints": 3}
        objects.append(about | {"keypoints": [x0, y0, 2, x1 - 1, y0, 2, (x0 + x1) // 2, y1 - 1, 2]})
    joints = ["left_ear", "right_ear", "foot"]
    kinds = [{"id": 10 * (i + 1), "name": name, "keypoints": joints} for i, name in enumerate(KINDS)]
    truth = {"images": pictures, "annotations": objects, "categories": kinds}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(truth))
    return root


def voc_folder(root: Path, images: int = 6, year: str = "2007") -> Path:
    """A VOCdevkit with one year: trainval with boxes, the second one difficult, and train with class maps."""
    folder = root / f"VOC{year}"
    for part in ("ImageSets/Main", "ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(images)]
    for i, name in enumerate(names):
        pixels, (x0, y0, x1, y1), kind = drawing(i)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        box = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        each = f"<object><name>{KINDS[kind]}</name><difficult>{int(i == 1)}</difficult><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{SIDES[0]}</width><height>{SIDES[1]}</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{each}</annotation>")
        numbers = np.zeros(SIDES[::-1], np.uint8)
        numbers[y0:y1, x0:x1] = (15, 12, 7)[kind]  # VOC's numbers of these classes
        numbers[y0, x0:x1] = 255
        class_map = Image.fromarray(numbers).convert("P")  # a palette of greys
        assert np.array_equal(np.asarray(class_map), numbers)
        class_map.save(folder / "SegmentationClass" / f"{name}.png")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names) + "\n")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(names) + "\n")
    return root


def narrow_encoder(divide: int = 8) -> LoadedEncoder:
    """A ResNet of one block a stage with an eighth of the channels, the same every time."""
    torch.manual_seed(7)
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    _narrow(net, divide)
    net.fc = cast(nn.Linear, nn.Identity())
    recipe = Recipe(arch="resnet18", dim=8)
    return LoadedEncoder(Encoder(net, 512 // divide, dim=8), recipe, 64, mean_std("v1"), "narrow")


def _narrow(module: nn.Module, divide: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            inside = child.in_channels if child.in_channels == 3 else child.in_channels // divide
            shape: Any = {"stride": child.stride, "padding": child.padding, "bias": False}
            conv = nn.Conv2d(inside, child.out_channels // divide, cast(Any, child.kernel_size), **shape)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            setattr(module, name, conv)
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.num_features // divide))
        else:
            _narrow(child, divide)
