"""Average precision: worked out by hand for few detections, 100 where the truth is what was found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_folders import coco_folder, voc_folder

from transfer.detection_data import Annotated, open_annotated
from transfer.detection_scores import average_precision, box_overlaps, scores, voc_scores

Detection = dict[str, Any]


def found_as_true(data: Annotated) -> list[Detection]:
    from faster_coco_eval import mask as codec

    sizes = {image["id"]: (image["height"], image["width"]) for image in data.images}
    found = []
    for a in data.truth["annotations"]:
        each = {name: a[name] for name in ("image_id", "category_id", "bbox", "keypoints") if name in a}
        runs = a.get("segmentation")
        if isinstance(runs, list):
            each["segmentation"] = codec.merge(codec.frPyObjects(runs, *sizes[a["image_id"]]))
        if not a["iscrowd"]:
            found.append(each | {"score": 0.9})
    return found


def drawn(tmp_path: Path, images: int = 6) -> Annotated:
    return open_annotated(coco_folder(tmp_path / "coco", images), ["instances_train2017"])


@pytest.mark.parametrize(("task", "kind"), [("boxes", ""), ("masks", "mask_"), ("keypoints", "keypoint_")])
def test_the_truth_as_predictions_of_coco(task: str, kind: str, tmp_path: Path) -> None:
    data = drawn(tmp_path)
    got = scores(data, found_as_true(data), task)
    assert got == pytest.approx(dict.fromkeys(got, 100.0))
    assert {"AP", "AP50", "AP75", f"{kind}AP", f"{kind}AP50", f"{kind}AP75"} == set(got)
    assert set(scores(data, [], task).values()) == {0.0}


def test_the_truth_as_predictions_of_real_sets(shared_data: Path) -> None:
    coco = open_annotated(shared_data / "coco", ["instances_val2017"])
    assert list(scores(coco, found_as_true(coco), "masks").values()) == pytest.approx([100.0] * 6)
    voc = open_annotated(shared_data / "voc" / "VOCdevkit", ["2007_test"])
    assert voc.metric == "voc07" and list(voc_scores(voc, found_as_true(voc)).values()) == pytest.approx([100.0] * 3)


def test_coco_by_hand(tmp_path: Path) -> None:
    """Two images of one class: one found first, then a false one, then the other, too small by 28 % (IoU 0.72)."""
    data = drawn(tmp_path, images=6)
    first, second = (a for a in data.truth["annotations"] if a["category_id"] == 10)
    x, y, w, h = second["bbox"]
    found = [
        {"image_id": first["image_id"], "category_id": 10, "bbox": first["bbox"], "score": 0.9},
        {"image_id": first["image_id"], "category_id": 10, "bbox": [0, 0, 3, 3], "score": 0.8},
        {"image_id": second["image_id"], "category_id": 10, "bbox": [x, y, 0.72 * w, h], "score": 0.7},
    ]
    got = scores(data, found, "boxes")
    # With both found precision is 1 up to recall 0.5 (51 of COCO's 101 recalls), then 2/3; other classes have nothing.
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert got["AP50"] == pytest.approx(100 * both / 3, abs=1e-3)
    assert got["AP75"] == pytest.approx(100 * one / 3, abs=1e-3)
    assert got["AP"] == pytest.approx(100 * (5 * both + 5 * one) / 10 / 3, abs=1e-3)  # 0.5 to 0.7: both


def voc_of(data: Annotated, rows: list[tuple[int, list[float], float]]) -> dict[str, float]:
    return voc_scores(data, [{"image_id": i, "category_id": 15, "bbox": b, "score": s} for i, b, s in rows])


def test_voc_by_hand(tmp_path: Path) -> None:
    """11 points and area: found, found twice (the second is false), one missed; images 0 and 3 have a person."""
    kit = voc_folder(tmp_path / "kit", images=6)
    voc_folder(kit, images=6, year="2012")
    persons = {"07": open_annotated(kit, ["2007_trainval"]), "12": open_annotated(kit, ["2012_trainval"])}
    boxes = {i: persons["07"].objects[i][0]["bbox"] for i in (0, 3)}
    one_class = {}
    for year, data in persons.items():
        rest = [a for a in data.truth["annotations"] if a["category_id"] == 15]
        one_class[year] = Annotated(**{**data.__dict__, "truth": data.truth | {"annotations": rest}})
    twice = [(0, boxes[0], 0.9), (0, boxes[0], 0.8)]
    assert voc_of(one_class["07"], twice)["AP50"] == pytest.approx(100 * 6 / 11)  # precision 1 at recalls 0 to 0.5
    assert voc_of(one_class["12"], twice)["AP50"] == pytest.approx(50.0)
    late = [*twice, (3, boxes[3], 0.7)]
    assert voc_of(one_class["07"], late)["AP50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert voc_of(one_class["12"], late)["AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    x, y, w, h = boxes[0]
    narrow = [(0, [x, y, 0.8 * w, h], 0.9), (3, boxes[3], 0.8)]
    got = voc_of(one_class["12"], narrow)
    # The first is right up to IoU 0.8 (not above: 0.8 > 0.8 is false), and false beyond, before the second.
    assert got["AP50"] == pytest.approx(100.0) and got["AP75"] == pytest.approx(100.0)
    assert got["AP"] == pytest.approx((6 * 100 + 4 * 25) / 10)


def test_difficult_objects_count_neither_way(tmp_path: Path) -> None:
    data = open_annotated(voc_folder(tmp_path / "kit", images=6), ["2007_trainval"])
    of_dogs = [a for a in data.truth["annotations"] if a["category_id"] == 12]
    dogs = Annotated(**{**data.__dict__, "truth": data.truth | {"annotations": of_dogs}})
    assert [a["difficult"] for a in of_dogs] == [1, 0]
    easy = {"image_id": 4, "category_id": 12, "bbox": of_dogs[1]["bbox"], "score": 0.5}
    hard = {"image_id": 1, "category_id": 12, "bbox": of_dogs[0]["bbox"], "score": 0.9}
    assert voc_scores(dogs, [easy])["AP"] == pytest.approx(100.0)
    assert voc_scores(dogs, [hard, hard, easy])["AP"] == pytest.approx(100.0)
    assert voc_scores(dogs, [hard])["AP"] == 0.0


def test_lvis_counts_only_what_was_annotated(tmp_path: Path) -> None:
    """A detection of a class that nobody looked for there is no mistake; one of a class known to be absent is."""
    data = drawn(tmp_path, images=3)
    for category in data.truth["categories"]:
        category["frequency"] = "f"
    found = found_as_true(data)
    wrong = found[0] | {"category_id": 20, "score": 0.95}  # a dog where a person is
    for known_absent, ap50 in [([], 100.0), ([20], 100 * (1 + 0.5 + 1) / 3)]:
        for image in data.truth["images"]:
            image |= {"neg_category_ids": known_absent, "not_exhaustive_category_ids": []}
        lvis = Annotated(**{**data.__dict__, "metric": "lvis"})
        assert scores(lvis, [wrong, *found], "boxes")["AP50"] == pytest.approx(ap50, abs=0.6)
        assert scores(lvis, [wrong, *found], "masks")["mask_AP50"] == pytest.approx(ap50, abs=0.6)


def test_the_two_kinds_of_average() -> None:
    precision, recall = np.array([1.0, 0.5, 2 / 3]), np.array([0.25, 0.25, 0.5])
    assert average_precision(precision, recall, eleven=False) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(precision, recall, eleven=True) == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert average_precision(np.array([]), np.array([]), eleven=True) == 0.0
    assert average_precision(np.array([]), np.array([]), eleven=False) == 0.0


def test_overlaps() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 2, 2], [5, 5, 1, 1]], np.float64)
    assert box_overlaps(np.array([0.0, 0, 2, 2]), boxes) == pytest.approx([1, 1 / 7, 0])
