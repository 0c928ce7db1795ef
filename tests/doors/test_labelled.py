"""Batches with labels: every sample once for evaluation, a shuffled stream without end for a classifier."""

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.labelled import LabelledBatch, batches_per_epoch, eval_batches, train_batches
from pipeline.reading.order import Order, make_order
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source

SMALL: dict[str, Any] = {"image_size": 32, "batch_size": 12, "num_threads": 1}  # of 60 samples: 5 steps an epoch


@pytest.fixture(scope="module")
def source(shards_dir: Path) -> Source:
    return open_source(str(shards_dir))


def take(source: Source, count: int, **settings: Any) -> list[LabelledBatch]:
    """Copies of the first batches."""
    batches = train_batches(source, **SMALL | settings)
    return [LabelledBatch(*(tensor.clone() for tensor in batch)) for batch in islice(batches, count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_holds_every_sample_once(source: Source, world_size: int) -> None:
    ids, labels, images = [], [], []
    for rank in range(world_size):
        settings: dict[str, Any] = {"batch_size": 7, "rank": rank, "world_size": world_size, "num_threads": 1}
        batches = list(eval_batches(source, image_size=32, resize=36, **settings))
        assert all(len(batch.images) == 7 for batch in batches[:-1])
        ids += [i for batch in batches for i in batch.sample_ids.tolist()]
        labels += [i for batch in batches for i in batch.labels.tolist()]
        images += [batch.images for batch in batches]
    assert ids == list(range(60))
    assert np.bincount(labels).tolist() == [20, 20, 20]
    assert torch.cat(images).shape == (60, 3, 32, 32)


def test_evaluation_may_be_left_early(source: Source) -> None:
    before = set(threading.enumerate())
    batches = eval_batches(source, image_size=32, resize=36, batch_size=7, num_threads=1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_training_takes_the_order_of_the_seed_and_the_samples_own_labels(source: Source) -> None:
    label_of = {
        i: label
        for batch in eval_batches(source, image_size=32, resize=36, batch_size=30, num_threads=1)
        for i, label in zip(batch.sample_ids.tolist(), batch.labels.tolist())
    }
    order, batches = make_order(source, 12, 4), take(source, 11, seed=4)
    for at, batch in enumerate(batches):  # over two ends of an epoch
        epoch, step = divmod(at, 5)
        assert batch.sample_ids.tolist() == order.draw(epoch, step).sample_ids.tolist()
        assert batch.labels.tolist() == [label_of[i] for i in batch.sample_ids.tolist()]
        assert batch.images.shape == (12, 3, 32, 32)


def test_training_crops_follow_seed_and_epoch_not_the_ranks_or_a_restart(source: Source) -> None:
    whole = take(source, 7, seed=1)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], take(source, 3, seed=1, start=4)))
    halves = [take(source, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for step in range(2):
        assert torch.equal(whole[step].images, torch.cat([half[step].images for half in halves]))
    crop_of = {i: x for b in whole[:5] for i, x in zip(b.sample_ids.tolist(), b.images)}
    again = {i: x for b in whole[5:] for i, x in zip(b.sample_ids.tolist(), b.images)}
    assert len(again) == 24 and not any(torch.equal(crop_of[i], x) for i, x in again.items())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_last_batch_of_an_epoch_is_kept(source: Source, world_size: int) -> None:
    """60 samples in batches of 18 are 3 steps and a rest of 6, as torch's DataLoader without drop_last has it."""
    settings: dict[str, Any] = {"batch_size": 18, "seed": 3, "world_size": world_size}
    assert batches_per_epoch(make_order(source, 18, 3)) == 4
    shares = [take(source, 8, rank=rank, **settings) for rank in range(world_size)]
    for epoch in range(2):
        ids = [[i for s in shares for i in s[4 * epoch + step].sample_ids.tolist()] for step in range(4)]
        assert [len(batch) for batch in ids] == [18, 18, 18, 6]
        assert sorted(i for batch in ids for i in batch) == list(range(60))
        again = take(source, 1, start=4 * epoch + 3, rank=0, **settings)[0]
        assert torch.equal(again.images, shares[0][4 * epoch + 3].images)


def test_imagenet_has_the_references_5005_steps() -> None:
    assert batches_per_epoch(Order([[1_281_167]], batch_size=256, seed=0)) == 5005


def test_training_arguments_that_do_not_fit(source: Source) -> None:
    with pytest.raises(ValueError, match="not divisible by 5"):
        next(train_batches(source, world_size=5, **SMALL))
    with pytest.raises(ValueError, match="less than one batch of 64"):
        next(train_batches(source, **SMALL | {"batch_size": 64}))
