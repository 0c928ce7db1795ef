"""Fine-tuning: learns, leaves the encoder alone, takes the same few labels, survives kills, exports what it trained."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from coloured import coloured
from conftest import REPOSITORY, Command, cpu_environment

import checkpoint
import recipe as recipes
from pipeline.labelled import train_batches
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from transfer import arguments
from transfer.finetune import FineTuning, finetune, how_to
from transfer.load import load_encoder
from transfer.subsets import share_of_each_class
from transfer.training import Session

SMALL = FineTuning(lr=0.02, lr_head=0.1, epochs=6, batch_size=20, milestones=(4,))
FLAGS = "--lr 0.02 --lr_head 0.1 --epochs 6 --batch_size 20 --milestones 4 --num_threads 1 --untrained"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("coloured")
    return coloured(root / "train", 60, 0), coloured(root / "val", 31, 1)


@pytest.fixture(scope="module")
def sources(folders: tuple[Path, Path]) -> tuple[Source, Source]:
    return open_source(str(folders[0])), open_source(str(folders[1]))


def run_of(folder: Path, arch: str) -> Path:
    """A run folder without a checkpoint, for --untrained."""
    folder.mkdir()
    small = recipes.Recipe(data="unused", out="unused", arch=arch, dim=16, views="v1", image_size=32, seed=3)
    recipes.save(small, folder / "recipe.yaml")
    return folder


def tune(run: Path, sources: tuple[Source, Source], out: Path, how: FineTuning = SMALL, **more: Any) -> Any:
    loaded = load_encoder(run, untrained=True)
    return finetune(loaded, *sources, Session(out), how, num_threads=1, **more)


@pytest.fixture(scope="module")
def whole(sources: tuple[Source, Source], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(run, out, result) of an undisturbed training of a tiny encoder."""
    root = tmp_path_factory.mktemp("whole")
    run = run_of(root / "run", "timm:test_resnet")
    return run, root / "out", tune(run, sources, root / "out", evaluate_every=2, save_every=2)


def steps(out: Path) -> list[dict[str, Any]]:
    timed = {"images_per_second", "data_wait", "seconds_left", "memory_gb"}
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_learns_the_colours(whole: tuple[Path, Path, Any]) -> None:
    _, out, result = whole
    assert result["top1"] > 0.8 and result["top5"] == 1.0 and result["images"] == 60 and result["step"] == 18
    rows = steps(out)
    assert [row["epoch"] for row in rows if "top1" in row] == [2, 4, 6]
    assert [row["lr"] for row in rows if "loss" in row] == [pytest.approx(0.002)]  # log_every 20: the last step alone


@pytest.mark.slow
def test_torchvision_reads_the_model(sources: tuple[Source, Source], tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run", "resnet18"), tmp_path / "out"
    loaded = load_encoder(run, untrained=True)
    before = {name: tensor.clone() for name, tensor in loaded.encoder.state_dict().items()}
    result = finetune(loaded, *sources, Session(out), replace(SMALL, epochs=1), num_threads=1)
    after = loaded.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    net = torchvision.models.resnet18(num_classes=3)
    net.load_state_dict(torch.load(out / "model.pth"))
    assert not torch.equal(net.state_dict()["layer4.1.conv2.weight"], before["backbone.layer4.1.conv2.weight"])
    assert net.fc.weight.std() > 0.005
    read = load_encoder(out / "model.pth", image_size=32, mean_std=loaded.mean_std)  # and --run of every command
    assert read.recipe.arch == "resnet18" and not read.has_head
    assert torch.equal(read.encoder.backbone.get_parameter("conv1.weight"), net.conv1.weight)
    assert result is not None and result["epoch"] == 1
    anew = load_encoder(out / "model.pth", untrained=True, image_size=32, mean_std=loaded.mean_std)
    assert anew.start == "untrained" and anew.recipe.arch == "resnet18"
    assert not torch.equal(anew.encoder.backbone.get_parameter("conv1.weight"), net.conv1.weight)


@pytest.mark.slow
def test_a_fraction_trains_on_the_same_images_of_each_class(sources: tuple[Source, Source], tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    ids = share_of_each_class(labels, 0.4, 0)
    assert np.bincount(labels[ids]).tolist() == [8, 8, 8]
    given: Any = train_batches(sources[0], image_size=16, batch_size=10, seed=5, ids=ids, num_threads=1)
    epochs = [[next(given) for _ in range(3)] for _ in range(2)]
    given.close()
    orders = [np.concatenate([batch.sample_ids.numpy() for batch in epoch]) for epoch in epochs]
    assert [len(batch.labels) for batch in epochs[0]] == [10, 10, 4]
    for order, epoch in zip(orders, epochs):
        assert sorted(order) == ids.tolist()
        assert all(batch.labels.tolist() == labels[batch.sample_ids.numpy()].tolist() for batch in epoch)
    assert orders[0].tolist() != orders[1].tolist()
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)  # of each epoch its own crops
    later: Any = train_batches(sources[0], image_size=16, batch_size=10, seed=5, ids=ids, num_threads=1, start=4)
    assert torch.equal(next(later).images, epochs[1][1].images)
    later.close()
    run = run_of(tmp_path / "run", "timm:test_resnet")
    result = tune(run, sources, tmp_path / "out", replace(SMALL, fraction=0.4, epochs=1))
    assert result["images"] == 24 and result["step"] == 1  # the last 4 are left out: batch norm may not do with them
    with pytest.raises(ValueError, match=r"--fraction 0.1: .* 6 samples, less than one batch of 20: lower batch_size"):
        tune(run, sources, tmp_path / "few", replace(SMALL, fraction=0.1))


@pytest.mark.slow
def test_another_experiment_and_sources_that_do_not_fit(
    whole: tuple[Path, Path, Any], sources: tuple[Source, Source], tmp_path: Path
) -> None:
    run, out, result = whole
    assert tune(run, sources, out) == result  # nothing is left to do; what only watches may differ
    with pytest.raises(ValueError, match=r"another experiment: lr was 0.02 and is 0.5"):
        tune(run, sources, out, replace(SMALL, lr=0.5))
    bare = open_source(str(coloured(tmp_path / "bare", 20, 2, labelled=False)))
    with pytest.raises(ValueError, match="not every image of the val source has a label"):
        tune(run, (sources[0], bare), tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.pth").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"model.pth is of no training that was here"):
        tune(run, sources, tmp_path / "mine")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        tune(run, sources, tmp_path / "b", replace(SMALL, precision="fp16"))


def test_bf16_and_the_schedules(whole: tuple[Path, Path, Any], sources: tuple[Source, Source], tmp_path: Path) -> None:
    how = replace(SMALL, precision="bf16", schedule="cosine", warmup_epochs=1, epochs=2)
    assert 0 < tune(whole[0], sources, tmp_path / "out", how, log_every=1)["top1"] <= 1
    rates = [row["lr"] for row in steps(tmp_path / "out") if "loss" in row]
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("name", ["imagenet_r50", "inaturalist18_r50"])
def test_the_published_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REPOSITORY / "recipes" / "finetune" / f"{name}.yaml"
    needed = ["--run", "r", "--train", "t", "--val", "v"]
    monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(path), *needed])
    how = how_to(arguments.finetune())
    assert how.epochs == 100 and how.batch_size == 256 and how.fraction == 1
    assert how.lr == {"imagenet_r50": 0.03, "inaturalist18_r50": 0.025}[name]


@pytest.mark.process
def test_killed_and_continued_it_comes_to_the_same_end(
    whole: tuple[Path, Path, Any], folders: tuple[Path, Path], sources: tuple[Source, Source], tmp_path: Path
) -> None:
    run, undisturbed, result = whole
    out = tmp_path / "out"
    command = [sys.executable, "-m", "transfer.finetune", "--run", str(run), "--train", str(folders[0]), "--val"]
    command += [str(folders[1]), "--out", str(out), *FLAGS.split(), "--evaluate_every", "2", "--save_every", "2"]
    with subprocess.Popen(command, env=cpu_environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.list_steps(out) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (out / "finished").exists()
    assert tune(run, sources, out, evaluate_every=2, save_every=2) == result
    assert steps(out) == steps(undisturbed)
    models = [torch.load(folder / "model.pth") for folder in (undisturbed, out)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_two_ranks_equal_one(
    sources: tuple[Source, Source], folders: tuple[Path, Path], run_command: Command, tmp_path: Path
) -> None:
    """Of an encoder without batch norm, whose statistics are of a rank's images alone."""
    run = run_of(tmp_path / "run", "timm:test_vit")
    alone = tune(run, sources, tmp_path / "one")
    arguments = ["--run", run, "--train", folders[0], "--val", folders[1], *FLAGS.split(), "--out", tmp_path / "two"]
    both = run_command("transfer.finetune", *arguments, ranks=2)
    assert both.returncode == 0, both.stderr
    said = json.loads(both.stdout.splitlines()[-1])
    assert (
        said["finished"] is True
        and said["step"] == alone["step"]
        and said["top1"] == pytest.approx(alone["top1"], abs=1.01 / 31)
    )
    models = [torch.load(tmp_path / name / "model.pth") for name in ("one", "two")]
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-3, atol=1e-4)
