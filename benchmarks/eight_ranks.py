"""Eight ranks of one node that share a cache, simulated: `python benchmarks/eight_ranks.py --images DIR`.

Each rank is a process that reads, screens and draws views as for a GPU. A timer stands for the GPU: it takes a batch,
and is busy for as long as `--rate` images/s need. The shards come from an S3 server on loopback with limited bandwidth,
latency and faults (benchmarks/servers.py), through one disk cache that all ranks share.

1. scenarios: all ranks in all shards (one lane); ranks in shards of their own (a lane each); one rank three times
   slower than the others, and a cache that does not hold the data. Told: how often each shard was fetched; the share of
   its time that each rank waited, the first seconds left out; the wait at the first batch of an epoch beside the
   longest other one; the most bytes that the cache ever had.
2. plan: 64 ranks on 8 nodes, the order and the shards to fetch alone: the share of a source that each node reads in an
   epoch, by the number of lanes.

The last line is one JSON object; --output writes it and the table.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.remote import make_shards  # noqa: E402
from pipeline.loader import Loader  # noqa: E402
from pipeline.reading.ahead import ReadAhead  # noqa: E402
from pipeline.reading.order import Order  # noqa: E402
from pipeline.sources.opening import open_source  # noqa: E402

RANKS, SHARE = 8, 16  # ranks of a node; images of a batch of one rank
NODES = 8


class Scenario(NamedTuple):
    name: str
    lanes: int
    chunk_shards: int
    cache_share: float  # of the data's bytes
    slow: float = 1.0  # how much longer the last rank's GPU takes


SCENARIOS = (
    Scenario("every rank reads all shards", 1, 8, 2.0),
    Scenario("every rank has shards of its own", RANKS, 2, 2.0),
    Scenario("the last rank 3 times slower, cache of 60 %", RANKS, 2, 0.6, slow=3.0),
)


def rank_process(rank: int, o: argparse.Namespace, s: Scenario, card: str, cache: str, barrier: Any, told: Any) -> None:
    """One rank: puts its figures into `told`."""
    source = open_source(card, cache_dir=cache, cache_bytes=o.cache_bytes, progress=False)
    loader = Loader(
        source, batch_size=RANKS * SHARE, rank=rank, world_size=RANKS, cache_dir=cache, cache_bytes=o.cache_bytes,
        num_threads=1,
    )  # fmt: skip
    busy = SHARE / o.rate * (s.slow if rank == RANKS - 1 else 1.0)
    steps = int(o.epochs * loader.steps_per_epoch / (s.slow if rank == RANKS - 1 else 1.0))
    barrier.wait()
    began, processor = time.perf_counter(), time.process_time()
    ahead = ReadAhead(loader._items(0), depth=2)
    waits = []
    for _ in range(steps):
        asked = time.perf_counter()
        ahead.get()
        waits.append(time.perf_counter() - asked)
        time.sleep(busy)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    ahead.close()
    skipped = next((i for i in range(steps) if sum(waits[:i]) + i * busy > o.start), steps // 2)
    later = waits[skipped:]
    starts = {e * loader.steps_per_epoch for e in range(1, o.epochs)} & set(range(skipped, steps))
    told.put(
        {
            "rank": rank,
            "first_batch_s": waits[0],
            "waited": sum(later) / (sum(later) + len(later) * busy),
            "epoch_start_s": max((waits[i] for i in starts), default=0.0),
            "longest_s": max((w for i, w in enumerate(later, skipped) if i not in starts), default=0.0),
            "fetches": loader._storage.fetches,
            "cpu_us_per_image": 1e6 * processor / (steps * SHARE),
            "images_per_second": steps * SHARE / seconds,
        }
    )
    loader.close()


def run(o: argparse.Namespace, s: Scenario, folder: Path, url: str, counts: str) -> dict[str, Any]:
    """One scenario: a cache of its own, eight ranks, and what the server and the folder tell of them."""
    card = folder / "card.yaml"
    card.write_text(f'sources: [{{data: "{url}"}}]\nlanes: {s.lanes}\nchunk_shards: {s.chunk_shards}\n')
    data = sum(path.stat().st_size for path in (folder / "data").glob("*.tar"))
    o.cache_bytes = int(s.cache_share * data)
    before, largest, done = fetched(counts), 0, threading.Event()
    with tempfile.TemporaryDirectory(dir=folder) as cache:

        def watch() -> None:
            nonlocal largest
            while not done.wait(0.05):
                with contextlib.suppress(FileNotFoundError):  # not made yet, or renamed meanwhile
                    largest = max(largest, sum(e.stat().st_size for e in os.scandir(f"{cache}/fetched-shards")))

        fork = multiprocessing.get_context("fork")
        barrier, told = fork.Barrier(RANKS), fork.Queue()
        shared = (o, s, str(card), cache, barrier, told)
        processes = [fork.Process(target=rank_process, args=(rank, *shared)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            ranks = sorted((told.get(timeout=o.patience) for _ in processes), key=lambda found: found["rank"])
        except queue.Empty:
            for process in processes:
                process.kill()
            sys.exit(f"error: {s.name}: a rank failed, or told nothing for {o.patience:.0f} s")
        finally:
            done.set()
            watcher.join()
        for process in processes:
            process.join()
    after = fetched(counts)
    shards = {name for name in after if name.endswith(".tar")}
    sizes = {name: (folder / "data" / name).stat().st_size for name in shards}
    times = {name: (after[name] - before[name]) / sizes[name] for name in shards}
    own = ranks[:-1] if s.slow > 1 else ranks
    return {
        "fetches": sum(r["fetches"] for r in ranks),
        "shards": len(sizes),
        "bytes_sent_over_bytes": sum(after[n] - before[n] for n in shards) / data,
        "most_of_a_shard": max(times.values()),
        "waited_most": max(r["waited"] for r in own),
        "waited_slow_rank": ranks[-1]["waited"] if s.slow > 1 else None,
        "epoch_start_s": max(r["epoch_start_s"] for r in own),
        "longest_other_wait_s": max(r["longest_s"] for r in own),
        "first_batch_s": max(r["first_batch_s"] for r in ranks),
        "cache_most_over_limit": largest / o.cache_bytes,
        "cpu_us_per_image": statistics.median(r["cpu_us_per_image"] for r in ranks),
        "images_per_second": sum(r["images_per_second"] for r in ranks),
    }


def fetched(counts: str) -> Counter[str]:
    """Bytes that the server has sent of each file."""
    with urllib.request.urlopen(counts) as answer:
        return Counter({k.removeprefix("bytes "): n for k, n in json.load(answer).items() if k.startswith("bytes ")})


def plan(shards: int = 640, per_shard: int = 64, batch_size: int = 1024) -> dict[str, dict[str, float]]:
    """Lanes -> the largest share of the shards that a node of 8 ranks reads in an epoch, and has fetched for it."""
    found = {}
    for lanes in (1, NODES, 12, NODES * RANKS):
        chunk = max(1, 64 // lanes)
        order = Order([[per_shard] * shards], batch_size=batch_size, seed=0, lanes=lanes, chunk_shards=chunk)
        reads, fetches = [], []
        for node in range(NODES):
            read, wanted = set[int](), set[int]()
            for step in range(order.steps_per_epoch):
                draw = order.draw(0, step, node, NODES)  # a node's ranks are next to each other
                read.update(draw.shard.tolist())
                wanted.update(s for _, s in order.upcoming_shards(0, step, node, NODES))
            reads.append(len(read) / shards)
            fetches.append(len(wanted) / shards)
        found[str(lanes)] = {"read": max(reads), "fetched": max(fetches)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photographs")
    parser.add_argument("--rate", type=float, default=100.0, help="images/s that the timer of each rank takes")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--start", type=float, default=5.0, help="seconds at the start that waits are not counted in")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--per_shard", type=int, default=150)
    parser.add_argument("--bandwidth", type=float, default=200.0, help="MB/s of the server, over all connections")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer of the server")
    parser.add_argument("--patience", type=float, default=200, help="seconds until a rank has to have ended")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    o = parser.parse_args()
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    say(
        f"{RANKS} ranks of {o.rate:.0f} images/s, {o.shards} shards of {o.per_shard} photographs; server of "
        f"{o.bandwidth:.0f} MB/s with {1000 * o.latency:.0f} ms, every 50th answer 503, every 70th cut off",
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}; n = 1 run of {o.epochs} epochs",
    )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_shards(o.images, folder / "data", o.shards, o.per_shard)
        command = [sys.executable, str(REPOSITORY / "benchmarks/servers.py"), "http", str(folder), "0"]
        command += ["--bandwidth", str(o.bandwidth), "--latency", str(o.latency)]
        command += ["--busy_every", "50", "--reset_every", "70"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}"
            os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
            try:
                for scenario in SCENARIOS:
                    results[scenario.name] = found = run(o, scenario, folder, "s3://data", f"{address}/__counts__")
                    say(scenario.name, *(f"    {k:24} {v:.4g}" for k, v in found.items() if v is not None))
            finally:
                server.kill()
    results["plan"] = plan()
    say(f"{NODES * RANKS} ranks on {NODES} nodes, an epoch: the largest share of the shards that a node reads, fetches")
    say(*(f"    lanes {lanes:3} {v['read']:8.3f} {v['fetched']:8.3f}" for lanes, v in results["plan"].items()))
    say(json.dumps(results))
    if o.output:
        o.output.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        o.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
