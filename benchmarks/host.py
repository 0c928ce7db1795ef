"""CPU time that a rank's host spends on each image when a GPU decodes it, stage by stage, on a machine without one.

    python benchmarks/host.py --images DIR [--rounds 5] [--output benchmarks/results/host]

Everything that the loader does on the host runs as it does for `device="cuda"`: order, read, screen, view parameters,
`lend`. The graph gets its batches in the same way, but its device part is replaced by a copy of what would go to the
GPU, into memory that was used before, as pinned memory is. `graph` is the processor time of all threads that is left
when the other stages, timed in theirs, are taken away.
Once from local shards, once from an S3 server on loopback through the disk cache, whose own share (`fetch`) is paid
once for each image that is not yet there. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from operator import sub
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from nvidia.dali import fn, pipeline_def, types

from pipeline.pixels.graph import Lent, lend
from pipeline.pixels.views import COLUMNS, sample_views
from pipeline.reading.order import make_order
from pipeline.reading.reader import Reader
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage, storage_for

SIZE, NUM_VIEWS, SHARDS, PREFETCH = 224, 2, 8, 2
WARM = 6  # batches that only use the memory
STAGES = ("order", "read", "screen", "views", "lend", "graph")


@pipeline_def
def stand_in(feed: Callable[[], Lent], inputs: int) -> tuple[Any, ...]:
    """As pixels.graph.two_views on a GPU, with a copy where that sends to the GPU: the resize there reads the windows'
    corners where they lie."""
    encoded, *lent = fn.external_source(
        feed, num_outputs=inputs, batch=True, no_copy=True, dtype=[types.UINT8] + (inputs - 1) * [types.FLOAT]
    )
    corners, rows = lent[: 2 * NUM_VIEWS], lent[2 * NUM_VIEWS :]
    return fn.copy(encoded), *corners, *(fn.copy(row) for row in rows)


def stages(source: Source, storage: Storage, *, batch_size: int, largest: int, epoch: int) -> dict[str, float]:
    """CPU microseconds an image of each stage, over as many batches as an epoch has; `largest` image in bytes."""
    order = make_order(source, batch_size=batch_size, seed=0)
    reader = Reader(source, storage)
    used = dict.fromkeys(STAGES, 0.0)
    plain_rows = np.ones((batch_size, len(COLUMNS)), np.float32)

    def batches() -> Iterator[Lent]:
        # The largest first: the memory of the copies then grows no more, so that the time in which the kernel clears
        # fresh pages for them is not taken for the loader's.
        images = [np.zeros(largest, np.uint8)] * batch_size
        yield from WARM * [lend(images, NUM_VIEWS * [plain_rows], image_size=SIZE, device="cuda")]
        for step in range(WARM + order.steps_per_epoch + PREFETCH):
            ends = [time.thread_time()]
            draw = order.draw(epoch + step // order.steps_per_epoch, step % order.steps_per_epoch)
            ends.append(time.thread_time())
            samples = reader.read(draw)
            ends.append(time.thread_time())
            rows = [
                sample_views(
                    "v2",
                    seed=0,
                    epochs=samples.draw.epochs,
                    sample_ids=samples.draw.sample_ids,
                    view=view,
                    heights=samples.heights,
                    widths=samples.widths,
                    image_size=SIZE,
                    crop_min=0.2,
                )
                for view in range(NUM_VIEWS)
            ]
            ends.append(time.thread_time())
            lent = lend(samples.encoded, rows, image_size=SIZE, device="cuda")
            ends.append(time.thread_time())
            for stage, seconds in zip(("order", "read", "views", "lend"), map(sub, ends[1:], ends), strict=True):
                used[stage] += seconds
            yield lent

    feed = batches()
    graph = stand_in(
        lambda: next(feed),
        1 + 3 * NUM_VIEWS,
        batch_size=batch_size,
        num_threads=2,
        device_id=None,
        prefetch_queue_depth=PREFETCH,
    )
    graph.build()
    for _ in range(2 * WARM):
        graph.run()
    began = time.process_time()
    used.update(dict.fromkeys(STAGES, 0.0))
    reader.seconds.update(read=0.0, screen=0.0)
    for _ in range(order.steps_per_epoch):
        graph.run()
    total = time.process_time() - began
    reader.close()
    # One call reads and screens: its own clocks say how the time divides.
    screen = reader.seconds["screen"] / sum(reader.seconds.values()) * used["read"]
    used |= {"read": used["read"] - screen, "screen": screen, "graph": total - sum(used.values())}
    return {stage: seconds / (order.steps_per_epoch * batch_size) * 1e6 for stage, seconds in used.items()}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder as s3://data, from a server on loopback."""
    command = [sys.executable, str(Path(__file__).with_name("servers.py")), "s3", str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            yield "s3://data"
        finally:
            server.kill()


def fetch_all(source: Source, storage: Storage) -> float:
    """Brings every shard into the cache; CPU microseconds an image."""
    began = time.process_time()
    for manifest in source.manifests:
        for i, shard in enumerate(manifest.shards):
            storage.read(manifest.shard_url(i), 0, 512, bytes=shard.bytes, checksum=shard.checksum)
    return (time.process_time() - began) / source.samples * 1e6


def write_shards(images: list[Path], folder: Path, count: int) -> None:
    """`count` samples in SHARDS tars, the images again and again."""
    encoded = [path.read_bytes() for path in images]
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"shard-{shard:06d}.tar")) as writer:
            for i in range(shard, count, SHARDS):
                writer.write({"__key__": f"{i:06d}", "jpg": encoded[i % len(encoded)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photographs")
    parser.add_argument("--batch_size", type=int, default=256, help="images of a batch of one rank")
    parser.add_argument("--count", type=int, default=2048, help="samples in the shards; images repeat to fill them")
    parser.add_argument("--rounds", type=int, default=5, help="epochs over the shards; medians are over these")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    args = parser.parse_args()
    images = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not images:
        parser.error(f"no JPEG files under {args.images}")

    largest = max(path.stat().st_size for path in images)
    measured: dict[str, list[dict[str, float]]] = {"local": [], "s3": []}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (scratch / "shards").mkdir()
        write_shards(images, scratch / "shards", args.count)
        sources = {"local": open_source(str(scratch / "shards"), progress=False)}  # writes index and manifest
        url = stack.enter_context(served(scratch / "shards"))
        sources["s3"] = open_source(url, cache_dir=str(scratch / "cache"), progress=False)
        storages = {name: storage_for(source) for name, source in sources.items()}
        fetch = fetch_all(sources["s3"], storages["s3"])
        for epoch in range(args.rounds + 1):
            for name, source in sources.items():
                measured[name].append(
                    stages(source, storages[name], batch_size=args.batch_size, largest=largest, epoch=epoch)
                )
        for storage in storages.values():
            storage.close()

    kilobytes = statistics.mean(path.stat().st_size for path in images) / 1000
    # The first round fills caches.
    medians = {
        name: {stage: statistics.median(r[stage] for r in rounds[1:]) for stage in STAGES}
        for name, rounds in measured.items()
    }
    versions = {name: version(name) for name in ("torch", "nvidia-dali-cuda130", "numpy", "s3fs")}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        f"CPU microseconds an image on the host of a GPU rank: {args.count} samples of {len(images)} photographs "
        f"({kilobytes:.0f} kB), batch {args.batch_size}, {args.rounds} rounds, medians",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {shown}, {time.strftime('%Y-%m-%d')}",
        f"{'':6s} " + " ".join(f"{stage:>7s}" for stage in STAGES) + "   total    once: fetch",
    ]
    for name, used in medians.items():
        once = f"{fetch:11.1f}" if name == "s3" else ""
        row = " ".join(f"{used[stage]:7.1f}" for stage in STAGES)
        lines.append(f"{name:6s} {row} {sum(used.values()):7.1f} {once}")
    summary = {
        "total_us": round(sum(medians["local"].values()), 1),
        "read_and_screen_us": round(medians["local"]["read"] + medians["local"]["screen"], 1),
        "local": {stage: round(us, 2) for stage, us in medians["local"].items()},
        "s3": {stage: round(us, 2) for stage, us in medians["s3"].items()} | {"fetch": round(fetch, 1)},
        "n": args.rounds,
        "batch_size": args.batch_size,
        "versions": versions,
    }
    lines.append(json.dumps(summary))
    print("\n".join(lines))
    if args.output:
        args.output.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        args.output.with_suffix(".json").write_text(json.dumps(summary | {"rounds": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
