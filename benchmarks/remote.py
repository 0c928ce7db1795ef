"""Training from object storage against training from the local disk, at 20 and 100 ms of latency, beside DALI's own
reader.

    python benchmarks/remote.py --images DIR [--rounds 3]

Real servers on loopback (`benchmarks/servers.py`: one that speaks HTTP, and moto for S3) answer every request that much
later. Every measurement is a process of its own with an empty cache that takes one epoch: each shard is fetched once.
`images/s` is from the first batch to the last; `start` is the time to the first batch, imports not counted. Servers,
fetching
and decoding share the machine's cores. Rounds take all candidates in turn; medians are over rounds.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
SHARDS, PER_SHARD, BATCH = 20, 100, 50


# --- children: each prints one JSON object ----------------------------------------------------------------------------


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """Two views of every image, as training takes them; or, for `read`, their bytes alone."""
    from pipeline.loader import Loader
    from pipeline.sources.opening import open_source

    begun = time.perf_counter()
    source = open_source(options.data, cache_dir=options.cache, progress=False)
    ours = Loader(source, batch_size=BATCH, num_threads=os.cpu_count(), cache_dir=options.cache)
    batches = iter(ours) if options.child == "loader" else ours._items(0)
    next(batches)
    first = time.perf_counter()
    steps = ours.steps_per_epoch - 1
    for _ in range(steps):
        next(batches)
    ended = time.perf_counter()
    fetched = ours._storage.fetches
    ours.close()
    return {"rate": steps * BATCH / (ended - first), "start": first - begun, "fetched": fetched}


def dali(options: argparse.Namespace) -> dict[str, Any]:
    """DALI's reader and decoder, without any views; only as many images as it reads in reasonable time."""
    from nvidia.dali import fn, pipeline_def

    tars = [f"{options.data}/shard-{i:06d}.tar" for i in range(4)]
    indexes = [f"{options.indexes}/shard-{i:06d}.idx" for i in range(4)]

    @pipeline_def(batch_size=BATCH, num_threads=os.cpu_count(), device_id=None)
    def read() -> Any:
        images = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg"], prefetch_queue_depth=4)
        return fn.decoders.image(images)

    begun = time.perf_counter()
    pipe = read()
    pipe.build()
    pipe.run()
    first = time.perf_counter()
    batches = 3 if options.data.startswith("s3") else 20
    for _ in range(batches):
        pipe.run()
    return {"rate": batches * BATCH / (time.perf_counter() - first), "start": first - begun, "fetched": 0}


# --- the parent -------------------------------------------------------------------------------------------------------


def make_shards(images: Path, folder: Path, count: int = SHARDS, per_shard: int = PER_SHARD) -> None:
    import tarfile

    from pipeline.files import write_atomically
    from pipeline.sources.index import format_index, index_tar
    from pipeline.sources.manifest import Manifest, Shard, save_manifest
    from pipeline.sources.scan import checksum_of

    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    folder.mkdir()
    shards = []
    for s in range(count):
        tar = folder / f"shard-{s:06d}.tar"
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as f:
            for i in range(s * per_shard, (s + 1) * per_shard):
                f.add(paths[i % len(paths)], f"{i:06d}.jpg")
        write_atomically(tar.with_suffix(".idx"), format_index(index_tar(tar)))
        shards.append(Shard(tar.name, per_shard, tar.stat().st_size, checksum_of(np.fromfile(tar, np.uint8))))
    save_manifest(Manifest(str(folder), tuple(shards)), folder / "manifest.json")


def child(kind: str, data: str, folder: Path, endpoint: str = "") -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    environment |= {"AWS_ENDPOINT_URL": endpoint} if endpoint else {}
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        command = [sys.executable, __file__, "--child", kind, "--cache", cache, "--indexes", str(folder / "shards")]
        result = subprocess.run([*command, "--data", data], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{kind} {data}: exit {result.returncode}\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def serve(kind: str, folder: Path, latency: float) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "servers.py"), kind, str(folder), "0"]
    process = subprocess.Popen([*command, "--latency", str(latency)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def measure(images: Path, folder: Path, rounds: int) -> None:
    shards = folder / "shards"
    make_shards(images, shards)
    size = sum(p.stat().st_size for p in shards.glob("*.tar"))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')},",
        end="",
    )
    print(
        f" DALI {version('nvidia-dali-cuda130')}; {SHARDS} shards of {PER_SHARD} photographs, {size / 1e6:.0f} MB;",
        end="",
    )
    print(f" batch {BATCH}, 8 lanes of 1 shard; medians of {rounds} rounds")
    servers, candidates = [], []

    def card(name: str, data: str) -> str:
        """The same order for all: the same shards in use at the same time."""
        path = folder / f"{name}.yaml"
        path.write_text(f'sources: [{{data: "{data}"}}]\nlanes: 8\nchunk_shards: 1\n')
        return str(path)

    candidates.append(("local disk", "loader", card("local", str(shards)), ""))
    for kind, latency in [("http", 0.02), ("http", 0.1), ("s3", 0.02), ("s3", 0.1)]:
        process, address = serve(kind, folder, latency)
        servers.append(process)
        data, endpoint = (f"{address}/shards", "") if kind == "http" else ("s3://data/shards", address)
        label = f"{kind} {1000 * latency:.0f} ms"
        candidates.append((label, "loader", card(label.replace(" ", "-"), data), endpoint))
        if kind == "s3":
            candidates.append((f"DALI's reader {label}", "dali", data, endpoint))
    candidates.append(("DALI's reader local disk", "dali", str(shards), ""))
    candidates.append(("bytes only, local disk", "read", str(folder / "local.yaml"), ""))
    candidates.append(("bytes only, http 20 ms", "read", str(folder / "http-20-ms.yaml"), ""))
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        for _ in range(rounds):
            for label, kind, data, endpoint in candidates:
                results.setdefault(label, []).append(child(kind, data, folder, endpoint))
    finally:
        for process in servers:
            process.kill()
    print(f"{'':26}{'images/s':>10}{'of local':>10}{'start s':>10}{'fetched':>10}   rounds")
    for label, found in results.items():
        base = (
            "DALI's reader local disk"
            if "DALI" in label
            else "bytes only, local disk"
            if "bytes" in label
            else "local disk"
        )
        # Each round against the local run of the same round: the machine is not equally busy all the time.
        share = statistics.median(f["rate"] / b["rate"] for f, b in zip(found, results[base]))
        rate, start = (statistics.median(f[key] for f in found) for key in ("rate", "start"))
        each = " ".join(f"{f['rate']:.0f}" for f in found)
        print(f"{label:26}{rate:10.0f}{share:10.2f}{start:10.2f}{found[0]['fetched']:10}   {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["loader", "read", "dali"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--indexes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps((dali if options.child == "dali" else loader)(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(options.images, Path(folder), options.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
