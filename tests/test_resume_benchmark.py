"""How benchmarks/resume.py counts, on sequences made by hand: no processes, no images."""

from collections.abc import Sequence

import pytest

from benchmarks.resume_counting import Row, compare, joined


def run_of(*steps: Sequence[int], first: int = 0, epoch_of: Sequence[int] = (0, 0, 1, 1), ranks: int = 1) -> list[Row]:
    """Rows of a run that gave `steps`, each dealt to its ranks; views of sample i in epoch e have checksum 10 i + e."""
    rows = []
    for step, ids in enumerate(steps, first):
        each = len(ids) // ranks
        for rank in range(ranks):
            mine = list(ids[rank * each : (rank + 1) * each])
            epoch = epoch_of[step]
            rows.append(Row(step, rank, ranks, epoch, mine, [10 * i + epoch for i in mine]))
    return rows


USUAL = run_of([3, 1], [0, 2], [0, 1], [2, 3])  # two epochs of four samples


def counts(given: Sequence[Row], usual: Sequence[Row] = USUAL, samples: int = 4, **more: bool) -> dict[str, int]:
    found = compare(usual, given, 0, samples=samples, epochs=2, **more)
    return {name: found[name] for name in found if found[name] and name not in ("batches", "samples")}


def test_the_same_on_other_ranks_counts_nothing() -> None:
    phases = [(0, run_of([3, 1], [0, 2], [0, 9])), (2, run_of([0, 1], [2, 3], first=2, ranks=2))]
    assert counts(joined(phases)) == {}


def test_what_came_after_the_save_is_forgotten_with_the_weights() -> None:
    torn = [
        (0, run_of([3, 1], [0, 2], [0, 1])),
        (2, run_of([0, 1], first=2)),
        (1, run_of([0, 2], [0, 1], [2, 3], first=1)),
    ]
    assert counts(joined(torn)) == {}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (([1, 3], [0, 2], [0, 1], [2, 3]), {"order_changed": 1}),
        (([3, 0], [1, 2], [0, 1], [2, 3]), {"order_changed": 2, "members_changed": 2}),
        (([3, 1], [3, 2], [0, 1], [2, 3]), {"lost": 1, "repeated": 1, "order_changed": 1, "members_changed": 1}),
        (([3, 1], [0, 2], [0, 1]), {"lost": 2, "order_changed": 1, "members_changed": 1}),
    ],
)
def test_each_kind_of_fault(steps: Sequence[Sequence[int]], expected: dict[str, int]) -> None:
    assert counts(run_of(*steps)) == expected


def test_a_batch_too_many_is_repeated() -> None:
    rows = run_of([3, 1], [0, 2], [0, 1], [2, 3], [2, 0], epoch_of=(0, 0, 1, 1, 1))
    assert counts(rows) == {"repeated": 2, "order_changed": 1, "members_changed": 1}


def test_other_pixels_are_seen_in_place_and_in_another_order() -> None:
    rows = list(USUAL)
    rows[1] = rows[1]._replace(views=[7, rows[1].views[1]])
    assert counts(rows) == {"views_changed": 1}
    rows[1] = rows[1]._replace(ids=rows[1].ids[::-1])
    assert counts(rows) == {"views_changed": 2, "order_changed": 1}


def test_the_rest_that_fills_no_batch_is_not_lost() -> None:
    five = run_of([3, 1], [0, 2], [4, 1], [2, 3])  # each epoch leaves one of five samples out
    assert counts(five, five, samples=5) == {}
    other = run_of([3, 1], [4, 2], [4, 1], [2, 3])  # leaves out another one
    assert counts(other, five, samples=5) == {"order_changed": 1, "members_changed": 1}
    assert counts(run_of([3, 1], [3, 2], [4, 1], [2, 3]), five, samples=5)["lost"] == 1


def test_a_mixture_gives_what_it_gives_uninterrupted() -> None:
    mixed = run_of([3, 3], [0, 2], [1, 1], [3, 3])
    assert counts(mixed, mixed, mixture=True) == {}
    found = counts(run_of([3, 3], [0, 2], [1, 1], [3, 2]), mixed, mixture=True)
    assert (found["lost"], found["repeated"]) == (1, 1)


def test_epochs_that_overlap_are_taken_together() -> None:
    rows = run_of([3, 1], [0, 1], [2, 0], [2, 3])  # 1 comes before the first epoch is over
    assert counts(rows)["repeated"] == 2
    assert "repeated" not in counts(rows, whole_run=True)


def test_a_rank_without_a_batch_is_uneven() -> None:
    rows = run_of([3, 1], [0, 2], [0, 1], [2, 3], ranks=2)
    assert counts(rows) == {}
    assert counts(rows[:-1])["uneven"] == 1
