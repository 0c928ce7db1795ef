"""What needs a GPU: no synchronisation between log steps, fp16's skipped steps, every precision, compiled, profiled.

Each training is a process of its own: one that is forked from a process that has touched CUDA could not use it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cpu_environment
from training import TINY, flags, losses, metrics

import checkpoint

pytestmark = pytest.mark.gpu

# Any synchronising call from the fourth step on is an error, but for the phases that are meant to.
NO_SYNC = """
import torch
from trainer.watching import Watchdog
phase = Watchdog.phase
def strict(self, name):
    quiet = self.step >= 3 and name not in ("log", "save", "knn")
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    phase(self, name)
Watchdog.phase = strict
"""


def train(out: Path, data: Path, patch: str = "", **options: Any) -> tuple[int, str]:
    """Exit code, and what it said. patch: code that runs first."""
    arguments = flags(TINY | {"data": data, "out": out} | options)
    result = subprocess.run(
        [sys.executable, "-c", f"{patch}\nimport recipe, train\ntrain.main(recipe.parse())", *arguments],
        cwd=REPOSITORY,
        env=cpu_environment(ACCELERATE_USE_CPU="false"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "tf32"},
        {"precision": "bf16"},
        {"precision": "bf16", "accumulate": 2, "bn_groups": 4},
    ],
)
def test_nothing_waits_for_the_gpu_between_log_steps(options: dict[str, Any], shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, said = train(out, shards_dir, NO_SYNC, log_every=10, save_every=10, symmetric=True, **options)
    assert code == 0, said
    assert len(losses(out)) == 2
    assert 0 <= metrics(out)[-1]["data_wait"] <= 1


def test_a_wait_between_log_steps_would_be_seen(shards_dir: Path, tmp_path: Path) -> None:
    waiting = """
from model.moco import MoCo
loss = MoCo.loss
def waits(self, q, keys):
    q.sum().item()
    return loss(self, q, keys)
MoCo.loss = waits
"""
    code, said = train(tmp_path / "run", shards_dir, NO_SYNC + waiting, log_every=10)
    assert code == 1
    assert "step 3, loss: RuntimeError: called a synchronizing CUDA operation" in said


def test_fp16_trains_and_an_overflow_moves_nothing(shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp16"
    patch = """
from accelerate import Accelerator
backward, calls = Accelerator.backward, []
def overflowing(self, loss):
    calls.append(1)
    backward(self, loss * float("inf") if len(calls) in (3, 4) else loss)
Accelerator.backward = overflowing
"""
    code, said = train(out, shards_dir, patch, precision="fp16", max_steps=8)
    assert code == 0, said
    state = checkpoint.load(checkpoint.path_of(out, 8))
    moved = int(state["moco"]["enqueues"])
    assert 1 <= moved <= 6  # the first steps may overflow by themselves: the scale begins high
    assert state["scaler"]["scale"] == 65536.0 / 2 ** (8 - moved)
    assert len(losses(out)) == moved
    norms = [row["parameter_norm"] for row in metrics(out)]
    assert norms[1] == norms[2] == norms[3]
    assert norms[-1] != norms[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_run_continues(precision: str, shards_dir: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out, steps in ((whole, 8), (stopped, 4), (stopped, 8)):
        code, said = train(out, shards_dir, precision=precision, max_steps=steps, lr=0.0005)
        assert code == 0, said
    print(f"{precision}, without and with a stop:", losses(whole), losses(stopped))
    assert len(losses(whole)) >= 6  # fp16: the first steps may overflow, the scale begins high
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-2)


def test_compiled_is_the_same_and_continues(shards_dir: Path, tmp_path: Path) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for out, compile, steps in ((plain, False, 6), (compiled, True, 3), (compiled, True, 6)):
        code, said = train(out, shards_dir, compile=compile, max_steps=steps, lr=0.0005)
        assert code == 0, said
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-2)


def test_the_profile_has_the_copies_to_the_gpu(shards_dir: Path, tmp_path: Path) -> None:
    code, said = train(tmp_path / "run", shards_dir, profile=3, precision="bf16")
    assert code == 0, said
    line = next(line for line in said.splitlines() if "host to device" in line)
    milliseconds, megabytes = (float(word) for word in line.split() if word[0].isdigit())
    assert milliseconds > 0
    assert megabytes >= 0
