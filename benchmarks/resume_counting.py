"""Compares what a training was given, over all its kills, with what it should have been given: lists, no processes.

A row is one batch of one rank of `world`, with the sample ids and a checksum of each sample's views. Steps are counted
over the run. A training that continues from step s has forgotten everything that it was given from s on, the weights
with it: only the rows below s count of what was given before.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    step: int
    rank: int
    world: int
    epoch: int
    ids: list[int]
    views: list[int]


def joined(phases: Sequence[tuple[int, Sequence[Row]]]) -> list[Row]:
    """The rows that count: of each (first step, rows), those below every later first step; by step and rank."""
    rows: list[Row] = []
    for i, (_, given) in enumerate(phases):
        later = [first for first, _ in phases[i + 1 :]]
        rows += [row for row in given if not later or row.step < min(later)]
    return sorted(rows, key=lambda row: (row.step, row.rank))


def by_step(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rows of each step, in the order of its ranks."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.step, []).append(row)
    return found


def batches(rows: Iterable[Row]) -> dict[int, list[int]]:
    """The ids of each step, over its ranks in their order."""
    return {step: [i for row in given for i in row.ids] for step, given in by_step(rows).items()}


def missing_and_extra(rows: Sequence[Row], samples: int, epochs: int, whole_run: bool = False) -> list[tuple[int, int]]:
    """For each epoch: how many of the `samples` it did not give, and how many it gave too often. With `whole_run` one
    pair for all epochs, for systems that begin the next before the last is over."""
    given = [Counter(i for row in rows if row.epoch == epoch for i in row.ids) for epoch in range(epochs)]
    if whole_run:
        given = [sum(given, Counter())]
    once = Counter(dict.fromkeys(range(samples), epochs if whole_run else 1))
    return [((once - got).total(), (got - once).total()) for got in given]


def lost_and_repeated(
    usual: Sequence[Row], given: Sequence[Row], samples: int, epochs: int, *, mixture: bool, whole_run: bool
) -> tuple[int, int]:
    """Summed over epochs. In a mixture an epoch should give what it gives in the uninterrupted run `usual`; else each
    sample once, and what `usual` leaves out (the rest that fills no batch) or gives twice as well is taken off."""
    if mixture:
        epoch = [
            [Counter(i for r in rows if r.epoch == e for i in r.ids) for rows in (usual, given)] for e in range(epochs)
        ]
        return sum((want - got).total() for want, got in epoch), sum((got - want).total() for want, got in epoch)
    pairs = list(
        zip(missing_and_extra(usual, samples, epochs, whole_run), missing_and_extra(given, samples, epochs, whole_run))
    )
    return sum(max(0, got[0] - want[0]) for want, got in pairs), sum(max(0, got[1] - want[1]) for want, got in pairs)


def changed_views(before: Sequence[Row], after: Sequence[Row]) -> tuple[int, int]:
    """How many samples of `after` have other pixels than before, of how many that were given in the same epoch before.
    By place where a step's samples stand in the same order, else by epoch and sample."""
    known: dict[tuple[int, int], set[int]] = {}
    for row in before:
        for i, view in zip(row.ids, row.views):
            known.setdefault((row.epoch, i), set()).add(view)
    there = by_step(before)
    changed = compared = 0
    for step, here in by_step(after).items():
        order, usual = ([i for row in rows for i in row.ids] for rows in (here, there.get(step, [])))
        if order == usual:
            compared += len(order)
            had, has = ([view for row in rows for view in row.views] for rows in (there[step], here))
            changed += sum(a != b for a, b in zip(had, has))
            continue
        for row in here:
            pairs = [((row.epoch, i), view) for i, view in zip(row.ids, row.views) if (row.epoch, i) in known]
            compared += len(pairs)
            changed += sum(view not in known[key] for key, view in pairs)
    return changed, compared


def compare(
    uninterrupted: Sequence[Row],
    given: Sequence[Row],
    first_resumed: int,
    *,
    samples: int,
    epochs: int,
    mixture: bool = False,
    whole_run: bool = False,
) -> dict[str, int]:
    """Counts over a run that was killed, `given` as from `joined`: samples lost and repeated; and from step
    `first_resumed` on, where it first continued: batches with the samples in another order or with other samples,
    samples whose views have other pixels, and steps that some ranks had a batch for and others not."""
    lost, repeated = lost_and_repeated(uninterrupted, given, samples, epochs, mixture=mixture, whole_run=whole_run)
    after = [row for row in given if row.step >= first_resumed]
    want = {step: ids for step, ids in batches(uninterrupted).items() if step >= first_resumed}
    got = batches(after)
    steps = want.keys() | got.keys()
    changed, compared = changed_views(uninterrupted, after)
    return {
        "lost": lost,
        "repeated": repeated,
        "batches": len(steps),
        "order_changed": sum(want.get(s) != got.get(s) for s in steps),
        "members_changed": sum(sorted(want.get(s, [])) != sorted(got.get(s, [])) for s in steps),
        "samples": compared,
        "views_changed": changed,
        "uneven": uneven(given),
    }


def uneven(rows: Iterable[Row]) -> int:
    """Steps at which some rank had no batch while another had: a training with DDP would wait there for ever."""
    return sum(len(given) < max(row.world for row in given) for given in by_step(rows).values())
