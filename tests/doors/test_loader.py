"""The loader: what a batch is, its state, killing and resuming, elasticity, timings, the command."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command

import pipeline.loader
from pipeline.loader import Batch, Loader
from pipeline.pixels.graph import Graph
from pipeline.reading.order import make_order
from pipeline.reading.reader import Reader
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL: dict[str, Any] = {"image_size": 32, "batch_size": 12, "num_threads": 1}  # of 60 samples: 5 steps an epoch


@pytest.fixture(scope="module")
def source(shards_dir: Path) -> Source:
    return open_source(str(shards_dir))


def take(loader: Loader, count: int) -> list[Batch]:
    """Copies of the next batches."""
    return [Batch(*(tensor.clone() for tensor in batch)) for batch in islice(loader, count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


def test_a_batch(source: Source) -> None:
    loader = Loader(source, seed=3, **SMALL)
    order = make_order(source, 12, 3)
    assert loader.steps_per_epoch == 5 and loader.state_dict()["batches"] == 0
    for at in range(12):  # over two ends of an epoch
        batch = next(loader)
        epoch, step = divmod(at, 5)
        assert loader.state_dict()["batches"] == at + 1
        assert batch.sample_ids.tolist() == order.draw(epoch, step).sample_ids.tolist()
        for view in (batch.query, batch.key):
            assert view.shape == (12, 3, 32, 32) and view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert view.min() > -2.2 and view.max() < 2.7 and view.std() > 0.2
        assert not torch.equal(batch.query, batch.key)
    loader.close()


def test_the_end_and_the_length(source: Source) -> None:
    endless = Loader(source, **SMALL)
    with pytest.raises(TypeError, match="steps_per_epoch"):
        len(endless)
    loader = Loader(source, seed=3, epochs=2, **SMALL)
    ids = [batch.sample_ids.tolist() for batch in loader]
    assert len(ids) == len(loader) == 10
    assert ids[5:] != ids[:5] and all(sorted(itertools.chain(*e)) == list(range(60)) for e in (ids[:5], ids[5:]))
    assert list(loader) == [] and loader.state_dict()["batches"] == 10
    loader.load_state_dict(loader.state_dict() | {"batches": 8})
    assert [batch.sample_ids.tolist() for batch in loader] == ids[8:]
    loader.close()


def test_more_views_and_others_for_the_key(source: Source) -> None:
    """Further views change nothing in the first two; the key's recipe is the second view's alone."""
    two = Loader(source, seed=1, **SMALL)
    four = Loader(source, seed=1, num_views=4, **SMALL)
    pair = Loader(source, seed=1, num_views=3, key_views={"solarise": 1.0, "blur": 0}, **SMALL)
    for a, b, c in zip(take_views(two), take_views(four), take_views(pair)):
        assert [len(batch) for batch in (a, b, c)] == [2, 4, 3]
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert len({view.numpy().tobytes() for view in b}) == 4
        assert all(view.shape == (12, 3, 32, 32) for view in b)
        assert torch.equal(c[0], a[0]) and torch.equal(c[2], b[2]) and not torch.equal(c[1], a[1])
        std, mean = (torch.tensor(three).view(3, 1, 1) for three in (two.views[0].std, two.views[0].mean))
        assert (c[1] * std + mean).max() < 128 / 255  # all that was brighter is inverted
    for loader in (two, four, pair):
        loader.close()


def take_views(loader: Loader) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(view.clone() for view in batch.views) for batch in islice(loader, 2)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"views": "v3"}, "views 'v3' is none of v1, v2, cifar, byol"),
        ({"views": {"flip": 2}}, "views: flip is 2; it must be a number from 0 to 1"),
        ({"key_views": "cifar"}, "key_views: mean is"),
        ({"crop_min": 0}, "crop_min is 0; it must be above 0"),
        ({"num_views": 1}, "num_views is 1; it must be at least 2"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
        ({"image_size": 32.0}, "image_size is 32.0; it must be a whole number"),
        ({"batch_size": "12"}, "batch_size is '12'; it must be a whole number"),
        ({"batch_size": 61}, "60 samples, less than one batch of 61"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 5}, "not divisible by 5 ranks"),
        ({"num_threads": 0}, "num_threads is 0; it must be at least 1"),
        ({"prefetch": 0}, "prefetch is 0; it must be at least 1"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5; it must be a number from 0 to 1"),
        ({"hw_decoder_load": -1}, "hw_decoder_load is -1; it must be a number from 0 to 1"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be at least 1"),
        ({"dtype": torch.int64}, "dtype is torch.int64; it must be torch.float32"),
        ({"device": "gpu"}, "device is 'gpu'; it must be cpu, cuda"),
        ({"device": "meta"}, "device is 'meta'; views are made on cpu or cuda"),
        ({"device": "cuda:64"}, "device is 'cuda:64'; torch sees"),
        ({"quarantine": f"{__file__}/bad.jsonl"}, "bad.jsonl; that is no file that can be written"),
        ({"quarantine": ROOT}, "quarantine is .*; that is no file that can be written"),
    ],
)
def test_a_bad_argument_fails_at_construction(source: Source, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Loader(source, **SMALL | change)


def test_the_pipeline_is_built_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*arguments: Any, **named: Any) -> Graph:
        built.append(1)
        return Graph(*arguments, **named)

    monkeypatch.setattr(pipeline.loader, "Graph", build)
    loader = Loader(source, **SMALL)
    take(loader, 17)
    loader.close()
    assert len(built) == 1


def test_ranks_share_the_batches_of_one(source: Source) -> None:
    """Ids and pixels: neither the world size nor the place in the batch changes a view."""
    whole = Loader(source, seed=1, **SMALL)
    ranks = [Loader(source, seed=1, rank=rank, world_size=3, **SMALL) for rank in range(3)]
    for batch in take(whole, 6):
        parts = [take(loader, 1)[0] for loader in ranks]
        assert_same([Batch(*(torch.cat(tensors) for tensors in zip(*parts)))], [batch])
    for loader in (whole, *ranks):
        loader.close()


def test_the_state_is_that_of_the_batch_last_taken(source: Source) -> None:
    straight = Loader(source, seed=2, **SMALL)
    expected = take(straight, 14)
    straight.close()
    first = Loader(source, seed=2, prefetch=3, **SMALL)
    assert_same(take(first, 7), expected[:7])
    time.sleep(0.3)  # so that much more has been prefetched
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = Loader(source, seed=2, **SMALL)
    second.load_state_dict(state)
    assert second.state_dict()["batches"] == 7
    assert_same(take(second, 7), expected[7:])
    second.load_state_dict(state)  # also when it is running already
    assert_same(take(second, 2), expected[7:9])
    second.close()


def test_two_ranks_go_on_as_one(source: Source) -> None:
    expected = Loader(source, **SMALL)
    ids = [batch.sample_ids.tolist() for batch in take(expected, 8)]
    ranks = [Loader(source, rank=rank, world_size=2, **SMALL) for rank in range(2)]
    for loader in ranks:
        take(loader, 4)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    single = Loader(source, **SMALL)
    single.load_state_dict(ranks[1].state_dict())
    assert [batch.sample_ids.tolist() for batch in take(single, 4)] == ids[4:]
    for loader in (expected, *ranks, single):
        loader.close()


@pytest.mark.parametrize(
    ("change", "said"), [({"seed": 9}, "seed was 0 and is 9"), ({"batch_size": 6}, "batch_size was")]
)
def test_another_order_cannot_be_continued(source: Source, change: dict[str, Any], said: str) -> None:
    state = Loader(source, **SMALL).state_dict()
    with pytest.raises(ValueError, match=said):
        Loader(source, **{**SMALL, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="the data"):
        Loader(source, **SMALL).load_state_dict({**state, "fingerprint": "other"})


def test_arguments_that_do_not_fit(source: Source) -> None:
    with pytest.raises(ValueError, match="not divisible by 5"):
        Loader(source, world_size=5, **SMALL)
    with pytest.raises(ValueError, match="less than one batch of 64"):
        Loader(source, batch_size=64)


KILLED = """
import hashlib, json, os, sys
from pipeline.loader import Loader
from pipeline.sources.opening import open_source
data, state, log, steps = sys.argv[1:4] + [int(sys.argv[4])]
loader = Loader(open_source(data), image_size=32, batch_size=12, seed=4, num_threads=1)
if os.path.exists(state):
    loader.load_state_dict(json.load(open(state)))
for batch in loader:
    digest = hashlib.md5(batch.query.numpy().tobytes() + batch.key.numpy().tobytes()).hexdigest()
    batches = loader.state_dict()["batches"]
    with open(log, "a") as f:
        f.write(json.dumps([batches, batch.sample_ids.tolist(), digest]) + "\\n")
    with open(state + ".new", "w") as f:
        json.dump(loader.state_dict(), f)
    os.replace(state + ".new", state)
    if batches == steps:
        os._exit(0)
"""


def run_killed(shards_dir: Path, folder: Path, steps: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    arguments = [str(shards_dir), str(folder / "state.json"), str(folder / "log"), str(steps)]
    return subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=ROOT)


@pytest.mark.slow
@pytest.mark.process
def test_kill_and_resume(shards_dir: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; the same command again goes on with the same ids and the same pixels."""
    for kills_at in (20, 70):
        process = run_killed(shards_dir, tmp_path / "killed", 150)
        log = tmp_path / "killed" / "log"
        deadline = time.monotonic() + 120
        while (log.read_text().count("\n") if log.exists() else 0) < kills_at:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert run_killed(shards_dir, tmp_path / "killed", 150).wait(120) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    killed = {batches: rest for batches, *rest in lines}
    assert len(lines) - len(killed) <= 2  # a step is there twice when the kill came before its state was saved
    straight = Loader(open_source(str(shards_dir)), image_size=32, batch_size=12, seed=4, num_threads=1)
    for batch in islice(straight, 150):
        digest = hashlib.md5(batch.query.numpy().tobytes() + batch.key.numpy().tobytes()).hexdigest()
        assert killed.pop(straight.state_dict()["batches"]) == [batch.sample_ids.tolist(), digest]
    assert not killed
    straight.close()


def test_an_error_of_the_reading_thread_arrives(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = Reader.read, iter(range(100))

    def failing(self: Reader, *arguments: Any, **named: Any) -> Any:
        if next(calls) == 6:
            raise ValueError("shard 17 has gone")
        return read(self, *arguments, **named)

    monkeypatch.setattr(Reader, "read", failing)
    loader = Loader(source, **SMALL)
    assert len(take(loader, 6)) == 6  # what was read before it still comes
    for _ in range(2):
        with pytest.raises(ValueError, match="shard 17 has gone"):
            next(loader)
    loader.close()


def test_close_leaves_no_thread(source: Source) -> None:
    before = set(threading.enumerate())
    loader = Loader(source, **SMALL)
    take(loader, 2)
    loader.close()
    assert set(threading.enumerate()) <= before


def test_mixture(shards_dir: Path) -> None:
    one = open_source(str(shards_dir)).manifests[0]
    mixture = Source((one, one), (0.75, 0.25), ("often", "seldom"))
    loader = Loader(mixture, **SMALL)
    ids = torch.cat([batch.sample_ids for batch in take(loader, 20)])
    assert loader.source_counts() == {"often": 180, "seldom": 60}
    assert int((ids >= 60).sum()) == 60 and len(torch.unique(ids[ids >= 60])) == 60
    resumed = Loader(mixture, **SMALL)
    resumed.load_state_dict(loader.state_dict())
    assert_same(take(resumed, 3), take(loader, 3))
    assert resumed.source_counts() == loader.source_counts()
    loader.close()
    resumed.close()


@pytest.mark.slow
def test_the_bottleneck_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(source, **SMALL)
    take(loader, 3)
    loader.timings()
    for _ in range(5):
        next(loader)
        time.sleep(0.05)
    timings = loader.timings()
    assert loader.bottleneck(timings) == "consumer" and timings["elapsed"] >= 0.25
    read = Reader.read

    def slow(self: Reader, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.2)
        self.seconds["read"] += 0.2
        return read(self, *arguments, **named)

    monkeypatch.setattr(Reader, "read", slow)
    for _ in range(6):  # those that had been read ahead
        next(loader)
    loader.timings()
    for _ in range(5):
        next(loader)
    timings = loader.timings()
    assert loader.bottleneck(timings) == "read" and timings["starved"] > timings["graph"]
    loader.close()


def run_loader(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.loader", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command(shards_dir: Path, run_command: Command) -> None:
    result = run_loader("--data", shards_dir, "--batch_size", "12", "--image_size", "32")
    assert result.returncode == 0, result.stderr
    assert "images/s: 5 batches of 12 in" in result.stdout
    assert all(f"\n  {stage} " in result.stdout for stage in ("read", "screen", "views", "graph"))
    assert result.stdout.rstrip().splitlines()[-1].startswith("bottleneck: ")
    share = ("--data", shards_dir, "--batch_size", "12", "--image_size", "32", "--world_size", "4", "--rank")
    result = run_command("pipeline.loader", *share, "3")
    assert result.returncode == 0 and "images/s: 5 batches of 3 in" in result.stdout, result.stderr
    result = run_command("pipeline.loader", *share, "4")
    assert result.returncode == 2 and result.stderr.endswith("error: rank 4 of 4: ranks count from 0 to 3\n")
    result = run_command("pipeline.loader", "--data", shards_dir, "--batch_size", "12", "--views", "v3")
    assert result.returncode == 2 and "views 'v3' is none of v1" in result.stderr
    result = run_loader("--data", shards_dir, "--batch_size", "100")  # a slow machine says before what it imports
    assert result.returncode == 2 and result.stderr.endswith(
        "error: the source holds 60 samples, less than one batch of 100: lower batch_size\n"
    )
