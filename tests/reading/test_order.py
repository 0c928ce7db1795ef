"""The order: coverage, elasticity, random access, lanes, chunks, mixtures, and what it costs at a billion samples."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.permutation import fold_key, permute
from pipeline.reading.ahead import ShardsAhead
from pipeline.reading.order import Order
from pipeline.sources.manifest import Manifest, Shard, Source

seeds = st.integers(-(2**63), 2**64 - 1)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = draw(st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(lambda c: sum(c) > 0))
    batch_size = draw(st.integers(1, min(24, sum(counts))))
    lanes = draw(st.integers(1, batch_size))
    chunk = draw(st.one_of(st.none(), st.integers(1, 5)))
    return Order([counts], batch_size=batch_size, seed=draw(seeds), lanes=lanes, chunk_shards=chunk)


def epoch_ids(order: Order, epoch: int, world_size: int = 1) -> np.ndarray:
    """[steps, B], from the ranks' shares laid side by side."""
    return np.stack(
        [
            np.concatenate([order.draw(epoch, step, rank, world_size).sample_ids for rank in range(world_size)])
            for step in range(order.steps_per_epoch)
        ]
    )


@given(order=orders(), epoch=st.integers(0, 3), world_size=st.integers(1, 5))
def test_the_rest_is_what_the_steps_leave_out(order: Order, epoch: int, world_size: int) -> None:
    steps = epoch_ids(order, epoch).ravel().tolist()
    assert order.rest == order.totals[0] % order.batch_size
    if not order.rest:
        assert sorted(steps) == list(range(order.totals[0]))
        return
    shares = [order.draw_rest(epoch, rank, world_size).sample_ids.tolist() for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-order.rest // world_size)}
    rest = [i for share in shares for i in share]
    assert rest[order.rest :] == [rest[i % order.rest] for i in range(order.rest, len(rest))]
    assert sorted(steps + rest[: order.rest]) == list(range(order.totals[0]))


@given(n=st.integers(1, 2000), key=seeds)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 2**62), key=seeds, data=st.data())
def test_permute_stays_inside_huge_domains(n: int, key: int, data: st.DataObject) -> None:
    index = np.unique(np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.int64))
    image = permute(index, n, key)
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)


def test_permute_takes_every_element_everywhere() -> None:
    """Over many keys each place of [0, n) is hit alike: chi-square within five sigma, for small, odd and larger n."""
    for n in (2, 3, 5, 12, 50):
        keys = fold_key(7, np.arange(20_000))
        for index in (0, n - 1):
            hits = np.bincount(permute(np.full(20_000, index), n, keys), minlength=n)
            chi2 = ((hits - 20_000 / n) ** 2 / (20_000 / n)).sum()
            assert chi2 < (n - 1) + 5 * np.sqrt(2 * (n - 1)), (n, index, hits)


def test_permute_leaves_neighbours_unrelated() -> None:
    image = permute(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(image)) == 1) < 1e-3


@given(order=orders())
def test_each_sample_at_most_once_and_less_than_a_batch_left_out(order: Order) -> None:
    samples = int(order.counts[0].sum())
    for epoch in (0, 3):
        ids = epoch_ids(order, epoch)
        assert ids.shape == (samples // order.batch_size, order.batch_size)
        assert len(np.unique(ids)) == ids.size
        assert ids.min() >= 0 and ids.max() < samples


@given(order=orders())
def test_the_sequence_is_the_same_for_every_world_size(order: Order) -> None:
    whole = epoch_ids(order, 1)
    for world_size in range(2, order.batch_size + 1):
        if order.batch_size % world_size == 0:
            assert np.array_equal(epoch_ids(order, 1, world_size), whole)


@given(order=orders())
def test_ids_are_positions_in_the_manifest(order: Order) -> None:
    starts = np.concatenate([[0], np.cumsum(order.counts[0])])
    draw = order.draw(2, order.steps_per_epoch - 1)
    assert np.array_equal(starts[draw.shard] + draw.row, draw.sample_ids)
    assert (draw.row < order.counts[0][draw.shard]).all()
    assert (draw.epochs == 2).all() and (draw.manifest == 0).all()


def test_any_step_can_be_asked_for_first() -> None:
    def make() -> Order:
        return Order([[100] * 50], batch_size=64, seed=3, lanes=4, chunk_shards=3)

    forwards = make()
    for epoch in range(3):
        for step in range(forwards.steps_per_epoch):
            forwards.draw(epoch, step)
    assert np.array_equal(make().draw(2, 17).sample_ids, forwards.draw(2, 17).sample_ids)


def test_epochs_seeds_and_lanes_differ() -> None:
    first = Order([[100] * 50], batch_size=100, seed=0)
    assert not np.array_equal(first.draw(0, 0).sample_ids, first.draw(1, 0).sample_ids)
    assert not np.array_equal(
        first.draw(0, 0).sample_ids, Order([[100] * 50], batch_size=100, seed=1).draw(0, 0).sample_ids
    )
    # One sample meets different others in every epoch.
    mates = [next(set(ids.tolist()) for ids in epoch_ids(first, e) if 7 in ids) for e in range(2)]
    assert len(mates[0] & mates[1]) < 10


def test_a_lane_reads_its_own_shards_chunk_by_chunk() -> None:
    order = Order([[10] * 24], batch_size=12, seed=5, lanes=3, chunk_shards=2)
    seen: list[list[int]] = [[], [], []]
    for step in range(order.steps_per_epoch):
        draw = order.draw(0, step)
        for lane in range(3):
            seen[lane] += draw.shard[4 * lane : 4 * lane + 4].tolist()
    assert not set(seen[0]) & set(seen[1]) and not set(seen[1]) & set(seen[2])
    for lane in seen:
        chunks = [lane[i : i + 20] for i in range(0, len(lane), 20)]
        assert all(len(set(chunk)) == 2 for chunk in chunks)
        assert len(set(lane)) == 8


def test_a_source_sorted_by_class_comes_out_mixed() -> None:
    """100 classes in 100 shards, sorted. Same-class pairs in a batch: near 1 % when shuffled, 100 % when not."""
    for lanes, chunk, most in ((1, None, 1.15), (8, 8, 2.0)):
        order = Order([[200] * 100], batch_size=256, seed=0, lanes=lanes, chunk_shards=chunk)
        shares = []
        for step in range(order.steps_per_epoch):
            counts = np.bincount(order.draw(0, step).shard, minlength=100)
            shares.append((counts * (counts - 1)).sum() / (256 * 255))
        assert np.mean(shares) < most / 100, (lanes, chunk, np.mean(shares))


def needed_shards(order: Order, at: int, steps: int, rank: int, world_size: int) -> dict[tuple[int, int], None]:
    """What a rank reads from the run's step `at` on, in order."""
    needed: dict[tuple[int, int], None] = {}
    for step in range(at, at + steps):
        draw = order.draw(*divmod(step, order.steps_per_epoch), rank, world_size)
        needed.update(dict.fromkeys(zip(draw.manifest.tolist(), draw.shard.tolist())))
    return needed


def test_upcoming_shards_come_soonest_first() -> None:
    order = Order([[10] * 60], batch_size=8, seed=2, lanes=2, chunk_shards=3)
    for rank, world_size, epoch, step in ((0, 1, 0, 0), (1, 2, 0, 7), (0, 2, 1, 70)):
        ahead = order.upcoming_shards(epoch, step, rank, world_size)
        assert len(ahead) == len(set(ahead)) and len(ahead) <= 12 // world_size + 2
        needed = needed_shards(order, epoch * order.steps_per_epoch + step, 7, rank, world_size)
        assert set(list(needed)[: 6 // world_size]) <= set(ahead[:6])
        assert set(needed) <= set(ahead)  # 7 steps need less than a chunk of each lane


def test_upcoming_shards_of_a_small_source_end() -> None:
    order = Order([[10] * 3], batch_size=8, seed=2)
    assert sorted(order.upcoming_shards(0, 0, 0, 1)) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("seed", range(6))
def test_a_step_through_several_chunks_is_listed_whole(seed: int) -> None:
    """Four samples, one, four; three a step: the second step begins in the chunk of the first and ends two further."""
    order = Order([[4, 1, 4]], batch_size=3, seed=seed, chunk_shards=1)
    chunks, ahead = None, set()
    for step in range(6):
        at = divmod(step, order.steps_per_epoch)
        if (now := order.chunks_at(*at, 0, 1).tolist()) != chunks:
            chunks, ahead = now, set(order.upcoming_shards(*at, 0, 1))
        assert set(needed_shards(order, step, 1, 0, 1)) <= ahead


@given(order=orders(), data=st.data())
def test_shards_listed_once_a_chunk_are_there_for_every_step(order: Order, data: st.DataObject) -> None:
    world_size = data.draw(st.sampled_from([w for w in range(1, order.batch_size + 1) if order.batch_size % w == 0]))
    rank = data.draw(st.integers(0, world_size - 1))
    chunks, ahead, lists = None, set(), 0
    for step in range(3 * order.steps_per_epoch):
        at = divmod(step, order.steps_per_epoch)
        now = order.chunks_at(*at, rank, world_size).tolist()
        if now != chunks:
            chunks, ahead, lists = now, set(order.upcoming_shards(*at, rank, world_size)), lists + 1
        assert set(needed_shards(order, step, 1, rank, world_size)) <= ahead
    lane_chunks = sum(-(-len(order.counts[0]) // (order.chunk_shards or 99)) + 2 for _ in range(order.lanes))
    assert lists <= 3 * lane_chunks


@pytest.mark.parametrize(
    ("counts", "lanes", "chunk", "batch_size", "world_size"),
    [
        ([1281], 1, None, 64, 1),
        ([107] * 12, 8, 74, 64, 1),
        ([40] * 75, 8, 350, 64, 1),
        ([1000] * 94_000, 8, 2, 256, 8),
        ([1000] * 94_000, 64, 1000, 4096, 64),
    ],
    ids=["1 shard", "12 shards", "75 small shards", "94,000 shards", "94,000 shards in large chunks"],
)
def test_looking_ahead_costs_little_over_whole_epochs(
    counts: list[int], lanes: int, chunk: int | None, batch_size: int, world_size: int
) -> None:
    """At most 0.3 ms a step (a step of 256 images at 25,000 a second takes ten); and never more than twice the chunks
    in use. It was 220 ms a step with the 12 shards."""
    order = Order([counts], batch_size=batch_size, seed=0, lanes=lanes, chunk_shards=chunk)
    source = Source(
        (Manifest("memory://a", tuple(Shard(f"{i}.tar", n, 1) for i, n in enumerate(counts))),), (1.0,), ("a",)
    )
    storage = Asked()
    ahead = ShardsAhead(source, storage, order, world_size - 1, world_size)  # type: ignore[arg-type]
    steps = min(3 * order.steps_per_epoch, 2000)
    ahead.reach(0, 0)
    began = time.process_time()
    for step in range(1, steps):
        ahead.reach(*divmod(step, order.steps_per_epoch))
    seconds = time.process_time() - began
    own_lanes = max(1, lanes // world_size)
    most = min(
        len(counts), 2 * own_lanes * min(chunk or len(counts), len(counts)) + 2 * own_lanes + batch_size // world_size
    )
    assert max(storage.asked) <= 2 * most, storage.asked[:5]
    assert seconds < 3e-4 * steps + 0.05, (seconds / steps, len(storage.asked))


class Asked:
    """A storage that counts what it is asked to fetch ahead."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def prefetch(self, wanted: list[object]) -> None:
        self.asked.append(len(wanted))


@given(
    counts=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=2, max_size=4),
    data=st.data(),
    seed=seeds,
)
def test_mixture(counts: list[list[int]], data: st.DataObject, seed: int) -> None:
    weights = data.draw(st.lists(st.sampled_from([1, 2, 3, 0.5, 0.37]), min_size=len(counts), max_size=len(counts)))
    batch_size = data.draw(st.sampled_from([b for b in (1, 2, 4, 6, 8) if b <= sum(map(sum, counts))]))
    lanes = data.draw(st.integers(1, min(batch_size, min(map(sum, counts)))))
    try:
        order = Order(counts, weights=weights, batch_size=batch_size, seed=seed, lanes=lanes, chunk_shards=2)
    except ValueError as error:
        assert "too small" in str(error) and lanes > 1
        return
    steps = 30
    draws = [order.draw(*divmod(step, order.steps_per_epoch)) for step in range(steps)]
    for step in (0, steps - 1):
        at = divmod(step, order.steps_per_epoch)
        for world_size in (w for w in (2, 3) if batch_size % w == 0):
            shares = np.concatenate([order.draw(*at, rank, world_size).sample_ids for rank in range(world_size)])
            assert np.array_equal(shares, draws[step].sample_ids)
    manifest, ids, epochs = (
        np.concatenate([getattr(d, f) for d in draws]) for f in ("manifest", "sample_ids", "epochs")
    )
    for m in range(len(counts)):
        given_out = int((manifest == m).sum())
        assert given_out == order.source_counts(steps)[m]
        expected = steps * batch_size * weights[m] / sum(weights)
        assert abs(given_out - expected) <= 1 + lanes + 1e-3 * steps * batch_size
        for epoch in np.unique(epochs[manifest == m]):
            of_epoch = ids[(manifest == m) & (epochs == epoch)]
            assert len(np.unique(of_epoch)) == len(of_epoch)
        if lanes == 1:  # an epoch of the source that is over has had every sample
            for epoch in range(int(epochs[manifest == m].max(initial=0))):
                assert ((manifest == m) & (epochs == epoch)).sum() == sum(counts[m])


def test_mixture_is_even_within_every_batch() -> None:
    order = Order([[1000] * 4, [50] * 2], weights=(3, 1), batch_size=64, seed=0, lanes=4)
    for step in range(5):
        assert np.bincount(order.draw(0, step).manifest).tolist() == [48, 16]


def test_a_billion_samples_cost_little() -> None:
    counts = np.full(100_000, 10_000)
    tracemalloc.start()
    began = time.perf_counter()
    order = Order([counts], batch_size=4096, seed=0, lanes=64, chunk_shards=16)
    first = order.draw(0, 0, 3, 8)
    seconds = time.perf_counter() - began
    last = order.draw(1000, order.steps_per_epoch - 1, 3, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 50e6, (seconds, peak)
    assert len(first.sample_ids) == len(last.sample_ids) == 512
    assert order.steps_per_epoch == 244_140
    began = time.perf_counter()
    for step in range(100):
        order.draw(7, step * 2000, 3, 8)
    assert time.perf_counter() - began < 1


def test_the_order_of_old_runs_is_kept() -> None:
    """Checkpoints of earlier versions continue only while these numbers stand."""
    single = Order([[7, 5, 9, 4]], batch_size=5, seed=11, lanes=2, chunk_shards=2)
    mixture = Order([[7, 5], [9, 4]], weights=(1, 2), batch_size=6, seed=11)
    assert [single.draw(e, s).sample_ids.tolist() for e, s in ((0, 0), (1, 4))] == GOLDEN[0]
    assert [mixture.draw(e, s).sample_ids.tolist() for e, s in ((0, 0), (3, 2))] == GOLDEN[1]


GOLDEN = [[[21, 13, 17, 8, 5], [12, 17, 3, 10, 8]], [[24, 4, 12, 22, 2, 18], [23, 7, 21, 15, 10, 20]]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 50}, "less than one batch"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 4, "lanes": 5}, "lanes is 5"),
        ({"batch_size": 4, "chunk_shards": 0}, "chunk_shards"),
        ({"batch_size": 4, "weights": (1, 1)}, "2 weights for 1"),
        ({"batch_size": 4, "weights": (-1,)}, "positive"),
    ],
)
def test_errors(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Order([[10, 10]], seed=0, **arguments)  # type: ignore[arg-type]


def test_errors_of_draw() -> None:
    order = Order([[10, 10]], batch_size=6, seed=0)
    with pytest.raises(ValueError, match="not divisible by 4"):
        order.draw(0, 0, 0, 4)
    with pytest.raises(ValueError, match="steps 0 to 2"):
        order.draw(0, 3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        order.draw(0, 0, 2, 2)


def run_order(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m", "pipeline.order", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)


@pytest.mark.process
def test_command(shards_dir: Path) -> None:
    asked = ["--data", shards_dir, "--batch_size", "8", "--seed", "3", "--epoch", "1", "--start", "2", "--steps", "3"]
    lines = [json.loads(line) for line in run_order(*asked).stdout.splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
    share = [json.loads(line) for line in run_order(*asked, "--world_size", "2", "--rank", "1").stdout.splitlines()]
    assert [line["ids"] for line in share] == [line["ids"][4:] for line in lines]
    quality = json.loads(run_order(*asked[:4], "--steps", "7", "--quality").stdout)
    assert quality["pairs_of"] == "class" and 0.3 < quality["ideal"] < 0.34 and 0.5 < quality["ratio"] < 1.5


@pytest.mark.process
def test_command_says_what_is_wrong(shards_dir: Path) -> None:
    for data, batch_size, said in ((shards_dir, 61, "less than one batch of 61"), (shards_dir / "no", 8, "no")):
        result = run_order("--data", data, "--batch_size", batch_size)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and said in result.stderr
