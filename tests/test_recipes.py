"""Every published recipe trains: two steps of each with a small encoder and few, small images."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from training import Runs, log_of, losses, metrics

import recipe as recipes
from trainer.run_views import comparable

NAMES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


def test_the_published_ones_are_here() -> None:
    wanted = "moco_v1_r50 moco_v2_r50 moco_v2_r50_800ep moco_v1_r50w2x moco_v1_r50w4x moco_v1_rx50 moco_v1_ig1b"
    assert set(f"{wanted} in100_r50 cifar10_r18 cifar10_r18_symmetric letters".split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_recipe(name: str, runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    path = REPOSITORY / "recipes" / f"{name}.yaml"
    r = recipes.load(path)
    out = tmp_path / name
    shrunken = {"arch": "resnet18", "width": 1, "image_size": 32, "queue_size": 64, "num_threads": 1, "max_steps": 2}
    batch = {"batch_size": 2 * min(r.bn_groups, 8), "bn_groups": min(r.bn_groups, 8), "log_every": 1, "trackers": "[]"}
    assert runs.train(out, shards_dir, recipe=path, **shrunken | batch) == [0], log_of(out).read_text()
    assert len(losses(out)) == 2
    assert all(np.isfinite(losses(out)))
    begin = r.lr  # no recipe warms up
    if r.schedule == "cosine_from_1":  # the CIFAR-10 demo's first epoch is its number 1
        begin *= 0.5 * (1 + math.cos(math.pi / r.epochs))
    assert metrics(out)[0]["lr"] == begin
    ran = recipes.load(out / "recipe.yaml")
    assert comparable(ran) == comparable(r)
    kept = "mlp symmetric temperature crop_min epochs lr schedule milestones decay decay_steps moco_momentum"
    assert all(getattr(ran, field) == getattr(r, field) for field in kept.split())
