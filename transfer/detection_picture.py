"""Predictions beside the truth, as one PNG: a row for each of a few images, the truth on the left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from pipeline import files
from transfer.detection_data import Annotated, masks_of, read_image

ROWS = 6
SIDE = 480  # pixels: the longer side of an image in the picture
GAP = 8
SHOWN = 0.5  # score from which on a detection is drawn; the best of an image always is
COLOURS = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#c2255c", "#5c940d")


def draw_detections(data: Annotated, found: Sequence[dict[str, Any]], output: Path, *, task: str) -> None:
    """Writes the picture of the first images that have objects. found: COCO's results for `data`."""
    chosen = [i for i, objects in enumerate(data.objects) if objects][:ROWS]
    rows = []
    for item in chosen:
        about = data.images[item]
        image = torch.from_numpy(read_image(data.files[item], about["width"], about["height"]).copy()).permute(2, 0, 1)
        ours = sorted((f for f in found if f["image_id"] == about["id"]), key=lambda f: -f["score"])
        ours = [f for i, f in enumerate(ours) if i < 1 or f["score"] >= SHOWN]
        rows.append((drawn(image, data.objects[item], data, task), drawn(image, ours, data, task)))
    save_rows(rows, output)


def drawn(image: Tensor, objects: Sequence[dict[str, Any]], data: Annotated, task: str) -> Tensor:
    """The image uint8 [3, H, W] with boxes, names and, where they have scores, these; masks and joints by the task."""
    if not objects:
        return image
    label_of = {category: i for i, category in enumerate(data.category_ids)}
    labels = [label_of[o["category_id"]] for o in objects]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if task == "masks":
        withs = [i for i, o in enumerate(objects) if o.get("segmentation")]
        if withs:
            masks = torch.from_numpy(masks_of([objects[i] for i in withs], *image.shape[1:])).bool()
            masks &= masks.cumsum(dim=0) == 1  # where two overlap, torchvision would paint black
            image = draw_segmentation_masks(image, masks, alpha=0.5, colors=[colours[i] for i in withs])
    if task == "keypoints":
        points = torch.tensor([o["keypoints"] for o in objects if o.get("keypoints")]).view(-1, len(data.joints), 3)
        image = draw_keypoints(image, points[..., :2], visibility=points[..., 2] > 0, colors="#ffe066", radius=3)
    x, y, w, h = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).T
    boxes = torch.stack([x, y, x + w.clamp(min=1), y + h.clamp(min=1)], dim=1)
    names = [data.classes[label] + (f" {o['score']:.2f}" if "score" in o else "") for label, o in zip(labels, objects)]
    return draw_bounding_boxes(image, boxes, names, colors=list(colours), width=2)


def save_rows(rows: Sequence[tuple[Tensor, Tensor]], output: Path) -> None:
    """Writes pairs of images uint8 [3, H, W] as rows of one PNG; nothing when there is none."""
    if not rows:
        return
    pairs = [[_shrunk(image) for image in row] for row in rows]
    width = 2 * max(left.width for left, _ in pairs) + 3 * GAP
    sheet = Image.new("RGB", (width, sum(left.height + GAP for left, _ in pairs) + GAP), "#ffffff")
    top = GAP
    for left, right in pairs:
        sheet.paste(left, (GAP, top))
        sheet.paste(right, (width // 2 + GAP // 2, top))
        top += left.height + GAP
    with files.writing(str(output)) as file:
        sheet.save(file, "PNG")


def _shrunk(image: Tensor) -> Image.Image:
    whole = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    scale = SIDE / max(whole.size)
    return whole.resize((max(1, round(whole.width * scale)), max(1, round(whole.height * scale))))
