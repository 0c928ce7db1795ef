"""The linear protocol: a frozen encoder, learning rates that do not touch each other, ranks, interruptions."""

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
from coloured import coloured
from conftest import REPOSITORY, Command, cpu_environment

import checkpoint
from model.encoders import build_encoder
from pipeline.pixels.views import mean_std
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from recipe import Recipe
from trainer.joining import Ranks
from transfer import linear
from transfer.extraction import FeatureBatch
from transfer.load import LoadedEncoder

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = linear.Protocol([0.3], epochs=5, batch_size=20)
HOW: dict[str, Any] = {"num_threads": 1, "ranks": ALONE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("coloured")
    return coloured(root / "train", 60, 0), coloured(root / "val", 31, 1)


@pytest.fixture(scope="module")
def sources(folders: tuple[Path, Path]) -> tuple[Source, Source]:
    return open_source(str(folders[0])), open_source(str(folders[1]))


def encoder() -> LoadedEncoder:
    torch.manual_seed(3)
    net = build_encoder("resnet18", dim=16).eval()
    return LoadedEncoder(net, Recipe(arch="resnet18", dim=16), 16, mean_std("v1"), "test")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
def test_learns_and_leaves_the_encoder_bit_identical(sources: tuple[Source, Source], tmp_path: Path) -> None:
    loaded = encoder()
    before = {name: tensor.clone() for name, tensor in loaded.encoder.state_dict().items()}
    rows = linear.linear(loaded, *sources, tmp_path, replace(SMALL, lr=[0.3]), **HOW)
    assert [row["epoch"] for row in rows] == [5] and rows[0]["lr"] == 0.3
    assert rows[0]["top1"] > 0.9 and rows[0]["top5"] == 1.0  # of three classes
    assert rows[0]["loss"] < 0.7 < np.log(3) and rows[0]["train_top1"] > 0.8
    after = loaded.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in written] == [1, 2, 3, 4, 5] and written[-1] == rows[0]


@pytest.mark.slow
def test_files_of_others_are_not_written_over(
    sources: tuple[Source, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder as --out, before and after its first checkpoint. What a kill left out is added."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is of no linear classifier that this program began"):
        linear.linear(encoder(), *sources, tmp_path, replace(SMALL, lr=[0.3]), **HOW)
    checkpoint.save(tmp_path, {"step": 1}, step=1, keep=1)
    with pytest.raises(ValueError, match=r"holds no checkpoints of a linear classifier: take another --out"):
        linear.linear(encoder(), *sources, tmp_path, replace(SMALL, lr=[0.3]), **HOW)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    out = tmp_path / "linear"
    linear.linear(encoder(), *sources, out, replace(SMALL, lr=[0.3]), **HOW)
    whole = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").unlink()
    linear.linear(encoder(), *sources, out, replace(SMALL, lr=[0.3]), **HOW)
    assert (out / "metrics.jsonl").read_text() == whole


@pytest.mark.slow
def test_each_learning_rate_is_on_its_own(sources: tuple[Source, Source], tmp_path: Path) -> None:
    alone = linear.linear(encoder(), *sources, tmp_path / "1", replace(SMALL, lr=[0.1], epochs=2), **HOW)
    beside = linear.linear(encoder(), *sources, tmp_path / "2", replace(SMALL, lr=[0.1, 1e6], epochs=2), **HOW)
    for name in ("loss", "train_top1", "top1"):
        assert beside[0][name] == pytest.approx(alone[0][name], rel=1e-6)
    assert beside[1]["loss"] > 1e3 * beside[0]["loss"]


def test_the_gradient_is_that_of_the_mean_loss(sources: tuple[Source, Source]) -> None:
    """One step of `train_epoch` beside plain PyTorch in float64."""
    torch.manual_seed(0)
    heads = linear.Heads(2, 6, 3)
    features, labels = torch.randn(8, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    expected = []
    for layer, lr in zip(heads.layers, (0.5, 2.0)):
        weight = layer.get_parameter("weight").detach().double().requires_grad_()
        bias = layer.get_parameter("bias").detach().double().requires_grad_()
        torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels).backward()
        assert weight.grad is not None
        expected.append((weight - lr * weight.grad).detach())
    optimizer = torch.optim.SGD([{"params": x.parameters(), "lr": lr} for x, lr in zip(heads.layers, (0.5, 2.0))])
    batch = type("Batch", (), {"images": features, "labels": labels})
    linear.train_epoch(heads, optimizer, lambda x: x, iter([batch]), 1, lambda n: None)
    for layer, weight in zip(heads.layers, expected):
        torch.testing.assert_close(layer.get_parameter("weight").double(), weight, rtol=1e-5, atol=1e-6)


def test_every_image_is_trained_on_in_every_epoch(
    sources: tuple[Source, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, epoch = list[list[int]](), linear.train_epoch

    def spy(heads: Any, optimizer: Any, embed: Any, batches: Any, steps: int, advance: Any) -> Any:
        given = [next(batches) for _ in range(steps)]
        seen.append([len(batch.labels) for batch in given])
        return epoch(heads, optimizer, embed, iter(given), steps, advance)

    monkeypatch.setattr(linear, "train_epoch", spy)
    linear.linear(encoder(), *sources, tmp_path, replace(SMALL, epochs=2, batch_size=25), **HOW)
    assert seen == [[25, 25, 10]] * 2


def test_top_5_against_numpy() -> None:
    torch.manual_seed(1)
    heads = linear.Heads(2, 4, 9)
    for layer in heads.layers:
        torch.nn.init.normal_(layer.get_parameter("weight"))
    features, labels = torch.randn(50, 4), torch.randint(9, (50,))
    parts = [slice(i, i + 20) for i in (0, 20, 40)]
    batches = [FeatureBatch(features[part], labels[part], torch.arange(50)[part], features[:0]) for part in parts]
    counts = linear.validate(heads, batches, torch.device("cpu"))
    for layer, row in zip(heads.layers, counts.tolist()):
        order = np.argsort(-(features @ layer.get_parameter("weight").T).detach().numpy(), axis=1)
        hits = order == labels.numpy()[:, None]
        assert row == [hits[:, 0].sum(), hits[:, :5].sum(), 50] and row[0] < row[1] < 50


def test_the_reference_schedule() -> None:
    factors = [linear.decay(epoch, 100) for epoch in range(100)]
    assert factors == pytest.approx([1.0] * 60 + [0.1] * 20 + [0.01] * 20)  # main_lincls.py: 60 and 80 of 100 epochs


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(
    sources: tuple[Source, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = linear.linear(encoder(), *sources, tmp_path / "whole", replace(SMALL, lr=[0.1, 1.0], epochs=3), **HOW)
    save = checkpoint.save

    def fail_at_two(run_dir: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
        if step == 2:
            raise OSError("no space left")
        return save(run_dir, state, step=step, keep=keep)

    monkeypatch.setattr(checkpoint, "save", fail_at_two)
    with pytest.raises(OSError, match="no space"):
        linear.linear(encoder(), *sources, tmp_path / "cut", replace(SMALL, lr=[0.1, 1.0], epochs=3), **HOW)
    monkeypatch.undo()
    resumed = linear.linear(encoder(), *sources, tmp_path / "cut", replace(SMALL, lr=[0.1, 1.0], epochs=3), **HOW)
    assert without_times(resumed) == without_times(whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert without_times(list(map(json.loads, lines[0]))) == without_times(list(map(json.loads, lines[1])))
    with pytest.raises(ValueError, match="another experiment: lr was"):
        linear.linear(encoder(), *sources, tmp_path / "cut", replace(SMALL, lr=[0.1], epochs=3), **HOW)
    with pytest.raises(ValueError, match="another experiment: val was"):
        linear.linear(
            encoder(), sources[0], sources[0], tmp_path / "cut", replace(SMALL, lr=[0.1, 1.0], epochs=3), **HOW
        )


def test_sources_that_do_not_fit(sources: tuple[Source, Source], tmp_path: Path) -> None:
    bare = open_source(str(coloured(tmp_path / "bare", 20, 2, labelled=False)))
    with pytest.raises(ValueError, match="not every image of the train source has a label"):
        linear.linear(encoder(), bare, sources[1], tmp_path / "a", replace(SMALL, lr=[1.0]), **HOW)
    with pytest.raises(ValueError, match="not every image of the val source has a label"):
        linear.linear(encoder(), sources[0], bare, tmp_path / "b", replace(SMALL, lr=[1.0]), **HOW)
    with pytest.raises(ValueError, match="less than one batch of 64"):
        linear.linear(encoder(), *sources, tmp_path / "c", replace(SMALL, lr=[1.0], batch_size=64), **HOW)


@pytest.mark.slow
def test_command_on_two_ranks_killed_and_continued_on_one(
    run_folder: Path, folders: tuple[Path, Path], run_command: Command, tmp_path: Path
) -> None:
    arguments = ["--run", run_folder, "--train", folders[0], "--val", folders[1], "--lr", "[0.1, 1]"]
    arguments += ["--batch_size", "20", "--num_threads", "1", "--image_size", "16", "--out"]
    both = run_command("transfer.linear", *arguments, tmp_path / "two", "--epochs", "3", ranks=2)
    assert both.returncode == 0, both.stderr
    shared = json.loads(both.stdout.splitlines()[-1])
    assert shared["train"] == 60 and shared["val"] == 31 and shared["lr"] in (0.1, 1)

    arguments += [tmp_path / "one", "--epochs", "3"]
    command = [sys.executable, "-m", "transfer.linear", *map(str, arguments)]
    with subprocess.Popen(command, env=cpu_environment(), cwd=REPOSITORY) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.list_steps(tmp_path / "one") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    alone = run_command("transfer.linear", *arguments)
    assert alone.returncode == 0, alone.stderr
    rows = [list(map(json.loads, (tmp_path / n / "metrics.jsonl").read_text().splitlines())) for n in ("two", "one")]
    assert len(rows[0]) == len(rows[1]) == 6
    for two, one in zip(*rows):
        assert (two["epoch"], two["lr"]) == (one["epoch"], one["lr"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["top1"] == pytest.approx(one["top1"], abs=1.01 / 31)  # an image that rounding moves

    wrong = run_command("transfer.linear", *arguments, "--lr", "3")
    assert wrong.returncode == 2 and "another experiment" in wrong.stderr and "Traceback" not in wrong.stderr
