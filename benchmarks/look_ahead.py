"""Does a far source cost more than the disk once its shards are in the cache? `python benchmarks/look_ahead.py`

Before each step the loader asks which shards come next, so that they are fetched in time. That must cost nothing to
speak of, whether a source has one shard or 94,000.

1. read: whole epochs of the reading thread alone (order, look-ahead, read, screen, view parameters), from the disk and
   over HTTP from a server on loopback through a cache that holds everything. Rounds take both in turn.
2. plan: one whole epoch of the look-ahead alone, over a manifest without files, as one rank of many.

It ends with 1 when HTTP takes over twice the processor time of the disk, or the look-ahead alone over 2 microseconds an
image. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.hardware import hardware, processor  # noqa: E402 - as a script, its own folder is what is on the path
from benchmarks.remote import make_shards, serve  # noqa: E402
from benchmarks.resume_data import SIDE, write_images  # noqa: E402
from pipeline.loader import Loader  # noqa: E402
from pipeline.reading.ahead import ShardsAhead  # noqa: E402
from pipeline.reading.order import make_order  # noqa: E402
from pipeline.sources.manifest import Manifest, Shard, Source  # noqa: E402
from pipeline.sources.opening import _default_order, open_source  # noqa: E402

SOURCES = ((1, 3000), (12, 1000), (75, 40))  # shards, images in each
EPOCHS, BATCH = 2, 64
PLANS = ((1, 10_000, 1), (12, 10_000, 1), (1_200, 1_000, 8), (94_000, 10_000, 64))  # shards, images in each, ranks
A_RANK = 256  # images of a step of one rank of a plan
MOST_TIMES, MOST_US = 2.0, 2.0


def read(data: str, cache: str | None) -> dict[str, float]:
    """Images a second, and CPU microseconds an image of the reading thread, over EPOCHS epochs behind a first one."""
    loader = Loader(
        open_source(data, cache_dir=cache, progress=False), batch_size=BATCH, num_threads=1, cache_dir=cache
    )
    items = loader._items(0)
    for _ in range(loader.steps_per_epoch):
        next(items)
    began, processor_began = time.perf_counter(), time.thread_time()
    steps = EPOCHS * loader.steps_per_epoch
    for _ in range(steps):
        next(items)
    seconds, processor_seconds = time.perf_counter() - began, time.thread_time() - processor_began
    loader.close()
    return {"images_per_s": steps * BATCH / seconds, "us": 1e6 * processor_seconds / (steps * BATCH)}


class NoStorage:
    """Counts what would be fetched."""

    def __init__(self) -> None:
        self.asked = 0

    def prefetch(self, wanted: list[Any]) -> None:
        self.asked += len(wanted) // 2  # a shard and its index


def plan(shards: int, samples: int, ranks: int) -> dict[str, Any]:
    """CPU microseconds an image that rank 0's look-ahead takes in an epoch; how often it listed shards, and how many
    the longest list had."""
    entries = tuple(Shard(f"shard-{i:06d}.tar", samples, samples * 110_000, "0" * 16) for i in range(shards))
    manifests = [Manifest("http://127.0.0.1:1/data", entries)]
    source = Source(tuple(manifests), (1.0,), ("data",), *_default_order(manifests))
    order = make_order(source, A_RANK * ranks, 0)
    storage, lists, longest = NoStorage(), 0, 0
    ahead = ShardsAhead(source, storage, order, 0, ranks)  # type: ignore[arg-type]
    began = time.thread_time()
    for step in range(order.steps_per_epoch):
        before = storage.asked
        ahead.reach(0, step)
        lists += storage.asked > before
        longest = max(longest, storage.asked - before)
    us = 1e6 * (time.thread_time() - began) / (order.steps_per_epoch * A_RANK)
    return {"shards": shards, "samples": samples, "ranks": ranks, "us": us, "lists": lists, "longest": longest}


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of `read`: medians, and how many times the disk's processor time each takes."""
    coarse = [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)]
    smooth = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in coarse]
    write_images(smooth, folder / "images", 0, 100)
    for shards, samples in SOURCES:
        make_shards(folder / "images", folder / f"shards{shards}", shards, samples)
    server, address = serve("http", folder, 0)
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    try:
        for _ in range(rounds):
            for shards, _ in SOURCES:
                name, cache = f"shards{shards}", str(folder / "cache")
                found.setdefault((shards, "disk"), []).append(read(str(folder / name), None))
                found.setdefault((shards, "http"), []).append(read(f"{address}/{name}", cache))
    finally:
        server.kill()
    rows: list[dict[str, Any]] = []
    for shards, samples in SOURCES:
        us = {place: statistics.median(each["us"] for each in found[shards, place]) for place in ("disk", "http")}
        for place in us:
            rate = statistics.median(each["images_per_s"] for each in found[shards, place])
            rows.append({"place": place, "shards": shards, "samples": samples, "images_per_s": rate})
            rows[-1] |= {"us": us[place], "times_the_disk": us[place] / us["disk"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), options.rounds)
    plans = [plan(*each) for each in PLANS]

    facts = hardware("cpu")
    lines = [
        f"{processor()}, {facts['cpu_cores']} cores, Python {facts['python']}, numpy {facts['numpy']}; images of "
        f"{SIDE} pixels, batch {BATCH}, {EPOCHS} epochs behind a first one, medians of {options.rounds} rounds; "
        f"{time.strftime('%Y-%m-%d')}",
        f"{'read':6}{'shards':>8}{'images in each':>16}{'images/s':>12}{'CPU us/image':>14}{'of the disk':>13}",
    ]
    for row in rows:
        lines.append(
            f"{row['place']:6}{row['shards']:8,}{row['samples']:16,}{row['images_per_s']:12,.0f}{row['us']:14.1f}"
            f"{row['times_the_disk']:13.2f}"
        )
    lines.append(
        f"{'plan':6}{'shards':>8}{'images in each':>16}{'ranks':>12}{'CPU us/image':>14}{'lists':>13}{'longest':>9}"
    )
    for row in plans:
        lines.append(
            f"{'':6}{row['shards']:8,}{row['samples']:16,}{row['ranks']:12}{row['us']:14.3f}{row['lists']:13,}"
            f"{row['longest']:9,}"
        )
    result = {"read": rows, "plan": plans, "hardware": facts, "n": options.rounds}
    print("\n".join(lines))
    print(json.dumps(result))
    if options.output:
        options.output.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if max(row["times_the_disk"] for row in rows) > MOST_TIMES or max(row["us"] for row in plans) > MOST_US:
        sys.exit("the look-ahead is too dear")


if __name__ == "__main__":
    main()
