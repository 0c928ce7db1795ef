"""Average precision of detections, in percent as the papers print it: COCO's and LVIS's by faster-coco-eval, VOC's as
Detectron2, the reference's detector, has it.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from transfer.detection_data import Annotated

THRESHOLDS = np.arange(50, 100, 5) / 100  # of the overlap
OF_PART = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}  # part -> what its figures begin with
LVIS_DETECTIONS = 300  # an image

Detection = dict[str, Any]  # COCO's result: image_id, category_id, bbox [x, y, w, h], score, segmentation, keypoints


def scores(data: Annotated, found: list[Detection], task: str) -> dict[str, float]:
    """{"AP", "AP50", "AP75"} of the boxes, and with "mask_" or "keypoint_" before them those of the task; in percent.

    AP is the mean over overlaps of 0.5 to 0.95 in steps of 0.05 and over the classes that the truth has.
    """
    if data.metric in ("voc", "voc07"):
        return voc_scores(data, found)
    parts = {"boxes": ["bbox"], "masks": ["bbox", "segm"], "keypoints": ["bbox", "keypoints"]}[task]
    result = dict[str, float]()
    for part in parts:
        result |= {OF_PART[part] + name: value for name, value in coco_scores(data, found, part).items()}
    return result


def coco_scores(data: Annotated, found: list[Detection], part: str) -> dict[str, float]:
    """part: "bbox", "segm" or "keypoints", as faster-coco-eval names them."""
    if not found:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    from faster_coco_eval import COCO, COCOeval_faster  # an optional package

    truth = COCO(data.truth | {"annotations": [_measured(a) for a in data.truth["annotations"]]})
    lvis = data.metric == "lvis"
    # Boxes alone, as the areas of masks would sort these into other sizes.
    own = [{k: v for k, v in each.items() if part == "segm" or k != "segmentation"} for each in found]
    sigmas = None if part != "keypoints" or len(data.joints) == 17 else [0.05] * len(data.joints)  # COCO's are for 17
    judge = COCOeval_faster(truth, truth.loadRes(own), part, lvis_style=lvis, kpt_oks_sigmas=sigmas)
    if lvis:
        judge.params.maxDets = [LVIS_DETECTIONS]
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return {name: 100.0 * float(value) for name, value in zip(("AP", "AP50", "AP75"), judge.all_stats)}


def _measured(annotation: dict[str, Any]) -> dict[str, Any]:
    """With the area and the number of joints that COCO's own files have, and other programs leave out."""
    _, _, width, height = annotation["bbox"]
    added: dict[str, Any] = {"area": width * height}
    if "keypoints" in annotation:
        added["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    return added | annotation


def voc_scores(data: Annotated, found: list[Detection]) -> dict[str, float]:
    """VOC2007 by precision at 11 recalls, later years by the area under the curve; "difficult" objects count neither
    as found nor as missed."""
    of_class = defaultdict[int, list[Detection]](list)
    for each in found:
        of_class[each["category_id"]].append(each)
    table = []
    for category in data.category_ids:
        wanted = defaultdict[int, list[dict[str, Any]]](list)
        for a in data.truth["annotations"]:
            if a["category_id"] == category:
                wanted[a["image_id"]].append(a)
        if any(not a["difficult"] for of_image in wanted.values() for a in of_image):
            table.append(_class_precisions(wanted, of_class[category], eleven=data.metric == "voc07"))
    by_overlap = 100.0 * np.mean(table, axis=0) if table else np.zeros(len(THRESHOLDS))  # [10]
    return {"AP": float(by_overlap.mean()), "AP50": float(by_overlap[0]), "AP75": float(by_overlap[5])}


def _class_precisions(wanted: dict[int, list[dict[str, Any]]], found: list[Detection], *, eleven: bool) -> list[float]:
    """The average precision of one class for each of THRESHOLDS."""
    found = sorted(found, key=lambda each: -each["score"])
    best = []  # for each detection: the object that it overlaps most, and by how much
    for each in found:
        boxes = np.array([a["bbox"] for a in wanted[each["image_id"]]], dtype=np.float64).reshape(-1, 4)
        overlaps = box_overlaps(np.asarray(each["bbox"], dtype=np.float64), boxes)
        which = int(overlaps.argmax()) if len(overlaps) else -1
        best.append((which, float(overlaps[which]) if len(overlaps) else 0.0))
    objects = sum(not a["difficult"] for of_image in wanted.values() for a in of_image)
    result = []
    for threshold in THRESHOLDS:
        taken = set[tuple[int, int]]()
        right = []  # for each detection that counts
        for each, (which, overlap) in zip(found, best):
            image = each["image_id"]
            hit = overlap > threshold
            if hit and wanted[image][which]["difficult"]:
                continue
            right.append(hit and (image, which) not in taken)
            if hit:
                taken.add((image, which))
        hits = np.cumsum(right)
        precision, recall = hits / np.arange(1, len(hits) + 1), hits / objects
        result.append(average_precision(precision, recall, eleven=eleven))
    return result


def box_overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of a box [x, y, w, h] with boxes [n, 4]: [n]."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[:2] + box[2:], boxes[:, :2] + boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    union = box[2:].prod() + boxes[:, 2:].prod(axis=1) - common
    return np.asarray(common / np.maximum(union, 1e-12))


def average_precision(precision: np.ndarray, recall: np.ndarray, *, eleven: bool) -> float:
    """For a curve by falling score. eleven: the mean of the best precision at recalls of at least 0, 0.1, ..., 1; else
    the area below the curve, made to fall."""
    if eleven:
        return float(np.mean([precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]))
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * falling).sum())
