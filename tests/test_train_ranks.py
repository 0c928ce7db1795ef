"""Several ranks over gloo: the same run as one rank's, told at once when they were not started alike."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training import Runs, log_of, losses, metrics

import checkpoint

# The trace of sample ids: every rank writes what it took, step by step.
WRITE_IDS = """
import os
from pipeline.loader import Loader
take = Loader.__next__
def taking(self):
    batch = take(self)
    with open(os.environ["IDS"] + f".{self._consumed}.{rank}", "w") as file:
        file.write(" ".join(str(i) for i in batch.sample_ids.tolist()))
    return batch
Loader.__next__ = taking
"""


def ids(folder: Path, name: str) -> list[list[int]]:
    """Global sample ids by step."""
    steps: dict[int, list[list[int]]] = {}
    for path in sorted(folder.glob(f"{name}.*.*"), key=lambda p: [int(x) for x in p.name.split(".")[1:]]):
        steps.setdefault(int(path.name.split(".")[1]), []).append([int(i) for i in path.read_text().split()])
    return [[i for part in steps[step] for i in part] for step in sorted(steps)]


def test_two_ranks_are_one_rank_and_one_continues_what_two_began(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    """Same ids whatever the ranks; losses to rounding, which batch norm over groups of six amplifies step by step."""
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    options = {"max_steps": 8, "lr": 0.0001, "patch": WRITE_IDS}
    assert runs.train(one, shards_dir, env={"IDS": str(tmp_path / "ids1")}, **options) == [0], log_of(one).read_text()
    codes = runs.train(two, shards_dir, ranks=2, env={"IDS": str(tmp_path / "ids2")}, **options)
    assert codes == [0, 0], log_of(two).read_text()
    options["max_steps"] = 4
    assert runs.train(both, shards_dir, ranks=2, env={"IDS": str(tmp_path / "ids3")}, **options) == [0, 0]
    options["max_steps"] = 8
    assert runs.train(both, shards_dir, env={"IDS": str(tmp_path / "ids3")}, **options) == [0]
    assert len(ids(tmp_path, "ids1")) == 8
    assert ids(tmp_path, "ids1") == ids(tmp_path, "ids2") == ids(tmp_path, "ids3")
    assert losses(two) == pytest.approx(losses(one), rel=5e-3)
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    assert losses(both)[:4] == losses(two)[:4]
    assert losses(both) == pytest.approx(losses(one), rel=5e-3)
    queues = [checkpoint.load(checkpoint.path_of(run, 8))["moco"]["queue"] for run in (one, two, both)]
    assert all((queues[0] - queue).abs().max() < 0.05 for queue in queues[1:])


def test_knn_is_the_same_on_two_ranks_and_disturbs_nothing(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert runs.train(plain, shards_dir, ranks=2, epochs=1) == [0, 0], log_of(plain).read_text()
    codes = runs.train(watched, shards_dir, ranks=2, epochs=1, knn_data=shards_dir, knn_every=1)
    assert codes == [0, 0], log_of(watched).read_text()
    assert losses(plain) == losses(watched)
    assert [row["step"] for row in metrics(watched) if "knn" in row and row["rankme"] > 1] == [5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": [0.02, 0.04]}, "rank 1 has lr 0.04, rank 0 has 0.02"),
        ({"max_steps": [0, 7]}, "rank 1 has max_steps 7, rank 0 has 0"),
        ({"batch_size": 9, "bn_groups": 1}, "batch_size 9 does not divide over 2 ranks"),
        ({"trackers": "[no_such_tracker]"}, "tracker no_such_tracker is not installed"),
    ],
)
def test_what_is_wrong_on_several_ranks_is_said_once(
    options: dict[str, object], says: str, runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "unlike"
    assert runs.train(out, shards_dir, ranks=2, **options) == [2, 2], log_of(out).read_text()
    said = [line for line in log_of(out).read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert says in said[0]


def test_ranks_with_different_data_are_told_at_once(
    runs: Runs, shards_dir: Path, image_folder: Path, tmp_path: Path
) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(shards_dir, fewer)
    (fewer / "manifest.json").unlink()
    for path in fewer.glob("shard-000003.*"):
        path.unlink()
    out = tmp_path / "unlike"
    assert runs.train(out, [shards_dir, fewer], ranks=2) == [2, 2], log_of(out).read_text()
    said = log_of(out).read_text()
    assert "the ranks were not started alike: rank 1 has data fingerprint" in said


def test_a_nan_on_one_rank_stops_all_and_names_it(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "nan"
    patch = """
from model.moco import MoCo
loss, calls = MoCo.loss, []
def poisoned(self, q, keys):
    calls.append(1)
    return loss(self, q * float("nan") if rank == 1 and len(calls) == 4 else q, keys)
MoCo.loss = poisoned
"""
    assert runs.train(out, shards_dir, ranks=2, patch=patch, save_every=2, log_every=5) == [1, 1]
    said = [line for line in log_of(out).read_text().splitlines() if "the loss is" in line]
    assert len(said) == 1
    assert "at step 3 on rank 1 (sample ids " in said[0]
    assert "step_00000002.pt" in said[0]


def test_generators_of_every_rank_are_kept(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    assert runs.train(out, shards_dir, ranks=2, max_steps=2) == [0, 0]
    rng = checkpoint.load(checkpoint.path_of(out, 2))["rng"]
    assert len(rng) == 2
    assert all(isinstance(state["torch"], torch.Tensor) for state in rng)
    assert all(np.isfinite(losses(out)))
