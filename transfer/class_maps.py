"""Images with a class for every pixel: VOC's SegmentationClass and Cityscapes' fine labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as tv

from pipeline.pixels.decode import BadImage, class_map
from transfer.detection_data import VOC_CLASSES, read_image, read_names, voc_set

IGNORED = 255  # in maps and targets: pixels that count for nothing
SCALES = (0.5, 2.0)  # by which images are resized to train on (the paper, appendix A.5)


@dataclass(frozen=True)
class ClassMaps:
    name: str
    files: list[Path]
    maps: list[Path]
    classes: list[str]
    classes_of: np.ndarray  # uint8 [256]: number in a map -> class or IGNORED
    allowed: frozenset[int]  # the numbers that a map may hold
    fingerprint: str

    def first(self, count: int) -> "ClassMaps":
        return replace(self, files=self.files[:count], maps=self.maps[:count])


def open_class_maps(folder: Path, sets: Sequence[str], *, masks: str = "SegmentationClass") -> ClassMaps:
    """`sets` of a VOCdevkit ("2012_train") or of Cityscapes ("train"). masks: folder of the maps in a year of VOC.

    Raises ValueError for a folder that is neither, a set or a map that it does not have; FileNotFoundError when there
    is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if any(folder.glob("VOC2*/ImageSets")):
        return _voc(folder, sets, masks)
    if (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir():
        return _cityscapes(folder, sets)
    below = next((p for p in sorted(folder.glob("*/")) if any(p.glob("VOC2*/ImageSets"))), None)
    below = folder.parent if (folder / "ImageSets").is_dir() else below
    instead = f": give {below}" if below else ""
    raise ValueError(
        f"{folder} is neither a VOCdevkit (VOC2012/ImageSets) nor Cityscapes (leftImg8bit and gtFine){instead}"
    )


def _voc(folder: Path, sets: Sequence[str], masks: str) -> ClassMaps:
    files, maps = list[Path](), list[Path]()
    for name in sets:
        root, subset = voc_set(folder, name)
        for stem in read_names(root / "ImageSets" / "Segmentation" / f"{subset}.txt"):
            files.append(root / "JPEGImages" / f"{stem}.jpg")
            maps.append(root / masks / f"{stem}.png")
    classes = ["background", *VOC_CLASSES]
    table = np.full(256, IGNORED, np.uint8)
    table[: len(classes)] = range(len(classes))
    return _checked(f"{folder} {' '.join(sets)}", files, maps, classes, table, {*range(len(classes)), IGNORED})


def _cityscapes(folder: Path, sets: Sequence[str]) -> ClassMaps:
    files = [p for name in sets for p in sorted((folder / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))]
    if not files:
        there = ", ".join(sorted(p.name for p in (folder / "leftImg8bit").iterdir()))
        raise ValueError(f"no images in the sets {' '.join(sets)} of {folder / 'leftImg8bit'}; there are {there}")
    maps = []
    for path in files:
        stem = path.name.removesuffix("_leftImg8bit.png")
        maps.append(folder / "gtFine" / path.parent.parent.name / path.parent.name / f"{stem}_gtFine_labelIds.png")
    judged = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORED), key=lambda c: c.train_id)
    table = np.full(256, IGNORED, np.uint8)
    for each in judged:
        table[each.id] = each.train_id
    allowed = {c.id for c in Cityscapes.classes if c.id >= 0} | {IGNORED}
    return _checked(f"{folder} {' '.join(sets)}", files, maps, [c.name for c in judged], table, allowed)


def _checked(
    name: str, files: list[Path], maps: list[Path], classes: list[str], table: np.ndarray, allowed: set[int]
) -> ClassMaps:
    if missing := [path for path in maps if not path.is_file()]:
        raise ValueError(f"{name}: {len(missing)} of {len(maps)} class maps are missing, the first {missing[0]}")
    digest = xxhash.xxh3_64()
    for path in maps:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return ClassMaps(name, files, maps, classes, table, frozenset(allowed), digest.hexdigest())


class Labelled(NamedTuple):
    image: Tensor  # uint8 [3, H, W]
    classes: Tensor  # uint8 [H, W]; IGNORED where nothing counts


def load_labelled(data: ClassMaps, item: int) -> Labelled:
    """ValueError when the image or its map does not decode, they differ in size, or the map holds an unknown number."""
    path = data.maps[item]
    try:
        numbers = class_map(np.frombuffer(path.read_bytes(), np.uint8))
    except BadImage as error:
        raise ValueError(f"{path} is no class map: {error}") from None
    if strange := sorted(set(np.unique(numbers).tolist()) - data.allowed):
        raise ValueError(f"{path} holds {strange[0]}, which is none of the {len(data.classes)} classes' numbers")
    image = read_image(data.files[item], numbers.shape[1], numbers.shape[0])
    return Labelled(torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(data.classes_of[numbers]))


def resized(one: Labelled, height: int, width: int) -> Labelled:
    image = tv.resize_image(one.image, [height, width], antialias=True)
    return Labelled(image, tv.resize_mask(one.classes[None], [height, width])[0])


def shrunk(one: Labelled, short_side: int | None) -> Labelled:
    """With the short side at most so long; as it is for None."""
    height, width = one.classes.shape
    scale = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
    return one if scale == 1.0 else resized(one, round(height * scale), round(width * scale))


def augmented(one: Labelled, crop: int, fill: Sequence[float], rng: np.random.Generator) -> Labelled:
    """Scaled at random, a random crop of `crop` pixels, mirrored half of the time. Beyond the image there is the colour
    `fill` (from 0 to 1), which counts for nothing."""
    scale = rng.uniform(*SCALES)
    one = resized(one, *(max(1, round(side * scale)) for side in one.classes.shape))
    height, width = one.classes.shape
    right, bottom = max(0, crop - width), max(0, crop - height)
    image = tv.pad_image(one.image, [0, 0, right, bottom], fill=[255 * value for value in fill])
    classes = tv.pad_mask(one.classes[None], [0, 0, right, bottom], fill=IGNORED)[0]
    top, left = (int(rng.integers(0, max(0, side - crop) + 1)) for side in (height, width))
    image, classes = (x[..., top : top + crop, left : left + crop] for x in (image, classes))
    if rng.random() < 0.5:
        image, classes = image.flip(-1), classes.flip(-1)
    return Labelled(image, classes)
