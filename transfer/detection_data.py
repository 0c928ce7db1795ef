"""Annotated images in COCO's terms, whatever they came from: a VOCdevkit, or JSON files in COCO's format.

torchvision's dataset classes for both open images by themselves, past the rules of `pipeline.pixels.decode`, and COCO's
wants pycocotools; its tensors and transforms are used here.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes, Mask

from pipeline.pixels.decode import BadImage, decode

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
Metric = Literal["coco", "lvis", "voc", "voc07"]  # voc07: with precision at 11 recalls
PARTS = ("bbox", "segmentation", "keypoints")


@dataclass(frozen=True)
class Annotated:
    """A set of images and what is on them, in COCO's terms: `truth` has images, annotations and categories."""

    name: str
    files: list[Path]
    images: list[dict[str, Any]]  # COCO's: id, width, height
    objects: list[list[dict[str, Any]]]  # of each image: annotations with their `label`, from 1 on
    classes: list[str]
    category_ids: list[int]  # of each class
    truth: dict[str, Any]
    metric: Metric
    fingerprint: str
    joints: tuple[str, ...] = ()

    def with_objects(self, part: str) -> "Annotated":
        """The images to train on: those with an object that is no crowd and has the part. ValueError for none."""
        kept = [i for i, objects in enumerate(self.objects) if any(has(each, part) for each in objects)]
        if not kept:
            raise ValueError(f"{self.name}: no object of its {len(self.files)} images has a {part}")
        chosen = {name: [getattr(self, name)[i] for i in kept] for name in ("files", "images", "objects")}
        return Annotated(**{**self.__dict__, **chosen})

    def first(self, count: int) -> "Annotated":
        """The first `count` images alone, in the truth too."""
        images = self.images[:count]
        ids = {image["id"] for image in images}
        rest = [a for a in self.truth["annotations"] if a["image_id"] in ids]
        chosen: dict[str, Any] = {"files": self.files[:count], "images": images, "objects": self.objects[:count]}
        return Annotated(**{**self.__dict__, **chosen, "truth": self.truth | {"images": images, "annotations": rest}})


def has(each: dict[str, Any], part: str) -> bool:
    """Whether an object is no crowd, its box not empty, and has the part: "bbox", "segmentation", or "keypoints", of
    which one is seen."""
    there: Any = each.get(part)
    counts = not each["iscrowd"] and min(each["bbox"][2:]) > 0
    return counts and bool(there) and (part != "keypoints" or any(there[2::3]))


def open_annotated(folder: Path, sets: Sequence[str]) -> Annotated:
    """`sets` of a VOCdevkit ("2007_trainval", "2012_trainval") or of a folder in COCO's layout ("instances_val2017").

    Raises ValueError for a folder that is neither, for a set that it does not have, and for annotations that do not
    fit; FileNotFoundError when there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if any(folder.glob("VOC2*/ImageSets")):
        return _voc(folder, sets)
    if any((folder / "annotations").glob("*.json")):
        if len(sets) > 1:
            raise ValueError(f"{folder} is in COCO's layout, where one set is trained on or judged: {' '.join(sets)}")
        return _coco(folder, sets[0])
    raise ValueError(f"{folder} is neither a VOCdevkit (VOC2007/ImageSets) nor in COCO's layout (annotations/*.json)"
                     f"{_instead(folder)}")  # fmt: skip


def _instead(folder: Path) -> str:
    """A guess at the folder that was meant."""
    if (folder / "ImageSets").is_dir():
        return f": it is one year of a VOCdevkit, give {folder.parent}"
    if (folder / "manifest.json").is_file():
        return ": it holds shards, which have no boxes"
    for below in sorted(folder.glob("*/")):
        if any(below.glob("VOC2*/ImageSets")) or any((below / "annotations").glob("*.json")):
            return f": give {below}"
    return f"; it holds {', '.join(sorted(p.name for p in folder.iterdir())[:5]) or 'nothing'}"


# --- VOC --------------------------------------------------------------------------------------------------------------


def read_names(list_of_names: Path) -> list[str]:
    """The names in a list of VOC's ImageSets. ValueError that says which lists there are when this one is not."""
    if not list_of_names.is_file():
        there = ", ".join(sorted(p.stem for p in list_of_names.parent.glob("*.txt") if "_" not in p.stem)) or "none"
        raise ValueError(f"no {list_of_names}; the sets there: {there}")
    return [line.split()[0] for line in list_of_names.read_text().splitlines() if line.strip()]


def voc_set(folder: Path, name: str) -> tuple[Path, str]:
    """("VOCdevkit/VOC2007", "trainval") of "2007_trainval". ValueError for another kind of name or a year without."""
    year, _, subset = name.partition("_")
    root = folder / f"VOC{year}"
    if not (year.isdigit() and subset and root.is_dir()):
        years = ", ".join(sorted(p.name.removeprefix("VOC") for p in folder.glob("VOC2*")))
        raise ValueError(f"{name!r} is no set of {folder}: sets are named YEAR_SET like 2007_trainval; years: {years}")
    return root, subset


def _voc(folder: Path, sets: Sequence[str]) -> Annotated:
    files, images, objects = list[Path](), list[dict[str, Any]](), list[list[dict[str, Any]]]()
    annotations = list[dict[str, Any]]()
    digest = xxhash.xxh3_64()
    for name in sets:
        root, subset = voc_set(folder, name)
        for stem in read_names(root / "ImageSets" / "Main" / f"{subset}.txt"):
            path = root / "Annotations" / f"{stem}.xml"
            content = path.read_bytes()
            digest.update(content)
            size, found = _voc_objects(content, path)
            for each in found:
                each |= {"image_id": len(images), "id": len(annotations) + 1}
                annotations.append(each)
            files.append(root / "JPEGImages" / f"{stem}.jpg")
            images.append({"id": len(images), "width": size[0], "height": size[1]})
            objects.append(found)
    ids = list(range(1, len(VOC_CLASSES) + 1))
    categories = [{"id": i, "name": c} for i, c in zip(ids, VOC_CLASSES)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    metric: Metric = "voc07" if all(name.startswith("2007_") for name in sets) else "voc"
    label = f"{folder} {' '.join(sets)}"
    return Annotated(label, files, images, objects, list(VOC_CLASSES), ids, truth, metric, digest.hexdigest())


def _voc_objects(content: bytes, path: Path) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """((width, height), objects) of one annotation."""
    try:
        root = ElementTree.fromstring(content)
        number = {tag: float(root.findtext(f"size/{tag}", "")) for tag in ("width", "height")}
        found = []
        for each in root.iter("object"):
            name = each.findtext("name", "")
            if name not in VOC_CLASSES:
                raise ValueError(f"{name!r} is none of VOC's 20 classes")
            x0, y0, x1, y1 = (float(each.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax"))
            # Pixels are counted from 1 there, and the last one is inside.
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            label, difficult = VOC_CLASSES.index(name) + 1, int(each.findtext("difficult", "0") or 0)
            about = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "difficult": difficult}
            found.append(about | {"label": label, "category_id": label})
        return (int(number["width"]), int(number["height"])), found
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no annotation of VOC: {error}") from None


# --- COCO -------------------------------------------------------------------------------------------------------------


def _coco(folder: Path, name: str) -> Annotated:
    path = folder / "annotations" / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise ValueError(f"no {path}; the sets there: {there}")
    content = path.read_bytes()
    try:
        truth = json.loads(content)
        categories = sorted(truth["categories"], key=lambda c: c["id"])
        images = sorted(truth["images"], key=lambda image: image["id"])
        ids = [int(c["id"]) for c in categories]
        label_of = {category: i + 1 for i, category in enumerate(ids)}
        objects = defaultdict[int, list[dict[str, Any]]](list)
        for each in truth["annotations"]:
            each["label"] = label_of[each["category_id"]]
            each.setdefault("iscrowd", 0)
            if len(each["bbox"]) != 4:
                raise ValueError(f"the bbox {each['bbox']} is not [x, y, width, height]")
            objects[each["image_id"]].append(each)
        files = [_image_file(folder, name, image) for image in images]
        lists = [objects[image["id"]] for image in images]
        about = (files, images, lists, [str(c["name"]) for c in categories], ids, truth)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not in COCO's format: {said}") from None
    metric: Metric = "lvis" if any("not_exhaustive_category_ids" in image for image in images) else "coco"
    joints = next((tuple(c["keypoints"]) for c in categories if c.get("keypoints")), ())
    return Annotated(f"{folder} {name}", *about, metric, xxhash.xxh3_64_hexdigest(content), joints)


def _image_file(folder: Path, name: str, image: dict[str, Any]) -> Path:
    """In a folder named after the set (train2017), under `images`, or where its name says. LVIS has URLs instead."""
    file = Path(image.get("file_name") or "/".join(str(image["coco_url"]).split("/")[-2:]))
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"file_name {file} leads out of the folder")
    places = [folder / name.rpartition("_")[2], folder, folder / "images"]
    return next((place / file for place in places if (place / file).is_file()), places[0] / file)


# --- one image --------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    image: Tensor  # uint8 [3, H, W]
    target: dict[str, Tensor]  # as torchvision's detectors take it: boxes fp32 [n, 4], labels int64 [n], ...


def read_image(path: Path, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]. ValueError when it does not decode, or is not of the size that its annotation says."""
    try:
        pixels = decode(np.frombuffer(path.read_bytes(), np.uint8))
    except BadImage as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from None
    if pixels.shape[:2] != (height, width):
        is_so = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ValueError(f"{path} is {is_so} pixels and its annotation says {width}x{height}: its boxes would be wrong")
    return pixels


def load_sample(data: Annotated, item: int, *, task: str, flip: bool = False) -> Sample:
    """An image and its objects that are no crowds. task: "boxes", "masks" or "keypoints". Errors as `read_image`."""
    about = data.images[item]
    width, height = int(about["width"]), int(about["height"])
    image = torch.from_numpy(read_image(data.files[item], width, height).copy()).permute(2, 0, 1)
    objects = [o for o in data.objects[item] if has(o, "segmentation" if task == "masks" else "bbox")]
    x, y, w, h = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).view(-1, 4).T
    corners = torch.stack([x, y, x + w, y + h], dim=1)
    boxes = BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    target: dict[str, Tensor] = {"labels": torch.tensor([o["label"] for o in objects], dtype=torch.int64)}
    if task == "masks":
        target["masks"] = Mask(torch.from_numpy(masks_of(objects, height, width)))
    if task == "keypoints":
        flat = [o.get("keypoints") or [0] * 3 * len(data.joints) for o in objects]
        points = torch.tensor(flat, dtype=torch.float32).view(-1, len(data.joints), 3)
        points[..., :2] += 0.5  # whole numbers there are the centres of pixels
        target["keypoints"] = points
    if flip:
        image, boxes = tv.horizontal_flip(image), tv.horizontal_flip(boxes)
        if task == "masks":
            target["masks"] = tv.horizontal_flip(target["masks"])
        if task == "keypoints":
            points = target["keypoints"][:, mirrored_joints(data.joints)]
            points[..., 0] = width - points[..., 0]
            target["keypoints"] = points
    target["boxes"] = boxes
    return Sample(image, {name: value.as_subclass(Tensor) for name, value in target.items()})


def masks_of(objects: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """uint8 [n, H, W] of COCO's polygons, or of its run lengths."""
    from faster_coco_eval import mask as codec  # an optional package

    masks = np.zeros((len(objects), height, width), np.uint8)
    for i, each in enumerate(objects):
        runs = each["segmentation"]
        if isinstance(runs, list):
            runs = codec.merge(codec.frPyObjects(runs, height, width))
        elif isinstance(runs["counts"], list):
            runs = codec.frPyObjects(runs, height, width)
        masks[i] = codec.decode(runs)
    return masks


def mirrored_joints(joints: Sequence[str]) -> list[int]:
    """Where each joint is found in the mirror image: left_eye where right_eye was."""
    other = {name: name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in joints}
    return [joints.index(other[name]) if other[name] in joints else i for i, name in enumerate(joints)]
