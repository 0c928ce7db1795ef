"""Ten million samples: how long from a new interpreter to the first batch, at the start and in the middle of an epoch.

    python benchmarks/resume_large.py --images DIR [--systems ours,torchdata,lancedb] [--peers FOLDER] [--rounds 3]

One rank, batch 24, two views of 32 pixels, as in `resume.py`; each measurement is a process of its own, the systems in
turn. Ours: 1,000 shards of 10,000 samples, hard-linked. torchdata: its StatefulDataLoader over as many paths, which
repeat. LanceDB: a table of ids alone, whose images are read from files, so nothing but ids is stored. The state in the
middle is one after two batches whose counts are set to five million samples. `scale.py` has LitData and Streaming at
this size and above, and ours at a billion. The last line is one JSON object, with a key a system.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.resume_data import environment, last_line, pack, small_images, write_images  # noqa: E402

SAMPLES, SHARD, BATCH = 10_000_000, 10_000, 24
IN_SAMPLES = {"samples_yielded", "yielded"}  # counts in torchdata's state
IN_BATCHES = {"_sampler_iter_yielded", "_num_yielded", "_snapshot_step"}


# --- children: each prints one JSON object ----------------------------------------------------------------------------


class Repeated:
    """The paths of a folder over and over."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Path:
        return self.paths[index % len(self.paths)]


def moved(state: Any, batches: int) -> Any:
    """The state with its counts set to `batches` batches."""
    if isinstance(state, dict):
        known = {**dict.fromkeys(IN_SAMPLES, batches * BATCH), **dict.fromkeys(IN_BATCHES, batches), "batches": batches}
        return {key: known.get(key, moved(value, batches)) for key, value in state.items()}
    return state


def moved_in_lancedb(state: dict[str, Any], batches: int) -> dict[str, Any]:
    each = batches * BATCH // 8  # of its eight splits
    return {
        key: dict.fromkeys(value, each) if isinstance(value, dict) else [each] * len(value)
        if isinstance(value, list) else value
        for key, value in state.items()
    }  # fmt: skip


def lance_rows(place: Any, saved: Any) -> tuple[Iterator[Any], Any]:
    import lancedb
    from lancedb.streaming import StreamingDataLoader, StreamingDataset

    from benchmarks.resume_systems import SEED, two_views

    paths = sorted((Path(place.data) / "images").glob("*.jpg"))

    def views_of(batch: Any) -> list[Any]:
        return [(i, two_views(paths[i % len(paths)].read_bytes())) for i in batch.column("id").to_pylist()]

    table = lancedb.connect(place.data).open_table("images")
    data = StreamingDataset(table, num_splits=8, shuffle_seed=SEED, epoch=0, rank=0, world_size=1, transform=views_of)
    if saved is not None:
        data.load_state_dict(StreamingDataset.merge_state_dicts(saved))
    return iter(StreamingDataLoader(data, batch_size=BATCH, num_workers=0)), data.state_dict


def child(system: str, data: Path, state: Path, began: float, middle: bool) -> dict[str, float]:
    from benchmarks import resume_peers
    from benchmarks.resume_systems import Place, open_ours

    place = Place(str(data), SAMPLES, BATCH, 1, 0, 1, 2 if system == "torchdata" else 0, 1, data.parent)
    saved = pickle.loads(state.read_bytes()) if middle else None
    batches: Iterator[Any]
    if system == "lancedb":
        batches, take = lance_rows(place, saved)
    else:
        if system == "torchdata":
            plain = resume_peers.images_in
            resume_peers.images_in = lambda folder: Repeated(plain(folder))  # type: ignore[assignment,return-value]
        opened = open_ours(place, saved) if system == "ours" else resume_peers.OPEN[system](place, saved)
        batches, take = opened.batches, opened.state
    next(batches)
    found = {"seconds": time.time() - began, "cpu": time.process_time()}
    status = Path("/proc/self/status").read_text()
    found["mb"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
    if not middle:
        next(batches)
        half = SAMPLES // BATCH // 2
        one = take()
        state.write_bytes(pickle.dumps([moved_in_lancedb(one, half) if system == "lancedb" else moved(one, half)]))
    return found


# --- the parent -------------------------------------------------------------------------------------------------------


def make_data(images: Path, work: Path, systems: list[str], peers: Path) -> None:
    small = small_images(images, SHARD)
    write_images(small, work / "images", 0, SHARD)
    if "ours" in systems:
        pack(work / "images", work / "ours", a_shard=SHARD)
        manifest = json.loads((work / "ours" / "manifest.json").read_text())
        (first,) = manifest["shards"]
        shards = [{**first, "path": f"shard-{i:06d}.tar"} for i in range(SAMPLES // SHARD)]
        for shard in shards[1:]:
            for name in ("tar", "idx"):
                target = (work / "ours" / shard["path"]).with_suffix(f".{name}")
                target.hardlink_to(work / "ours" / f"shard-000000.{name}")
        content = {**manifest, "samples": SAMPLES, "shards": shards}
        (work / "ours" / "manifest.json").write_text(json.dumps(content))
    if "torchdata" in systems:
        (work / "torchdata").symlink_to(work / "images")
    if "lancedb" in systems:
        (work / "lancedb").mkdir()
        (work / "lancedb" / "images").symlink_to(work / "images")
        code = (
            "import lancedb, pyarrow, sys; lancedb.connect(sys.argv[1]).create_table('images', "
            f"pyarrow.table({{'id': pyarrow.array(range({SAMPLES}), pyarrow.int64())}}))"
        )
        python = peers / "lancedb" / "bin" / "python"
        subprocess.run([str(python), "-c", code, str(work / "lancedb")], check=True, env=environment())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images, at any depth")
    parser.add_argument("--systems", default="ours", help="some of ours,torchdata,lancedb")
    parser.add_argument("--peers", type=Path, default=REPOSITORY / ".peers", help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure; medians are shown")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child:
        system, data, began, middle = o.child
        state = Path(data).parent / f"{system}.state"
        print(json.dumps(child(system, Path(data), state, float(began), middle == "middle")))
        return
    if o.images is None or not o.images.is_dir():
        parser.error(f"--images is {o.images}; give a folder of images")
    systems = o.systems.split(",")
    from benchmarks.hardware import hardware
    from benchmarks.resume import python_of

    facts = hardware("cpu")
    found: dict[str, dict[str, list[dict[str, float]]]] = {s: {"start": [], "middle": []} for s in systems}
    results = dict[str, Any]()
    print(f"{SAMPLES:,} samples; {facts['cpu_cores']} cores, load {os.getloadavg()[0]:.1f}, n {o.rounds}")
    with tempfile.TemporaryDirectory(prefix="resume-large-") as name:
        work = Path(name)
        make_data(o.images, work, systems, o.peers)
        for _ in range(o.rounds):
            for system in systems:
                for where in ("start", "middle"):
                    command = [str(python_of(system, o.peers)), str(Path(__file__).resolve()), "--child", system]
                    command += [str(work / system), str(time.time()), where]
                    done = subprocess.run(command, capture_output=True, text=True, env=environment())
                    if done.returncode:
                        results[system] = {"error": last_line(done.stderr)}
                        break
                    found[system][where].append(json.loads(done.stdout.splitlines()[-1]))
    for system in systems:
        for where, rows in found[system].items():
            if "error" not in results.setdefault(system, {}):
                row = {name: round(statistics.median(r[name] for r in rows), 2) for name in rows[0]}
                results[system][where] = row
                print(f"{system:<12}{where:<8} first batch {row['seconds']:.1f} s, {row['cpu']:.1f} s of CPU "
                      f"(without workers), {row['mb']:.0f} MB", flush=True)  # fmt: skip
        if "error" in results[system]:
            print(f"{system}: {results[system]['error']}")
    print(f"load {os.getloadavg()[0]:.1f}")
    text = json.dumps({**results, "hardware": facts})
    if o.output:
        o.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
