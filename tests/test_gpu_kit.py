"""The kit for a GPU machine (benchmarks/gpu_kit): every command in it exists and selects the rows that it is meant to;
parts, time limits and results; and the rows and the exchange between ranks, small, on the CPU."""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import REPOSITORY, Command
from test_documents import unknown_commands

BENCHMARKS = REPOSITORY / "benchmarks"


def script(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


call, gpu, node, gpu_rows, moco_step = (
    script(BENCHMARKS / f"{name}.py") for name in ("gpu_kit/call", "gpu", "gpu_kit/node", "gpu_rows", "moco_step")
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "versions.json").write_text('{"card": "h200"}')
    return tmp_path


def all_steps(state: Path, device: str) -> list[tuple[str, Any]]:
    return [(name, step) for name in call.CALLS for step in call.steps(name, device, state, state / "out")]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_the_steps_name_only_what_exists(state: Path, device: str) -> None:
    steps = all_steps(state, device)
    assert len(steps) == 18
    lines = [f"    python {shlex.join(step.command)}" for _, step in steps]
    assert list(unknown_commands("\n".join(lines))) == []
    for _, step in steps:
        script_or_module = step.command[1] if step.command[0] == "-m" else step.command[0]
        assert script_or_module == "pytest" or re.search(r"\.py$|^(pipeline|transfer)\.", script_or_module)
        named = [word for word in step.command if word.startswith(("tests/", "recipes/", "benchmarks/"))]
        assert [word for word in named if not (REPOSITORY / word).exists()] == []


def test_the_rehearsal_has_the_same_commands(state: Path) -> None:
    """The same flags, with smaller values."""

    def shape(device: str) -> list[list[str]]:
        return [[w for w in step.command if re.match("-|[a-z]", w)] for _, step in all_steps(state, device)]

    for on_gpu, on_cpu in zip(shape("cuda:0"), shape("cpu")):
        flags = [[word for word in words if word.startswith("-")] for words in (on_gpu, on_cpu)]
        assert flags[0] == flags[1]


def test_the_steps_of_a_call_fit_into_its_time(state: Path) -> None:
    for name in ("1", "2", "4", "5"):
        limits = [step.limit for step in call.steps(name, "cuda:0", state, state)]
        assert sum(limits) <= call.SECONDS[name]
    planned = sum(seconds for name, seconds in call.SECONDS.items() if name in "12345")
    assert planned <= 600  # of 900: the start, five transfers and one rerun come on top


def selected(step: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the rows that a step of benchmarks/gpu.py measures on a machine with 16 cores, in their order."""
    found: list[Any] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(sys, "argv", step.command)
    monkeypatch.setattr(gpu, "make_shards", lambda *_: {"native": "native", "short_256": "short_256"})
    monkeypatch.setattr(gpu, "run_row", lambda kind, options, cores, seconds: found.append(options) or {"x": 1.0})
    hardware = type(sys)("benchmarks.hardware")
    hardware.card, hardware.hardware = (lambda _: "h200"), (lambda _: {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.hardware", hardware)
    Path(step.command[step.command.index("--images") + 1]).mkdir(parents=True, exist_ok=True)
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    (written,) = Path(step.command[step.command.index("--output") + 1]).glob("gpu_h200_*.json")
    rows = [name for name in json.loads(written.read_text()) if name not in ("hardware", "command")]
    assert len(rows) == len(found)
    return rows


def step_of(name: str, title: str, state: Path) -> Any:
    return next(s for s in call.steps(name, "cuda:0", state, state / "out") if s.name == title)


@pytest.mark.parametrize(
    ("name", "title", "rows"),
    [
        (
            "4",
            "loader",
            [
                "loader v2 native 2 threads",
                "loader v2 native 16 threads",
                "loader v2 short_256 2 threads",
                "loader v2 native 2 threads hw_decoder_load 0.0",
                "loader v2 native 2 threads hw_decoder_load 1.0",
                "loader v2 native 2 threads fancy upsampling off",
                "loader v2 native 2 threads prefetch 4",
            ],
        ),
        (
            "5",
            "training",
            [
                "train constant eager batch 256 2 cores #0",
                "train shards eager batch 256 2 cores #0",
                "train constant eager batch 256 2 cores #1",
                "train shards eager batch 256 2 cores #1",
                "train torchvision eager batch 256 2 cores",
            ],
        ),
        (
            "more",
            "compiled, cudnn.benchmark",
            [
                "train constant cudnn.benchmark batch 256 2 cores",
                "train constant compiled batch 256 2 cores #0",
                "train shards compiled batch 256 2 cores #0",
            ],
        ),
        ("3", "features, roofline", ["features on the CPU and on the device", "roofline"]),
    ],
)
def test_the_rows_that_decide_are_selected(
    name: str, title: str, rows: list[str], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selected(step_of(name, title, state), monkeypatch, state) == rows


def test_all_rows_have_names_of_their_own() -> None:
    o = argparse.Namespace(
        device="cuda:0", image_size=224, arch="resnet50", rounds=5, steps=60, batch_sizes=[256, 512], turns=2,
        train_steps=140, run=None,
    )  # fmt: skip
    names = [name for name, *_ in gpu.plan(o, {"native": "a", "short_256": "b"}, Path("images"))]
    assert len(set(names)) == len(names) > 20


def packed(folder: Path, parts: int) -> None:
    """A small archive in so many parts, with SHA256, as the kit's parts are."""
    folder.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in {"./nvidia/__init__.py": b"", "./photos/a.JPEG": os.urandom(3000)}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    data, lines = buffer.getvalue(), []
    size = -(-len(data) // parts)
    for i in range(parts):
        part = data[i * size : (i + 1) * size]
        (folder / f"part.{i:02d}").write_bytes(part)
        lines.append(f"{hashlib.sha256(part).hexdigest()}  part.{i:02d}")
    (folder / "SHA256").write_text("\n".join(lines) + "\n")


@pytest.mark.process
@pytest.mark.parametrize("with_xz", [True, False])
def test_parts_come_one_at_a_time(with_xz: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "all", 3)
    if not with_xz:
        monkeypatch.setattr(call.shutil, "which", lambda _: None)
    said = []
    for i in range(3):
        came, state = tmp_path / f"came{i}", tmp_path / "state"
        came.mkdir()
        for name in (f"part.{i:02d}", "SHA256"):
            (came / name).write_bytes((tmp_path / "all" / name).read_bytes())
        said.append(call.collect(came, state))
    assert said[:2] == ["still to come: part.01, part.02", "still to come: part.02"]
    assert (state / "site/photos/a.JPEG").stat().st_size == 3000
    assert "extend_path" in (state / "site/nvidia/__init__.py").read_text()
    assert call.collect(None, state) == f"{state}/site is there"
    (tmp_path / "state/site").rename(tmp_path / "gone")
    with (state / "parts/part.01").open("r+b") as part:
        part.write(b"x")
    with pytest.raises(ValueError, match=r"part\.01 is damaged"):
        call.collect(None, state)


@pytest.mark.process
def test_a_step_that_hangs_or_fails_takes_nothing_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "gpu_cpu_call9"
    stem.with_suffix(".txt").write_text("")
    hanging = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    wanted = [
        call.Step("hangs", ["-c", hanging], 1.5),
        call.Step("fails", ["-c", "print('half'); raise SystemExit(3)"], 20),
        call.Step("works", ["-c", "print('{\"median\": 4}')"], 20),
        call.Step("needed", ["-c", "raise SystemExit(1)"], 20, needed=True),
        call.Step("not reached", ["-c", ""], 20),
    ]
    results: dict[str, Any] = {"versions": {}, "steps": {}}
    began = time.monotonic()
    assert not call.run_steps(wanted, results, stem, tmp_path, seconds=60)
    assert time.monotonic() - began < 30
    steps = json.loads(stem.with_suffix(".json").read_text())["steps"]
    assert [step["exit"] for step in steps.values()] == ["ended after 2 s", 3, 0, 1]
    assert steps["works"]["last_line"] == {"median": 4}
    assert "begun" in stem.with_suffix(".txt").read_text()
    assert call.run_steps(wanted[2:3], {"steps": {}}, stem, tmp_path, seconds=60)
    assert not call.run_steps(wanted[2:3], {"steps": {}}, stem, tmp_path, seconds=4)  # too little is left
    assert "the time is up" in stem.with_suffix(".json").read_text()


def test_a_row_knows_which_thread_is_busy() -> None:
    processor = gpu_rows.Processor()
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    found = processor.so_far()
    name, share = next(iter(found["busiest_threads"].items()))
    assert name.endswith(f" {os.getpid()}")
    assert 0 < share <= 1.5
    assert found["cpu_cores"] > 0
    assert found["cpu_cores"] >= 0.5 * share


@pytest.mark.process
@pytest.mark.slow
def test_a_row_of_training_on_constant_tensors(shards_dir: Path) -> None:
    """What train.py asks its loader for, the stand-in has too."""
    options = {
        "device": "cpu", "image_size": 32, "arch": "timm:test_resnet", "rounds": 1, "train_steps": 6, "threads": 1,
        "precision": "fp32", "data": str(shards_dir), "images": "", "cudnn_benchmark": False, "batch_size": 16,
        "source": "constant", "compile": False,
    }  # fmt: skip
    found = gpu.run_row("train", options, 1, 120)
    assert found["images_per_second"] > 0
    assert found["n"] == 1
    assert found["data_wait"] < 0.5
    assert found["cpu_cores"] > 0


def test_the_exchange_between_ranks(run_command: Command) -> None:
    said = run_command(
        BENCHMARKS / "gpu_kit/node.py", "--rank_of_exchange", "--data", "", "--device", "cpu", "--ranks", "2",
        "--arch", "resnet18", "--image_size", "32", "--images_per_rank", "8", "--queue_size", "40", ranks=2,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert all(value for value in found.values() if isinstance(value, bool))
    assert sum(isinstance(value, bool) for value in found.values()) == 4
    assert 0.2 < found["shuffled images from other ranks"] < 0.8


def test_what_moco_adds_of_a_part_that_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is cut short has printed the parts before."""
    added = dict.fromkeys(moco_step.PARTS, 100.0) | {"queue": 104.0}
    moco_step.report({"step": {1: {"added": added, "alone": {}}}})
    assert "MoCo's own part      4.00 ms   +4.00%" in capsys.readouterr().out
