"""Which sample comes when: pure arithmetic from (seed, epoch, step), no I/O, nothing kept per sample.

1. The shards of a source are permuted by (seed, epoch) and laid end to end: positions 0 .. N-1.
2. Lane l takes the contiguous range of positions that belongs to its slots of the batch.
3. A lane is cut into chunks of `chunk_shards` shards; the samples of a chunk are permuted among themselves. A chunk as
   large as the lane is a true global shuffle, a small one streams.
4. Slot j of batch t takes position t*n + (j - f) of its lane, which has n slots from f on; rank r of R takes slots
   [r*B/R, (r+1)*B/R). So the global sequence does not depend on R, and resuming is setting the step.
5. A mixture deals the slots of a lane to its sources by a periodic table (weighted round robin); how many slots a
   source had before any point is a closed form, and each source runs through epochs of its own.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.permutation import Ints, fold_key, permute
from pipeline.sources.manifest import Source

LONGEST_PERIOD = 10_000  # weights are met to 1/10,000; decimal percentages exactly


class Draw(NamedTuple):
    """Where n samples lie, int64 [n] each; `epochs` is the component source's own epoch and keys the views."""

    manifest: Ints
    shard: Ints
    row: Ints
    sample_ids: Ints
    epochs: Ints


class Order:
    """The order of one source or of a weighted mixture. Memory and start-up grow with shards only.

    lane      a part of every source, with shards of its own; the lanes are read side by side
    slot      the place of a sample in the global batch, 0 to batch_size - 1; each slot belongs to one lane
    turn      how many samples a lane gave to the run before this one, of all sources together
    phase     where in the mixture's table a lane begins
    ordinal   how many samples a source gave in this lane before this one; it decides source epoch and position

    `shard_samples` holds one list of per-shard counts for each manifest. With one source an epoch is `N // batch_size`
    steps and leaves out less than a batch; in a mixture that number of steps is the length of the run's nominal epoch,
    while each source uses all of its samples once in every epoch of its own.
    """

    def __init__(
        self,
        shard_samples: Sequence[Sequence[int] | Ints],
        *,
        weights: Sequence[float] = (1.0,),
        batch_size: int,
        seed: int,
        lanes: int = 1,
        chunk_shards: int | None = None,
    ) -> None:
        self.counts = [np.asarray(c, np.int64) for c in shard_samples]
        self.totals = np.array([int(c.sum()) for c in self.counts], np.int64)
        self.batch_size, self.seed, self.lanes, self.chunk_shards = batch_size, seed, lanes, chunk_shards
        samples = int(self.totals.sum())
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 1 <= lanes <= batch_size:
            raise ValueError(f"lanes is {lanes}; it must lie between 1 and batch_size ({batch_size})")
        if chunk_shards is not None and chunk_shards < 1:
            raise ValueError(f"chunk_shards is {chunk_shards}; it must be at least 1")
        if samples < batch_size:
            raise ValueError(
                f"the source holds {samples} samples, less than one batch of {batch_size}: lower batch_size"
            )
        if len(weights) != len(self.counts):
            raise ValueError(f"{len(weights)} weights for {len(self.counts)} sources")
        self.steps_per_epoch = samples // batch_size
        self.rest = samples % batch_size if len(self.counts) == 1 else 0  # what an epoch's steps leave out

        lane = np.arange(lanes + 1, dtype=np.int64)
        edges = -(-lane * batch_size // lanes)  # slot j is lane j*lanes//B's
        self._first, self._slots = edges[:-1], np.diff(edges)
        # Exact Python ints: N * B passes 2^63 for the largest sources.
        self._ranges = [
            np.array([total * int(edge) // batch_size for edge in edges], np.int64) for total in self.totals.tolist()
        ]
        if len(self.counts) == 1:
            self._usable = [self._slots * self.steps_per_epoch]
        else:
            self._usable = [np.diff(r) for r in self._ranges]
            if min(int(u.min()) for u in self._usable) < 1:
                raise ValueError(
                    f"a source of {int(self.totals.min())} samples is too small for {lanes} lanes: fewer lanes"
                )
        self._table = _round_robin(weights)
        period = len(self._table)
        self._before = np.zeros((len(self.counts), period + 1), np.int64)
        for m in range(len(self.counts)):
            np.cumsum(self._table == m, out=self._before[m, 1:])
        # Lanes start at different places of the table, so that the sources are mixed at every step, not only over time.
        self._phase = lane[:-1] * period // lanes
        self._id_offsets = np.concatenate([[0], np.cumsum(self.totals)])
        self._shard_offsets = [np.concatenate([[0], np.cumsum(c)]) for c in self.counts]
        self._layout = functools.lru_cache(maxsize=4 * len(self.counts))(self._lay_out)

    def draw(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> Draw:
        """The samples of step `step` of `epoch` for one rank. ValueError when the step or the ranks do not fit."""
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {world_size} ranks: use a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to {world_size - 1}")
        if not 0 <= step < self.steps_per_epoch or epoch < 0:
            raise ValueError(f"epoch {epoch}, step {step}: an epoch has steps 0 to {self.steps_per_epoch - 1}")
        share = self.batch_size // world_size
        slots = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
        lane = slots * self.lanes // self.batch_size
        turn = (epoch * self.steps_per_epoch + step) * self._slots[lane] + slots - self._first[lane]
        source, ordinal = self._deal(lane, turn)
        shard, row, epochs = (np.empty(share, np.int64) for _ in range(3))
        ids = np.empty(share, np.int64)
        for m in range(len(self.counts)):
            mine = np.flatnonzero(source == m)
            usable = self._usable[m][lane[mine]]
            own_epoch = ordinal[mine] // usable
            epochs[mine] = own_epoch
            for e in np.unique(own_epoch).tolist():
                chosen = mine[own_epoch == e]
                position = ordinal[chosen] - e * self._usable[m][lane[chosen]]
                shard[chosen], row[chosen] = self._locate(m, e, lane[chosen], position)
            ids[mine] = self._id_offsets[m] + self._shard_offsets[m][shard[mine]] + row[mine]
        return Draw(source, shard, row, ids, epochs)

    def draw_rest(self, epoch: int, rank: int = 0, world_size: int = 1) -> Draw:
        """One rank's share of the `rest` samples that the steps of `epoch` leave out. The first ones come twice where
        the ranks do not divide them, so that every rank has as many (as torch's DistributedSampler does).
        """
        left = np.diff(self._ranges[0]) - self._usable[0]  # of each lane
        lane = np.repeat(np.arange(self.lanes, dtype=np.int64), left)
        position = self._usable[0][lane] + np.arange(self.rest) - np.repeat(np.cumsum(left) - left, left)
        share = -(-self.rest // world_size)
        mine = np.arange(rank * share, (rank + 1) * share) % self.rest
        shard, row = self._locate(0, epoch, lane[mine], position[mine])
        zeros = np.zeros(share, np.int64)
        return Draw(zeros, shard, row, self._shard_offsets[0][shard] + row, zeros + epoch)

    def source_counts(self, steps: int) -> list[int]:
        """How many samples each source gave to all ranks together in the run's first `steps` steps."""
        turn = steps * self._slots
        counts = []
        for m in range(len(self.counts)):
            counts.append(int((self._count(m, turn + self._phase) - self._count(m, self._phase)).sum()))
        return counts

    def chunks_at(self, epoch: int, step: int, rank: int, world_size: int) -> Ints:
        """The chunks in which this rank's lanes end this step, int64 [n, 4]: manifest, lane, the manifest's own epoch,
        chunk. While they stay the same, `upcoming_shards` of the first such step holds what is needed: a step may run
        through several small chunks, but one that ends where the step before it ended lies in that chunk."""
        share = self.batch_size // world_size
        slots = np.array([rank * share, (rank + 1) * share - 1])  # a rank's lanes lie between its first and its last
        first_lane, last_lane = (slots * self.lanes // self.batch_size).tolist()
        lanes = np.arange(first_lane, last_lane + 1, dtype=np.int64)
        end = (epoch * self.steps_per_epoch + step + 1) * self._slots[lanes] + self._phase[lanes]
        chunks = []
        for m in range(len(self.counts)):
            ordinal = np.maximum(self._count(m, end) - self._count(m, self._phase[lanes]) - 1, 0)
            own_epoch, position = np.divmod(ordinal, self._usable[m][lanes])
            chunk = np.empty_like(lanes)
            for e in np.unique(own_epoch).tolist():
                mine = own_epoch == e
                chunk[mine] = self._chunk_of(m, e, lanes[mine], position[mine])[1]
            chunks.append(np.stack([np.full_like(lanes, m), lanes, own_epoch, chunk], 1))
        return np.concatenate(chunks)

    def upcoming_shards(self, epoch: int, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """The (manifest, shard) pairs that this rank needs from this step on, soonest first: those of the step, then
        the chunk in which each of its lanes ends it, then the next chunk of each."""
        draw = self.draw(epoch, step, rank, world_size)
        found = dict.fromkeys(zip(draw.manifest.tolist(), draw.shard.tolist()))
        following = []
        for m, lane, own_epoch, chunk in self.chunks_at(epoch, step, rank, world_size).tolist():
            shards, is_last = self._shards_of_chunk(m, lane, own_epoch, chunk)
            found.update(dict.fromkeys((m, shard) for shard in shards))
            following.append((m, lane, own_epoch + 1, 0) if is_last else (m, lane, own_epoch, chunk + 1))
        for m, lane, own_epoch, chunk in following:
            found.update(dict.fromkeys((m, shard) for shard in self._shards_of_chunk(m, lane, own_epoch, chunk)[0]))
        return list(found)

    def _chunk_of(self, m: int, epoch: int, lane: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Place of each lane's first shard in one epoch of source m, and the number of the chunk that holds its
        position."""
        starts = self._layout(m, epoch)[1]
        begin = self._ranges[m][lane]
        first = np.searchsorted(starts, begin, side="right") - 1
        return first, (np.searchsorted(starts, begin + position, side="right") - 1 - first) // self._chunk(m)

    def _shards_of_chunk(self, m: int, lane: int, epoch: int, chunk: int) -> tuple[list[int], bool]:
        """The shards of a chunk that have samples, and whether the lane's epoch ends with it."""
        shards, starts = self._layout(m, epoch)
        begin, end = self._ranges[m][lane : lane + 2].tolist()
        used = begin + int(self._usable[m][lane])
        first, last_used, last = (np.searchsorted(starts, [begin, used - 1, end - 1], side="right") - 1).tolist()
        low = first + chunk * self._chunk(m)
        high = low + self._chunk(m)
        return [s for s in shards[low : min(high, last + 1)].tolist() if self.counts[m][s]], high > last_used

    def _deal(self, lane: Ints, turn: Ints) -> tuple[Ints, Ints]:
        """Which source turn `turn` of a lane belongs to, and how many turns of that lane the source had before."""
        phase = self._phase[lane]
        source = self._table[(turn + phase) % len(self._table)]
        ordinal = np.empty_like(turn)
        for m in range(len(self.counts)):
            mine = source == m
            ordinal[mine] = self._count(m, (turn + phase)[mine]) - self._count(m, phase[mine])
        return source, ordinal

    def _count(self, m: int, turn: Ints) -> Ints:
        """Turns of source m among the first `turn` entries of the endless table."""
        whole, rest = np.divmod(turn, len(self._table))
        return whole * self._before[m, -1] + self._before[m, rest]

    def _chunk(self, m: int) -> int:
        return self.chunk_shards or len(self.counts[m])

    def _lay_out(self, m: int, epoch: int) -> tuple[Ints, Ints]:
        """The permuted shards of an epoch, and the position of each one's first sample (one more at the end)."""
        shards = permute(
            np.arange(len(self.counts[m]), dtype=np.int64), len(self.counts[m]), fold_key(self.seed, epoch, m, -1)
        )
        return shards, np.concatenate([[0], np.cumsum(self.counts[m][shards])])

    def _locate(self, m: int, epoch: int, lane: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Shard and row of the given positions of lanes in one epoch of source m."""
        shards, starts = self._layout(m, epoch)
        begin, end = self._ranges[m][lane], self._ranges[m][lane + 1]
        absolute = begin + position
        first, chunk = self._chunk_of(m, epoch, lane, position)
        low_shard = first + chunk * self._chunk(m)
        low = np.maximum(begin, starts[low_shard])
        high = np.minimum(end, starts[np.minimum(low_shard + self._chunk(m), len(shards))])
        absolute = low + permute(absolute - low, high - low, fold_key(self.seed, epoch, m, lane, chunk))
        at = np.searchsorted(starts, absolute, side="right") - 1
        return shards[at], absolute - starts[at]


def _round_robin(weights: Sequence[float]) -> Ints:
    """A period of the weighted round robin: entry t is the source of turn t, each source spread evenly."""
    if any(not w > 0 for w in weights):
        raise ValueError(f"weights {list(weights)}: each must be positive")
    shares = np.asarray(weights, np.float64) / sum(weights)
    for period in range(len(weights), LONGEST_PERIOD + 1):
        counts = np.rint(shares * period).astype(np.int64)
        if counts.min() >= 1 and np.abs(shares * period - counts).max() < 1e-9 * period:
            break
    else:
        counts = np.maximum(1, np.rint(shares * LONGEST_PERIOD).astype(np.int64))
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]


def make_order(source: Source, batch_size: int, seed: int) -> Order:
    """The order in which a run reads `source`; ValueError when it holds less than a batch."""
    counts = [np.fromiter((s.samples for s in m.shards), np.int64, len(m.shards)) for m in source.manifests]
    return Order(
        counts,
        weights=source.weights,
        batch_size=batch_size,
        seed=seed,
        lanes=min(source.lanes, batch_size),
        chunk_shards=source.chunk_shards,
    )


def spread(samples: int, wanted: int, runs: int, rank: int = 0, world_size: int = 1) -> list[range]:
    """One rank's part of `wanted` ids from all over a source, in `runs` runs of neighbours, which are cheap to read; of
    all ids where there are fewer."""
    wanted = min(wanted, samples)
    runs = min(runs, wanted)
    found = []
    for run in range(runs):
        begin, length = samples * run // runs, wanted * (run + 1) // runs - wanted * run // runs
        low, high = (length * r // world_size for r in (rank, rank + 1))
        found.append(range(begin + low, begin + high))
    return found


def draw_of_ids(source: Source, ids: Ints, epoch: int = 0) -> Draw:
    """Where the samples with these ids lie."""
    m = np.searchsorted(source.id_offsets, ids, side="right") - 1
    shard, row = np.empty_like(ids), np.empty_like(ids)
    for one in np.unique(m).tolist():
        mine = m == one
        offsets = source.manifests[one].offsets
        local = ids[mine] - source.id_offsets[one]
        shard[mine] = np.searchsorted(offsets, local, side="right") - 1
        row[mine] = local - offsets[shard[mine]]
    return Draw(m, shard, row, ids, np.full(len(ids), epoch, np.int64))
