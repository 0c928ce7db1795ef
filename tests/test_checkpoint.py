"""Checkpoints: whole or absent, verified, kept by the rules."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu_environment

import checkpoint


def state(step: int) -> dict[str, object]:
    return {"step": step, "w": torch.arange(5000.0) * step, "nested": {"list": [1, (2.5, None)], "name": "x"}}


def test_what_comes_back_is_what_went_in(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), step=7, keep=3)
    assert path == tmp_path / "checkpoints" / "step_00000007.pt" == checkpoint.latest(tmp_path)
    back = checkpoint.load(path)
    assert torch.equal(back["w"], state(7)["w"])
    assert back["nested"] == state(7)["nested"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_last_n_and_every_mth_are_kept(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        checkpoint.save(tmp_path, state(step), step=step, keep=2, keep_every=40)
    assert checkpoint.list_steps(tmp_path) == [40, 80, 90, 100]


def test_any_flipped_bit_or_cut_is_noticed(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), step=1, keep=1)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            back = checkpoint.load(path)
        except ValueError as error:
            assert "damaged" in str(error)
        else:  # padding between records
            assert torch.equal(back["w"], state(1)["w"])
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(path)


def test_the_one_before_a_damaged_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step), step=step, keep=3)
    newest = checkpoint.path_of(tmp_path, 3)
    newest.write_bytes(newest.read_bytes()[:-100])
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 2
    assert "step_00000003.pt is damaged" in capsys.readouterr().err
    for step in (1, 2):
        checkpoint.path_of(tmp_path, step).write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 checkpoints"):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.load_newest(tmp_path / "elsewhere") is None


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path: Path) -> None:
    path = checkpoint.directory(tmp_path) / "step_00000001.pt"
    path.parent.mkdir()
    torch.save({"step": 1, "evil": os.path.join}, path)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_a_snapshot_does_not_follow_the_training() -> None:
    weights = torch.zeros(3)
    copy = checkpoint.snapshot({"a": [weights], "b": (1, weights)})
    weights += 1
    assert copy["a"][0].sum() == copy["b"][1].sum() == 0


@pytest.mark.process
def test_a_write_that_fails_is_a_warning_and_the_old_one_stays(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the write fails half-way in the same place."""
    script = f"""
        import resource, sys, torch, checkpoint
        writer = checkpoint.Writer({str(tmp_path)!r}, keep=1)
        writer.submit({{"step": 1, "w": torch.zeros(1000)}}, 1); writer.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        writer.submit({{"step": 2, "w": torch.zeros(1_000_000)}}, 2); writer.join()
        print(writer.last_good.name, checkpoint.list_steps({str(tmp_path)!r}))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "step_00000001.pt [1]"
    assert "warning: step 2 not saved" in result.stderr
    assert "File too large" in result.stderr
    assert [p.name for p in checkpoint.directory(tmp_path).iterdir()] == ["step_00000001.pt"]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), step=1, keep=1)
    (checkpoint.directory(tmp_path) / ".step_00000002.pt.123.tmp").write_bytes(b"half")
    assert checkpoint.list_steps(tmp_path) == [1]
    checkpoint.Writer(tmp_path, keep=1)
    assert [p.name for p in checkpoint.directory(tmp_path).iterdir()] == ["step_00000001.pt"]


def test_a_damaged_later_one_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    """keep_checkpoints 1, the newest damaged: the run goes on from an older one, and its next save has to stay."""
    for step in (1, 9):
        checkpoint.save(tmp_path, state(step), step=step, keep=2)
    checkpoint.path_of(tmp_path, 9).write_bytes(b"damaged")
    checkpoint.save(tmp_path, state(2), step=2, keep=1)
    assert checkpoint.list_steps(tmp_path) == [2, 9]
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 2


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), step=1, keep=1)
    for name in ("step_00000001_backup.pt", "step_best.pt", "step_1.pt"):
        (path.parent / name).write_bytes(path.read_bytes())
    checkpoint.save(tmp_path, state(2), step=2, keep=1)
    assert checkpoint.list_steps(tmp_path) == [2]
    assert len(list(path.parent.iterdir())) == 4
