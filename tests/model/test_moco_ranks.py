"""Two and four real processes over gloo give what one process with as many batch-norm groups gives."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from moco_runs import BATCH, QUEUE, of_ranks, train
from test_moco import algorithm_1

pytestmark = pytest.mark.process

WORLDS = [2, 4]
alone = cache(train)


def assert_same_training(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    mean = torch.stack([r["losses"] for r in ranks]).mean(dim=0)
    torch.testing.assert_close(mean, one["losses"], rtol=0, atol=1e-5)
    for name in ("gradients", "queues", "parameters", "key_parameters"):
        for r in ranks:
            torch.testing.assert_close(r[name], one[name], rtol=1e-4, atol=1e-5)
    assert all(r["queue_ptr"] == one["queue_ptr"] for r in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("scenario", "mechanism", "groups", "options"),
    [
        ("moco", "moco", 1, {"steps": 20}),
        ("both", "moco", 2, {}),  # split BN on each rank, shuffled across all
        ("end_to_end", "end_to_end", 1, {}),
        ("memory_bank", "memory_bank", 1, {}),
    ],
)
def test_ranks_equal_one_process(
    scenario: str, mechanism: str, groups: int, options: dict[str, int], world: int
) -> None:
    """Losses, gradients, parameters and dictionaries; gradients too of keys that other ranks use as negatives."""
    ranks = [r[scenario] for r in of_ranks(world)]
    assert_same_training(ranks, alone(mechanism, groups=groups * world, **options))


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_twenty_losses_of_algorithm_1_on_ranks(world: int) -> None:
    ours = torch.stack([r["moco"]["losses"] for r in of_ranks(world)]).mean(dim=0)
    np.testing.assert_allclose(ours.numpy(), algorithm_1(world, 20), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", ["moco", "both", "accumulate", "memory_bank"])
def test_queue_and_parameters_identical_on_all_ranks(scenario: str, world: int) -> None:
    """To the bit, after every step."""
    first, *others = (r[scenario] for r in of_ranks(world))
    for other in others:
        for name in ("queues", "parameters", "key_parameters"):
            assert all(torch.equal(a, b) for a, b in zip(first[name], other[name])), name
        assert torch.equal(first["queue_ptr"], other["queue_ptr"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_accumulation_on_ranks_is_one_batch(world: int) -> None:
    """Two micro-batches a rank, without batch norm: as one process with the whole batch, the queue in global order."""
    assert_same_training(
        [r["accumulate"] for r in of_ranks(world)], alone("moco", groups=1, batchnorm=False, accumulate=1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_shuffle_keeps_dtype_and_layout(world: int) -> None:
    for r in of_ranks(world):
        assert all(r["shuffles"]["kinds"].values()), r["shuffles"]["kinds"]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_shuffled_batches_of_all_ranks_are_a_permutation(world: int) -> None:
    tags = torch.cat([r["shuffles"]["tags"] for r in of_ranks(world)], dim=1)
    assert torch.equal(tags.sort(dim=1).values, torch.arange(world * BATCH).expand(len(tags), -1))
    assert len({tuple(row) for row in tags.tolist()}) == len(tags), "every step has its own permutation"


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_keys_that_are_not_finite_stay_out_on_all_ranks(world: int) -> None:
    expected = [10.0 * rank + i for rank in range(world) for i in range(4) if (rank, i) != (1, 1)]
    for r in of_ranks(world):
        result = r["non_finite"]
        assert result["queue"][: len(expected)].tolist() == expected
        assert result["ptr"] == result["filled"] == len(expected) < QUEUE


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_check_names_the_rank_and_the_tensor(world: int) -> None:
    for r in of_ranks(world):
        assert f"rank {world - 1}: queue" in r["check"] and "last checkpoint" in r["check"]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_gathered_rows_get_the_gradients_of_all_ranks(world: int) -> None:
    factor = world * (world + 1) / 2
    for rank, r in enumerate(of_ranks(world)):
        assert r["gather_gradient"][:, 0].tolist() == [2 * rank * factor, (2 * rank + 1) * factor]
