"""What needs a GPU: no synchronisation between log steps, fp16's skipped steps, every precision, compiled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import Runs, log_of, losses, metrics

import checkpoint

pytestmark = pytest.mark.gpu
GPU = {"env": {"ACCELERATE_USE_CPU": "false"}}

# Any synchronising call from the fourth step on is an error, but for the phases that are meant to.
NO_SYNC = """
import torch
from trainer.watchdog import Watchdog
phase = Watchdog.phase
def strict(self, name):
    quiet = self.step >= 3 and name not in ("log", "save", "knn")
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    phase(self, name)
Watchdog.phase = strict
"""


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_nothing_waits_for_the_gpu_between_log_steps(
    precision: str, runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / precision
    options: dict[str, Any] = {"log_every": 10, "save_every": 10, "precision": precision, "symmetric": True}
    assert runs.train(out, shards_dir, patch=NO_SYNC, **options, **GPU) == [0], log_of(out).read_text()
    assert len(losses(out)) == 2
    assert 0 <= metrics(out)[-1]["data_wait"] <= 1


def test_accumulation_does_not_wait_either(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "accumulated"
    codes = runs.train(out, shards_dir, patch=NO_SYNC, log_every=10, accumulate=2, precision="bf16", **GPU)
    assert codes == [0], log_of(out).read_text()


def test_fp16_trains_and_an_overflow_moves_nothing(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp16"
    patch = """
from accelerate import Accelerator
backward, calls = Accelerator.backward, []
def overflowing(self, loss):
    calls.append(1)
    backward(self, loss * float("inf") if len(calls) in (3, 4) else loss)
Accelerator.backward = overflowing
"""
    codes = runs.train(out, shards_dir, patch=patch, precision="fp16", max_steps=8, **GPU)
    assert codes == [0], log_of(out).read_text()
    state = checkpoint.load(checkpoint.path_of(out, 8))
    assert int(state["moco"]["enqueues"]) <= 6
    assert state["scaler"]["scale"] <= 65536.0 / 4
    assert np.isfinite(losses(out)).all()


def test_compiled_trains_and_continues(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "compiled"
    for steps in (3, 6):
        codes = runs.train(out, shards_dir, compile=True, precision="bf16", max_steps=steps, **GPU)
        assert codes == [0], log_of(out).read_text()
    assert len(losses(out)) == 6
