"""Fine-tuned detectors learn drawn objects, go on where they were stopped or killed, and refuse what cannot be."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from annotated_folders import coco_folder, narrow_encoder, voc_folder
from conftest import REPOSITORY, cpu_environment, free_port
from jsonargparse import Namespace
from PIL import Image
from stopping import StopAfter

import checkpoint
from model.encoders import build_encoder
from transfer import dense_arguments, ledger
from transfer.dense_training import Schedule, folder_after_recipe, load_start, schedule_of
from transfer.detect import PICTURE, Protocol, detect
from transfer.detection_data import Annotated, open_annotated
from transfer.detection_picture import drawn as picture_of
from transfer.training import Session

SMALL = Protocol(
    "c4", "masks", Schedule(iterations=4, batch_size=2, lr=0.01, warmup=2), short_side=(48, 64), rois=8, proposals=8,
    precise_batches=2,
)  # fmt: skip
RECIPES = sorted((REPOSITORY / "recipes" / "detection").glob("*.yaml"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Annotated:
    return open_annotated(coco_folder(tmp_path_factory.mktemp("drawn") / "coco"), ["instances_train2017"])


def run(data: Annotated, out: Path, protocol: Protocol, stop: int = 1000, **how: Any) -> tuple[int, dict[str, float]]:
    out.mkdir(exist_ok=True)
    session = Session(out, stop=StopAfter(stop))  # type: ignore[arg-type]
    return detect(narrow_encoder(), data, data, session, protocol, num_threads=1, **({"log_every": 1} | how))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_stopped_and_continued_it_comes_to_the_same_end(drawn: Annotated, tmp_path: Path) -> None:
    """Losses, weights and average precision, to the bit; the sampled boxes are drawn on where they were."""
    step, figures = run(drawn, tmp_path / "whole", SMALL)
    assert step == 4 and set(figures) == {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"}
    assert run(drawn, tmp_path / "cut", SMALL, stop=2) == (2, {})
    assert run(drawn, tmp_path / "cut", SMALL) == (4, figures)
    kept = ("loss", "loss_mask", "lr", "step", "AP")
    whole, cut = ([{k: row.get(k) for k in kept} for row in rows_of(tmp_path / n)] for n in ("whole", "cut"))
    assert whole == cut and len(whole) == 5
    nets = [checkpoint.load(checkpoint.path_of(tmp_path / name, 4))["net"] for name in ("whole", "cut")]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    with Image.open(tmp_path / "cut" / PICTURE) as picture:
        assert picture.width > 960 and picture.height > 6 * 300  # six rows of two
    assert (tmp_path / "cut" / "curves.png").is_file() and (tmp_path / "cut" / "finished").is_file()
    with pytest.raises(ValueError, match="another experiment: rois was 8 and is 4"):
        run(drawn, tmp_path / "cut", replace(SMALL, rois=4))


@pytest.mark.slow
def test_it_learns_what_is_drawn(drawn: Annotated, tmp_path: Path) -> None:
    """Red, green and blue rectangles, overfitted: chance would be a few per cent."""
    schedule = replace(SMALL.schedule, iterations=100, lr=0.02, decay_at=(0.8,), warmup=5)
    protocol = replace(SMALL, task="boxes", short_side=(64,), schedule=schedule, rois=16, precise_batches=6)
    _, figures = run(drawn, tmp_path / "out", protocol, log_every=20)
    losses = [row["loss"] for row in rows_of(tmp_path / "out") if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert figures["AP50"] > 30


def test_sets_that_do_not_go_with_the_task(drawn: Annotated, tmp_path: Path) -> None:
    voc = open_annotated(voc_folder(tmp_path / "kit"), ["2007_trainval"])
    about: dict[str, Any] = {"at": Session(tmp_path), "protocol": SMALL}
    with pytest.raises(ValueError, match=r"has 3 classes and .* 20, or they are named otherwise"):
        detect(narrow_encoder(), drawn, voc, **about)
    with pytest.raises(ValueError, match="no object of its 6 images has a segmentation"):
        detect(narrow_encoder(), voc, voc, **about)
    joints = about | {"protocol": replace(SMALL, body="fpn", task="keypoints")}
    with pytest.raises(ValueError, match="keypoints need categories that list them"):
        detect(narrow_encoder(), voc, voc, **joints)
    assert not (tmp_path / "checkpoints").exists()


def test_the_picture_has_both_masks_where_they_overlap(drawn: Annotated) -> None:
    (one,) = drawn.objects[0]
    x, y, w, h = one["bbox"]
    half = one | {"segmentation": [[x, y, x + w // 2, y, x + w // 2, y + h, x, y + h]], "score": 0.2}
    image = torch.full((3, 48, 64), 200, dtype=torch.uint8)
    alone, both = (picture_of(image, found, drawn, "masks").int() for found in ([one], [one, half]))
    place = (slice(None), y + h - 5, x + w // 4)  # below the names, in both masks
    assert (alone - both)[place].abs().max() <= 2 and (alone[place] - 200).abs().max() > 20
    joints = picture_of(image, [one], drawn, "keypoints")
    assert (joints[:, y + 1, x + 1] != 200).any() and (picture_of(image, [], drawn, "masks") == 200).all()


def test_where_a_training_begins_and_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare file is a start too, and has no folder for what comes out."""
    file = tmp_path / "r18.pth"
    torch.save(build_encoder("resnet18").backbone.state_dict(), file)
    flags: dict[str, Any] = {"untrained": False, "mean": None, "std": None, "config": None, "out": None}
    args = Namespace(run=str(file), **flags)
    assert load_start(args).encoder.features == 512
    assert "ImageNet's mean and std (--mean --std)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no run folder: say with --out"):
        folder_after_recipe(args, "detect")
    given = Namespace(run=str(tmp_path), **flags | {"untrained": True, "config": ["recipes/detection/voc07_c4.yaml"]})
    assert folder_after_recipe(given, "detect") == f"{tmp_path}/detect_voc07_c4_untrained"
    assert folder_after_recipe(Namespace(**{**vars(given), "out": "s3://b/x"}), "detect") == "s3://b/x"


def test_the_schedule() -> None:
    """Detectron2's: a line from a thousandth, a tenth at each step; weight decay is not for batch norm."""
    schedule = Schedule(24000, 16, 0.02, (0.75, 0.9166667), warmup=100)
    rates = {step: schedule.rate(step) for step in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)}
    wanted = [0.00002, 0.01001, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    assert list(rates.values()) == pytest.approx(wanted)
    shrunken = replace(schedule, iterations=24, warmup=0)
    assert [shrunken.rate(step) for step in (0, 17, 18, 22)] == pytest.approx([0.02, 0.02, 0.002, 0.0002])
    net = narrow_encoder().encoder.backbone
    for norms, decay in [(False, 0.0), (True, 0.0001)]:
        rest, of_norms = schedule.optimizer(net, decay_norms=norms).param_groups
        assert rest["weight_decay"] == 0.0001 and of_norms["weight_decay"] == decay
        assert len(rest["params"]) + len(of_norms["params"]) == len(list(net.parameters()))
        assert all(p.ndim == 1 for p in of_norms["params"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_and_flags_shrink_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"detect --config {path} --run r --data d --iterations 60 --short_side 96"
    monkeypatch.setattr(sys, "argv", command.split())
    args = dense_arguments.detect()
    said = yaml.safe_load(path.read_text())
    assert (args.body, args.task, args.train_set) == (said["body"], said["task"], said["train_set"])
    assert (args.iterations, args.short_side, args.lr, args.batch_size) == (60, 96, said["lr"], said["batch_size"])
    falls = [schedule_of(args).rate(step) for step in range(0, 60)]
    assert np.count_nonzero(np.diff(falls) < 0) == len(said["decay_at"])
    text = path.read_text()
    assert "MoCo" in text and ("table" in text or "appendix" in text)


def test_the_papers_recipes_are_here() -> None:
    wanted = "voc0712_c4 voc0712_dilated_c5 voc07_c4 coco_c4_1x coco_c4_2x coco_fpn_1x coco_fpn_2x"
    assert set(f"{wanted} coco_keypoints_fpn_2x lvis_fpn cityscapes_instances_fpn".split()) <= {p.stem for p in RECIPES}


@pytest.mark.process
@pytest.mark.slow
def test_command_killed_on_one_rank_and_continued_on_two(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"data": "-", "out": "-", "arch": "resnet18"}))
    kit, out = voc_folder(tmp_path / "kit"), tmp_path / "run" / "detect_untrained"
    arguments = ["--run", tmp_path / "run", "--untrained", "--data", kit, "--body", "c4", "--batch_size", "2"]
    arguments += ["--train_set", "[2007_trainval]", "--val_set", "[2007_trainval]", "--rois", "4", "--proposals", "4"]
    arguments += ["--precise_batches", "1", "--short_side", "48", "--iterations", "5", "--precision", "bf16"]
    arguments += ["--save_every", "1", "--log_every", "1", "--num_threads", "1"]
    command = [sys.executable, Path(__file__).parent / "detect_runs.py", out, free_port(), *arguments]
    done = subprocess.run(
        [*map(str, command)], env=cpu_environment(PYTHONPATH=str(REPOSITORY)), cwd=REPOSITORY, timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["train"] == said["val"] == 6 and said["iterations"] == 5 and said["metric"] == "voc07"
    assert {"detect", "AP", "AP50", "AP75", "seconds"} <= set(said)
    (entry,) = ledger.read(str(tmp_path / "run" / ledger.LEDGER))
    assert (entry["protocol"], entry["start"], entry["settings"]["rois"]) == ("detect", "untrained", 4)
    assert next(iter(entry["figures"])) == "AP" and round(entry["figures"]["AP"], 3) == said["detect"]
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4, 5, 5] and "AP" in rows_of(out)[-1]
    assert (out / PICTURE).is_file() and checkpoint.list_steps(out) == [5]
