"""Annotated sets in COCO's terms: boxes, masks and joints of VOC and COCO folders, mirrored; clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from annotated_folders import coco_folder, drawing, voc_folder
from PIL import Image

from trainer.joining import Ranks
from transfer.detection_data import VOC_CLASSES, load_sample, mirrored_joints, open_annotated
from transfer.image_batches import loaded_ahead, slots
from transfer.load import ALONE


def test_a_vocdevkit(tmp_path: Path) -> None:
    data = open_annotated(voc_folder(tmp_path / "kit"), ["2007_trainval"])
    assert data.classes == list(VOC_CLASSES) and data.metric == "voc07" and len(data.files) == 6
    _, box, _ = drawing(4)
    sample = load_sample(data, 4, task="boxes")
    assert sample.image.shape == (3, 48, 64) and sample.target["boxes"].tolist() == [list(map(float, box))]
    assert sample.target["labels"].tolist() == [VOC_CLASSES.index("dog") + 1]
    assert [objects[0]["difficult"] for objects in data.objects] == [0, 1, 0, 0, 0, 0]
    voc_folder(tmp_path / "kit", images=2, year="2012")
    both = open_annotated(tmp_path / "kit", ["2007_trainval", "2012_trainval"])
    assert len(both.files) == 8 and both.metric == "voc" and both.truth["annotations"][7]["image_id"] == 7


@pytest.mark.parametrize("flip", [False, True])
def test_a_coco_folder_and_its_mirror_image(flip: bool, tmp_path: Path) -> None:
    data = open_annotated(coco_folder(tmp_path / "coco"), ["instances_train2017"])
    assert data.classes == ["person", "dog", "car"] and data.category_ids == [10, 20, 30] and data.metric == "coco"
    pixels, (x0, y0, x1, y1), _ = drawing(2)
    sample = load_sample(data, 2, task="masks", flip=flip)
    seen = np.flip(pixels, axis=1) if flip else pixels
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), seen)
    assert sample.target["labels"].tolist() == [3]
    assert sample.target["boxes"].tolist() == [[64 - x1, y0, 64 - x0, y1] if flip else [x0, y0, x1, y1]]
    assert np.array_equal(sample.target["masks"][0].numpy() > 0, (seen == (40, 40, 200)).all(axis=2))
    left, right, foot = load_sample(data, 2, task="keypoints", flip=flip).target["keypoints"][0].tolist()
    if flip:  # what was the right ear is the left one in the mirror
        assert left == [64 - (x1 - 0.5), y0 + 0.5, 2] and right == [64 - (x0 + 0.5), y0 + 0.5, 2]
    else:
        assert left == [x0 + 0.5, y0 + 0.5, 2] and right == [x1 - 0.5, y0 + 0.5, 2]
    assert foot[1:] == [y1 - 0.5, 2]
    assert mirrored_joints(data.joints) == [1, 0, 2]


def test_run_lengths_are_the_same_masks_as_polygons(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco", images=2)
    path = folder / "annotations" / "instances_train2017.json"
    before = load_sample(open_annotated(folder, [path.stem]), 0, task="masks").target["masks"]
    truth, flat = json.loads(path.read_text()), before[0].numpy().T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    counts = [int(n) for n in np.diff(edges)]  # the first run is of zeros
    truth["annotations"][0]["segmentation"] = {"counts": counts, "size": [48, 64]}
    path.write_text(json.dumps(truth))
    assert (load_sample(open_annotated(folder, [path.stem]), 0, task="masks").target["masks"] == before).all()


def test_lvis_has_urls_and_says_what_it_did_not_annotate(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "lvis", images=1)
    path = folder / "annotations" / "instances_train2017.json"
    truth = json.loads(path.read_text())
    about = {"coco_url": "http://images/train2017/0.png", "not_exhaustive_category_ids": [], "neg_category_ids": []}
    truth["images"][0] = {k: v for k, v in truth["images"][0].items() if k != "file_name"} | about
    path.rename(path.with_name("lvis_train.json")).write_text(json.dumps(truth))
    data = open_annotated(folder, ["lvis_train"])
    assert data.metric == "lvis" and data.files[0] == folder / "train2017" / "0.png"


def test_crowds_and_empty_boxes_are_not_trained_on(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco", images=3)
    path = folder / "annotations" / "instances_train2017.json"
    truth = json.loads(path.read_text())
    truth["annotations"][0]["iscrowd"] = 1
    truth["annotations"].append(truth["annotations"][1] | {"id": 9, "bbox": [5, 5, 0, 7]})
    path.write_text(json.dumps(truth))
    data = open_annotated(folder, [path.stem])
    assert load_sample(data, 0, task="boxes").target["boxes"].shape == (0, 4)
    assert load_sample(data, 1, task="boxes").target["boxes"].shape == (1, 4)
    assert [file.name for file in data.with_objects("bbox").files] == ["1.png", "2.png"]
    assert len(data.first(2).truth["annotations"]) == 3 and len(data.first(2).files) == 2


def test_a_folder_that_is_not_what_it_seems(tmp_path: Path) -> None:
    kit, coco = voc_folder(tmp_path / "voc" / "kit"), coco_folder(tmp_path / "coco")
    for folder, said in [
        (kit.parent, f"give {kit}"),
        (kit / "VOC2007", f"one year of a VOCdevkit, give {kit}"),
        (coco / "train2017", "it holds 0.png, 1.png"),
    ]:
        with pytest.raises(ValueError, match=r"is neither a VOCdevkit .* nor in COCO's layout") as found:
            open_annotated(folder, ["x"])
        assert said in str(found.value)
    with pytest.raises(ValueError, match=r"'2012_trainval' is no set .* years: 2007"):
        open_annotated(kit, ["2012_trainval"])
    with pytest.raises(ValueError, match=r"no .*val\.txt; the sets there: trainval"):
        open_annotated(kit, ["2007_val"])
    with pytest.raises(ValueError, match="the sets there: instances_train2017"):
        open_annotated(coco, ["instances_val2017"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_annotated(tmp_path / "none", ["x"])


def test_annotations_that_do_not_fit(tmp_path: Path) -> None:
    coco, kit = coco_folder(tmp_path / "coco", images=2), voc_folder(tmp_path / "kit", images=2)
    Image.new("RGB", (48, 64)).save(coco / "train2017" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png is 48x64 pixels and its annotation says 64x48"):
        load_sample(open_annotated(coco, ["instances_train2017"]), 1, task="boxes")
    (coco / "train2017" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded"):
        load_sample(open_annotated(coco, ["instances_train2017"]), 1, task="boxes")
    path = coco / "annotations" / "instances_train2017.json"
    truth = json.loads(path.read_text())
    for name, change in [
        ("leads out of the folder", {"images": [truth["images"][0] | {"file_name": "../../x.png"}]}),
        ("no 'categories'", {"categories": None}),
    ]:
        broken = {key: value for key, value in (truth | change).items() if value is not None}
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"is not in COCO's format: .*{name}"):
            open_annotated(coco, ["instances_train2017"])
    xml = kit / "VOC2007" / "Annotations" / "000001.xml"
    xml.write_text(xml.read_text().replace("dog", "unicorn"))
    with pytest.raises(ValueError, match=r"000001\.xml is no annotation of VOC: 'unicorn' is none of VOC's 20"):
        open_annotated(kit, ["2007_trainval"])


def test_every_image_once_an_epoch_whatever_the_ranks() -> None:
    """Batches of 4 of 6 images run over the epochs' ends; ranks have their parts of the same order."""

    def order(rank: int, ranks: int, start: int = 0) -> list[list[int]]:
        found = slots(6, 4, 3, start=start, ranks=Ranks(rank, ranks, ALONE.device))
        return [[image for image, _ in next(found)] for _ in range(3)]

    alone = [image for batch in order(0, 1) for image in batch]
    assert sorted(alone[:6]) == sorted(alone[6:]) == list(range(6)) and alone[:6] != alone[6:]
    assert [a + b for a, b in zip(order(0, 2), order(1, 2))] == order(0, 1)
    assert order(0, 1, start=1)[0] == order(0, 1)[1]
    draws = [next(slots(6, 4, 3, start=1, ranks=ALONE))[0][1].random() for _ in range(2)]
    assert draws[0] == draws[1]
    with pytest.raises(ValueError, match="--batch_size 4 does not divide into 3 ranks"):
        slots(6, 4, 3, ranks=Ranks(0, 3, ALONE.device))


def test_loaded_ahead_keeps_the_order_and_hands_on_errors() -> None:
    loaded = loaded_ahead(lambda a, b: a * b, iter([[(1, 2), (3, 4)], [(5, 6)], [], [(7, 8)], [(9, 1)]]), threads=3)
    assert list(loaded) == [[2, 12], [30], [], [56], [9]]
    broken = loaded_ahead(lambda a: 1 // a, iter([[(1,)], [(0,)]]), threads=1)
    assert next(broken) == [1]
    with pytest.raises(ZeroDivisionError):
        next(broken)
