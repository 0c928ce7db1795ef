"""--compile true. The graphs are captured and run, forward and backward, by AOT autograd without Inductor, whose C++
takes a minute to build on a CPU; tests/test_train_gpu.py has Inductor.
"""

from pathlib import Path
from typing import Any

import pytest
from training import Runs, log_of, metrics

import checkpoint

WITHOUT_INDUCTOR = """
import torch
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="aot_eager", fullgraph=True)
"""


@pytest.mark.slow
def test_a_compiled_run_is_the_same_and_goes_on_uncompiled(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"

    def train(out: Path, **options: Any) -> None:
        # A small lr keeps rounding small.
        assert runs.train(out, shards_dir, lr=0.0005, **options) == [0], log_of(out).read_text()

    train(plain, max_steps=4)
    train(compiled, max_steps=2, compile=True, patch=WITHOUT_INDUCTOR)
    state = checkpoint.load(checkpoint.path_of(compiled, 2))
    train(compiled, max_steps=4)
    assert "note: compile changes from True to False" in log_of(compiled).read_text()
    for name in ("loss", "gradient_norm"):
        one, other = ([row[name] for row in metrics(out)] for out in (plain, compiled))
        assert other == pytest.approx(one, rel=2e-3)
    expected = checkpoint.load(checkpoint.path_of(plain, 4))
    for part in ("encoder", "moco"):
        assert state[part].keys() == expected[part].keys()
