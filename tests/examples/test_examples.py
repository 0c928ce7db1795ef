"""The examples run: a few steps of each, through the loaders that they are about."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY


def example(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY))
        specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_own_loop_ends_and_goes_on(shards_dir: Path, tmp_path: Path) -> None:
    own_loop, small = example("own_loop"), {"batch_size": 30, "image_size": 32}
    torch.manual_seed(0)
    first = own_loop.train(str(shards_dir), tmp_path / "own.pt", epochs=1, **small)
    then = own_loop.train(str(shards_dir), tmp_path / "own.pt", epochs=2, **small)
    assert (len(first), len(then)) == (2, 2)
    torch.manual_seed(0)
    at_once = own_loop.train(str(shards_dir), tmp_path / "other.pt", epochs=2, **small)
    np.testing.assert_allclose(first + then, at_once, rtol=1e-4)
    assert own_loop.train(str(shards_dir), tmp_path / "own.pt", epochs=2, **small) == []


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["ours", "lightly"])
def test_lightly_moco_trains_with_either_loader(loader: str, image_folder: Path, shards_dir: Path) -> None:
    moco = pytest.importorskip("lightly") and example("lightly_moco")
    how = {"epochs": 1, "batch_size": 20, "workers": 0, "seed": 1}
    if loader == "ours":
        batches = moco.our_batches(str(shards_dir), **how, views={"image_size": 32})
    else:
        batches = moco.lightly_batches(str(image_folder), **how, views={"input_size": 32})
    first, batches = itertools.tee(batches)
    query, key = next(first)
    assert query.shape == key.shape == (20, 3, 32, 32) and not torch.equal(query, key)
    model, losses = moco.train(batches, "test_resnet", lr=0.03, queue=64)
    assert len(losses) == 3 and np.isfinite(losses).all()
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), moco.MoCo("test_resnet").parameters())]
    assert any(moved) and all(p.grad is None for p in model.backbone_momentum.parameters())
