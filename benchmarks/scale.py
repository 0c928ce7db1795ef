"""A billion samples in 100,000 shards: how long until the first batch, and how much memory a rank takes.

    python benchmarks/scale.py --folder SCRATCH      # needs 0.5 GB and 200,000 directory entries on one file system

The shards are real: 20 tars of 10,000 small JPEGs, hard-linked 5,000 times each, every link with its own line in the
manifest. Every measurement is a process of its own that starts from nothing. Beside ours, `fn.readers.webdataset` gets
the first shards of the same folder, as many as memory allows; what it would take for all of them is extrapolated.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REAL_TARS = 20
SAMPLES = 10_000  # a shard


def megabytes() -> dict[str, float]:
    """Resident memory of this process, and the part of it that is its own: not libraries, which ranks share."""
    fields = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {"rss": int(fields["Rss:"]) / 1024, "anonymous": int(fields["Anonymous:"]) / 1024}


# --- children: each prints one JSON object ----------------------------------------------------------------------------


def imports(_: argparse.Namespace) -> dict[str, Any]:
    import nvidia.dali.fn
    import torch

    assert torch and nvidia.dali.fn
    return megabytes()


def ours(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    from pipeline.loader import Loader
    from pipeline.sources.opening import open_source

    imported = time.perf_counter()
    source = open_source(options.data, progress=False)
    opened = time.perf_counter()
    loader = Loader(source, batch_size=options.batch_size, rank=options.rank, world_size=options.ranks, num_threads=1)
    if options.step:
        state = loader.state_dict()
        loader.load_state_dict({**state, "batches": options.step})
    batch = next(loader)
    first = time.perf_counter()
    cpu, memory = time.process_time(), megabytes()
    for _ in range(20):
        next(loader)
    result = {
        "import_s": imported - begun,
        "open_s": opened - imported,
        "loader_and_batch_s": first - opened,
        "first_batch_s": first - begun,
        "cpu_s": cpu,
        "step_s": (time.perf_counter() - first) / 20,
        "samples": source.samples,
        "steps_per_epoch": loader.steps_per_epoch,
        "ids": batch.sample_ids[:4].tolist(),
        **memory,
        "rss_after_20": megabytes()["rss"],
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }
    loader.close()
    return result


def dali(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    from nvidia.dali import fn, pipeline_def

    tars = [f"{options.data}/shard-{i:06d}.tar" for i in range(options.shards)]

    @pipeline_def(batch_size=options.batch_size, num_threads=1, device_id=None)
    def read() -> Any:
        images = fn.readers.webdataset(
            paths=tars, index_paths=[tar[:-3] + "idx" for tar in tars], ext=["jpg"], shard_id=0, num_shards=8, name="r"
        )
        return fn.decoders.image(images)

    pipe = read()
    pipe.build()
    pipe.run()
    return {
        "first_batch_s": time.perf_counter() - begun,
        "cpu_s": time.process_time(),
        "samples": options.shards * SAMPLES,
        **megabytes(),
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }


# --- the parent -------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, shards: int) -> None:
    from PIL import Image

    from pipeline.files import write_atomically
    from pipeline.sources.index import format_index, index_tar
    from pipeline.sources.manifest import Manifest, Shard, save_manifest
    from pipeline.sources.scan import checksum_of

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(200):
        stream = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=80)
        pictures.append(stream.getvalue())
    real: list[Path] = []
    entries = []
    for t in range(min(REAL_TARS, shards)):
        tar, index = folder / f"real-{t:02d}", folder / f"real-{t:02d}.index"
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as f:
            for i in range(SAMPLES):
                info = tarfile.TarInfo(f"{t:02d}{i:06d}.jpg")
                content = pictures[(t + i) % len(pictures)]
                info.size = len(content)
                f.addfile(info, io.BytesIO(content))
        write_atomically(index, format_index(index_tar(tar)))
        real.append(tar)
        entries.append((SAMPLES, tar.stat().st_size, checksum_of(np.fromfile(tar, np.uint8))))
    lines = []
    for s in range(shards):
        name, source = f"shard-{s:06d}", real[s % len(real)]
        os.link(source, folder / f"{name}.tar")
        os.link(f"{source}.index", folder / f"{name}.idx")
        lines.append(Shard(f"{name}.tar", *entries[s % len(real)]))
    save_manifest(Manifest(str(folder), tuple(lines)), folder / "manifest.json")


def child(kind: str, limit: int = 0, **options: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    if limit:
        command = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {result.returncode}\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(folder: Path, shards: int, batch_size: int, dali_shards: Sequence[int]) -> None:
    from importlib.metadata import version

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}, ",
        end="",
    )
    print(f"DALI {version('nvidia-dali-cuda130')}; a process a line, n = 1; batch {batch_size}, rank 3 of 8")
    base = child("imports")
    print(f"torch and DALI imported and nothing else: RSS {base['rss']:.0f} MB, anonymous {base['anonymous']:.0f} MB\n")
    columns = [
        "samples",
        "first batch s",
        "its CPU s",
        "import s",
        "open s",
        "batch s",
        "step ms",
        "RSS MB",
        "anon. MB",
        "files",
        "maps",
    ]
    print(f"{'':34}" + "".join(f"{c:>14}" for c in columns))

    def line(label: str, r: dict[str, Any]) -> None:
        cells = [f"{r['samples']:,}", f"{r['first_batch_s']:.2f}", f"{r['cpu_s']:.2f}"]
        cells += [f"{r[key]:.2f}" if key in r else "-" for key in ("import_s", "open_s", "loader_and_batch_s")]
        cells += [f"{1000 * r['step_s']:.0f}" if "step_s" in r else "-", f"{r['rss']:,.0f}", f"{r['anonymous']:,.0f}"]
        cells += [str(r.get("open_files", "-")), str(r.get("mappings", "-"))]
        print(f"{label:34}" + "".join(f"{c:>14}" for c in cells), flush=True)

    common = {"batch_size": batch_size, "rank": 3, "ranks": 8}
    small = folder / "small.yaml"
    small.write_text(f'sources: [{{data: "{folder}/shard-0000{{00..19}}.tar"}}]')
    line("ours, 20 shards", child("ours", data=small, **common))
    whole = child("ours", data=folder, **common)
    line(f"ours, {shards:,} shards, streamed", whole)
    middle = whole["steps_per_epoch"] * 5 // 3
    line(f"  resumed at step {middle:,}", child("ours", data=folder, step=middle, **common))
    line("  with ulimit -n 256", child("ours", limit=256, data=folder, **common))
    everything = folder / "global.yaml"
    everything.write_text(f"sources: [{{data: {folder}}}]\nlanes: 1\nchunk_shards: all\n")
    line("  true global shuffle", child("ours", data=everything, **common))

    found = []
    for count in dali_shards:
        found.append(child("dali", data=folder, shards=count, batch_size=batch_size // 8))
        line(f"DALI's reader, {count:,} shards", found[-1])
    low, high = found[0], found[-1]
    scale = (shards * SAMPLES - high["samples"]) / (high["samples"] - low["samples"])
    grown = {key: high[key] + scale * (high[key] - low[key]) for key in ("first_batch_s", "cpu_s", "rss", "anonymous")}
    line(f"  {shards:,} shards, EXTRAPOLATED", {"samples": shards * SAMPLES, **grown})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the shards (default: a temporary folder)")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dali_shards", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--child", choices=["imports", "ours", "dali"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"imports": imports, "ours": ours, "dali": dali}[options.child](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_folder(Path(folder), options.shards)
        measure(Path(folder), options.shards, options.batch_size, options.dali_shards)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
