"""A billion samples in 100,000 shards: how long until the first batch, and how much memory a rank takes.

    python benchmarks/scale.py --folder SCRATCH [--peers DIR]    # needs 0.7 GB and 310,000 directory entries there

The shards are real: 20 tars of 10,000 small JPEGs, hard-linked 5,000 times each, every link with its own line in the
manifest. Every measurement is a process of its own that starts from nothing; rounds go over all of them in turn, and
medians are printed. Beside ours:

- DALI's `fn.readers.webdataset` over the first shards of the same folder, as many as memory allows;
- LitData and mosaicml-streaming over files and an index of their own formats (`scale_peers.py`), run by the Python of
  DIR/litdata and DIR/streaming: virtual environments made from benchmarks/peers/*.txt. A missing one is named.

Continued lines load the system's own state, its count set to the middle of an epoch. Streaming runs as the only rank:
on a node with more, the first makes the order of the epoch and each keeps its part. Lines marked EXTRAPOLATED are the
straight line through the two largest sizes measured.
"""

import argparse
import io
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from benchmarks.scale_peers import SAMPLES, first, memory  # noqa: E402 - as a script, its own folder is on the path

REAL_TARS = 20
PEERS = ("litdata", "streaming")
COLUMNS = {  # key of a result: heading, decimals, factor
    "samples": ("samples", 0, 1),
    "first_batch_s": ("first batch s", 2, 1),
    "cpu_s": ("its CPU s", 2, 1),
    "import_cpu_s": ("of imports", 2, 1),
    "step_s": ("step ms", 0, 1000),
    "rss": ("RSS MB", 0, 1),
    "anonymous": ("own MB", 0, 1),
    "peak": ("peak MB", 0, 1),
    "state_bytes": ("state kB", 1, 0.001),
    "open_files": ("files", 0, 1),
    "mappings": ("maps", 0, 1),
}
GROWS = ("first_batch_s", "cpu_s", "rss", "anonymous", "peak", "state_bytes")


# --- children: each prints one JSON object ----------------------------------------------------------------------------


def imports(_: argparse.Namespace) -> dict[str, Any]:
    import nvidia.dali.fn
    import torch

    assert torch and nvidia.dali.fn
    return memory()


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from pipeline.loader import Loader
    from pipeline.sources.opening import open_source

    imported = time.perf_counter(), time.process_time()
    source = open_source(options.data, progress=False)
    opened = time.perf_counter()
    loader = Loader(source, batch_size=options.batch_size, rank=options.rank, world_size=options.ranks, num_threads=1)
    if options.state:
        loader.load_state_dict(pickle.loads(options.state.read_bytes()))
    batch = next(loader)
    result = first(imported, opened) | {"samples": source.samples, "ids": batch.sample_ids[:4].tolist()}
    began = time.perf_counter()
    for _ in range(20):
        next(loader)
    result |= {"step_s": (time.perf_counter() - began) / 20, "rss_after_20": memory()["rss"]}
    if options.save:
        options.save.write_bytes(pickle.dumps({**loader.state_dict(), "batches": options.step}))
        result["state_bytes"] = options.save.stat().st_size
    loader.close()
    return result


# --- the parent -------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, shards: int) -> None:
    import numpy as np
    from PIL import Image

    from pipeline.files import write_atomically
    from pipeline.sources.index import format_index, index_tar
    from pipeline.sources.manifest import Manifest, Shard, save_manifest
    from pipeline.sources.scan import checksum_of

    rng = np.random.default_rng(0)
    pictures = []
    (folder / "pictures").mkdir()
    for p in range(200):
        stream = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=80)
        pictures.append(stream.getvalue())
        (folder / "pictures" / f"{p:03d}.jpg").write_bytes(stream.getvalue())
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


class Row(NamedTuple):
    label: str
    system: str
    options: dict[str, Any]
    limit: int = 0  # of open files


def run(row: Row, python: str) -> dict[str, Any]:
    """One process: what it measured, or {"error": the last line that it said}."""
    script = [str(REPOSITORY / "benchmarks/scale_peers.py"), "read", row.system]
    if row.system in ("ours", "imports"):
        script = [__file__, "--child", row.system]
    command = [python, *script, *(part for key, value in row.options.items() for part in (f"--{key}", str(value)))]
    if row.limit:
        command = ["bash", "-c", f'ulimit -n {row.limit}; exec "$@"', "bash", *command]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if result.returncode and row.system == "ours":
        raise RuntimeError(f"{row.label}: exit {result.returncode}\n{result.stderr[-3000:]}")
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or [f"exit {result.returncode}"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def write_peer(system: str, python: str, folder: Path, shards: Sequence[int]) -> str:
    """Has a system write its files; returns why not, or nothing."""
    command = [python, str(REPOSITORY / "benchmarks/scale_peers.py"), "write", system, "--data", str(folder / system)]
    command += ["--pictures", str(folder / "pictures"), "--real", str(REAL_TARS), "--shards", *map(str, shards)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if not result.returncode else (result.stderr.strip().splitlines() or ["no message"])[-1]


def rows_of_ours(folder: Path, shards: int, batch_size: int) -> list[Row]:
    """A line that continues does so from a state that an earlier one of the same data has left, or `saved_by_four`."""
    small, everything = folder / "small.yaml", folder / "global.yaml"
    small.write_text(f'sources: [{{data: "{folder}/shard-0000{{00..19}}.tar"}}]')
    everything.write_text(f"sources: [{{data: {folder}}}]\nlanes: 1\nchunk_shards: all\n")
    here: dict[str, Any] = {"data": folder, "batch_size": batch_size, "rank": 3, "ranks": 8}
    middle, state = shards * SAMPLES // batch_size // 2, folder / "ours.state"
    return [
        Row("ours, 20 shards", "ours", here | {"data": small}),
        Row(f"ours, {shards:,} shards, streamed", "ours", here | {"save": state, "step": middle}),
        Row(f"  continued at step {middle:,}", "ours", here | {"state": state}),
        Row("  the same, saved by 4 ranks", "ours", here | {"state": folder / "ours.4.state"}),
        Row("  with ulimit -n 256", "ours", here, limit=256),
        Row("  true global shuffle", "ours", here | {"data": everything}),
    ]


def rows_of_peers(folder: Path, batch_size: int, options: argparse.Namespace) -> list[list[Row]]:
    """In groups; the last two lines of a group are extrapolated where they are of fewer samples than ours."""
    mine = {"batch_size": batch_size // 8}
    groups: list[list[Row]] = []
    for system, name, largest in (("litdata", "LitData", 1), ("streaming", "Streaming", 2)):
        fresh, continued, other_ranks = [], [], []
        sizes = getattr(options, f"{system}_shards")
        for n in sizes:
            state, middle = folder / f"{system}-{n}.state", n * SAMPLES // batch_size // 2
            place = {"rank": 3 if system == "litdata" else 0, "ranks": 8}
            there = {"data": folder / system / str(n), "shards": n, **mine, **place}
            fresh.append(Row(f"{name}, {n:,} shards", system, there | {"save": state, "step": middle}))
            if n in sizes[-largest:]:
                continued.append(Row(f"{name}, {n:,}, continued", system, there | {"state": state}))
            if system == "litdata" and n <= options.litdata_other_ranks:
                state = state.with_suffix(".4.state")
                other_ranks.append(Row(f"{name}, {n:,}, saved by 4 ranks", system, there | {"state": state}))
        groups += [fresh, continued, other_ranks]
    there = {"data": folder, **mine}
    groups.append([Row(f"DALI's reader, {n:,} shards", "dali", there | {"shards": n}) for n in options.dali_shards])
    return groups


def saved_by_four(rows: Sequence[Row]) -> list[Row]:
    """These leave the states `.4.state`: the same data read by rank 1 of 4, to the same place in the epoch."""
    found = []
    for row in rows:
        if ".4." in str(row.options.get("state", "")):
            plain = next(r for r in rows if "save" in r.options and r.options["data"] == row.options["data"])
            mine = row.options["batch_size"] * (1 if row.system == "ours" else 2)  # ours is the batch of all ranks
            changed = {"save": row.options["state"], "batch_size": mine, "rank": 1, "ranks": 4}
            found.append(Row(f"{row.label}: saving", row.system, plain.options | changed))
    return found


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Key by key, over the runs that ended well; the first error where none did."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return runs[0]
    return {"n": len(good)} | {key: statistics.median(run[key] for run in good) for key in COLUMNS if key in good[0]}


def extrapolated(low: dict[str, Any], high: dict[str, Any], samples: int) -> dict[str, Any]:
    """The straight line through two measurements, at a number of samples."""
    scale = (samples - high["samples"]) / (high["samples"] - low["samples"])
    return {"samples": samples} | {key: high[key] + scale * (high[key] - low[key]) for key in GROWS if key in high}


def formatted(label: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{label:36}  {result['error']}"
    texts = []
    for key, (heading, decimals, factor) in COLUMNS.items():
        text = f"{result[key] * factor:,.{decimals}f}" if key in result else "-"
        texts.append(f"{text:>{max(9, len(heading) + 2)}}")
    return f"{label:36}" + "".join(texts)


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The lines of the table, and all that was measured."""
    pythons = {name: str(options.peers / name / "bin/python") for name in PEERS}
    sizes = {name: getattr(options, f"{name}_shards") for name in PEERS}
    absent = {name: write_peer(name, pythons[name], folder, sizes[name]) for name in PEERS if sizes[name]}
    groups = [rows_of_ours(folder, options.shards, options.batch_size)]
    groups += rows_of_peers(folder, options.batch_size, options)
    groups = [group for group in groups if group and not absent.get(group[0].system)]
    rows = [row for group in groups for row in group]
    loads = [os.getloadavg()[0]]
    base = Row("torch and DALI imported, nothing else", "imports", {})
    runs: dict[str, list[dict[str, Any]]] = {row.label: [] for row in [base, *rows]}
    for row in saved_by_four(rows):
        run(row, pythons.get(row.system, sys.executable))
    for _ in range(options.rounds):
        for row in [base, *rows]:
            result = run(row, pythons.get(row.system, sys.executable))
            runs[row.label].append(result)
            print(f"{row.label}: {result}", file=sys.stderr, flush=True)
        loads.append(os.getloadavg()[0])

    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}
    for row in rows:
        if "version" in runs[row.label][0]:
            versions[row.system] = runs[row.label][0]["version"]
    told = ", ".join(f"{name} {text}" for name, text in versions.items())
    load = f"load {min(loads):.1f} to {max(loads):.1f}"
    lines = [f"{platform.machine()}, {os.cpu_count()} cores, {load}; {told}; {date.today()}"]
    lines.append(f"medians of {options.rounds} processes a line, in turn; batch {options.batch_size} over 8 ranks")
    lines += [f"{name}: not measured: {error}" for name, error in absent.items() if error]
    heads = "".join(f"{heading:>{max(9, len(heading) + 2)}}" for heading, _, _ in COLUMNS.values())
    table = {label: medians(found) for label, found in runs.items()}
    lines += ["", " " * 36 + heads, formatted(base.label, table[base.label])]
    total = options.shards * SAMPLES
    for group in groups:
        lines += [formatted(row.label, table[row.label]) for row in group]
        low, high = (table[row.label] for row in (group[max(0, len(group) - 2)], group[-1]))
        if group[0].system == "ours" or low is high or "error" in low or "error" in high or high["samples"] >= total:
            continue
        beyond = extrapolated(low, high, total)
        table[f"{group[-1].label}, EXTRAPOLATED"] = beyond
        lines.append(formatted(f"  {options.shards:,} shards, EXTRAPOLATED", beyond))
    return lines, {"versions": versions, "loads": loads, "not_measured": absent, "medians": table, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the shards (default: a temporary folder)")
    parser.add_argument("--peers", type=Path, default=REPOSITORY / ".peers", help="folder of the peers' environments")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each line; medians are over these")
    parser.add_argument("--shards", type=int, default=100_000, help="of 10,000 samples each, for ours")
    parser.add_argument("--batch_size", type=int, default=256, help="of all 8 ranks")
    parser.add_argument("--dali_shards", type=int, nargs="*", default=[200, 800], help="sizes for DALI's reader")
    parser.add_argument("--litdata_shards", type=int, nargs="*", default=[100, 1000, 100_000], help="sizes for LitData")
    parser.add_argument("--litdata_other_ranks", type=int, default=1000, help="the largest continued on other ranks")
    parser.add_argument("--streaming_shards", type=int, nargs="*", default=[100, 1000, 5000], help="for Streaming")
    parser.add_argument("--child", choices=["imports", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"imports": imports, "ours": ours}[options.child](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_folder(Path(folder), options.shards)
        lines, results = measure(Path(folder), options)
    print("\n".join(lines))
    if options.output:
        options.output.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
