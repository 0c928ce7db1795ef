"""Images -> WebDataset tar shards, their index, a manifest.

    python pipeline/make_shards.py SRC DEST

1. List: every image of SRC, in sorted order, into a listing on disk (`pipeline.collect`).
2. Plan: a permutation by the seed, cut into shards by samples and bytes. The plan does not depend on what the images turn out to be.
3. Pack: each shard by one worker process (`pipeline.pack`), verified; finished shards are skipped when the command is run again.
4. Finish: manifest.json, rejected.jsonl; found = packed + rejected.
"""

import concurrent.futures as futures
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from jsonargparse import ArgumentParser
from tqdm import tqdm

from pipeline import pack
from pipeline.collect import Found, Listing, collect
from pipeline.index import write_atomically
from pipeline.manifest import Manifest, Shard, save_manifest

STATE = ".make_shards"  # the listing and the records of finished shards, until all are
SUMMARY = "make_shards.json"  # what DEST was made from


def plan(listing: Listing, seed: int, samples_per_shard: int, shard_bytes: int) -> list[np.ndarray]:
    """Numbers of the images of each shard: a permutation of the whole, cut where a shard is full."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(listing))
    ends = np.cumsum(np.maximum(listing.sizes[order], 0))
    shards, begin = [], 0
    while begin < len(order):
        used = ends[begin - 1] if begin else 0
        full = int(np.searchsorted(ends, used + shard_bytes, side="right"))
        end = min(max(full, begin + 1), begin + samples_per_shard, len(order))
        shards.append(order[begin:end])
        begin = end
    return shards


def tasks(listing: Listing, shards: list[np.ndarray], dest: Path, options: pack.Options) -> Iterator[pack.Task]:
    """The shards that have no record yet."""
    label_of = {name: i for i, name in enumerate(listing.classes)}
    for s, numbers in enumerate(shards):
        name = f"shard-{s:06d}"
        if not (dest / STATE / f"{name}.json").exists():
            entries = ((int(i), listing[int(i)]) for i in numbers)
            items = [pack.Item(i, entry, label_of.get(entry.label or "")) for i, entry in entries]
            yield pack.Task(name, str(dest), str(dest / STATE), items, options)


def _start_worker(progress: Any) -> None:
    pack.PROGRESS = progress

    def follow_parent() -> None:  # killed without a word, the parent would leave its workers waiting for ever
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run(waiting: Iterator[pack.Task], *, workers: int, total: int, done: int) -> None:
    """Packs the waiting shards. On an error the shards in work are finished, no further ones begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.pack"])
    progress = context.Array("q", 2)
    bar = tqdm(total=total, initial=done, unit="image", smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 10)
    pool = futures.ProcessPoolExecutor(workers, context, _start_worker, (progress,))
    running: set[futures.Future[dict[str, Any]]] = set()
    error: BaseException | None = None
    start = time.monotonic()
    with pool, bar:
        while True:
            while error is None and len(running) < workers + 2 and (task := next(waiting, None)) is not None:
                running.add(pool.submit(pack.pack, task))
            if not running:
                break
            finished, running = futures.wait(running, timeout=0.5, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                error = error or future.exception()
            bar.set_postfix_str(f"{progress[1] / 1e6 / (time.monotonic() - start):.0f} MB/s", refresh=False)
            bar.update(done + progress[0] - bar.n)
    if error is not None:
        raise error


def make_shards(
    src: str,
    dest: str,
    *,
    seed: int = 0,
    workers: int = 0,
    samples_per_shard: int = 10_000,
    shard_bytes: int = 500_000_000,
    max_pixels: int = 100_000_000,
    no_verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Packs the images of `src` into shards in `dest`. ValueError, FileNotFoundError and OSError say what to do."""
    workers = workers or len(os.sched_getaffinity(0))
    options = pack.Options(no_verify=no_verify, max_pixels=max_pixels)
    job = {"seed": seed, "samples_per_shard": samples_per_shard, "shard_bytes": shard_bytes, **asdict(options)}
    target = Path(dest)
    state = target / STATE
    if not Path(src).expanduser().exists():
        raise FileNotFoundError(f"no such folder: {src}")
    if overwrite and (state.exists() or (target / SUMMARY).exists()):
        shutil.rmtree(target)
    state.mkdir(parents=True, exist_ok=True)
    listing = list_source(src, state, job)
    if (target / SUMMARY).exists():
        shutil.rmtree(state)
        print(f"{dest} is complete already: {len(listing):,} images found in {src}")
        return
    shards = plan(listing, seed, samples_per_shard, shard_bytes)
    finished = [len(numbers) for s, numbers in enumerate(shards) if (state / f"shard-{s:06d}.json").exists()]
    if finished:
        print(f"continuing: {len(finished)} of {len(shards)} shards are done")
    run(tasks(listing, shards, target, options), workers=workers, total=len(listing), done=sum(finished))
    finish(target, listing, shards, src, job)


def list_source(src: str, state: Path, job: dict[str, Any]) -> Listing:
    """The listing of an interrupted run, or a new one."""
    asked = {"src": str(Path(src).expanduser().resolve()), **job}
    path = state / "job.json"
    if path.exists() and (state / "listing.json").exists():
        before = json.loads(path.read_text())
        changed = [f"{k} {before.get(k)} -> {asked[k]}" for k in asked if before.get(k) != asked[k]]
        if changed:
            raise ValueError(
                f"{state.parent} was begun otherwise ({', '.join(changed)}): run the command as before, add --overwrite, or name another folder"
            )
        return Listing(state)
    found = Found()
    bar = tqdm(collect(src, found), desc="listing", unit="image", mininterval=0.5 if sys.stderr.isatty() else 10)
    listing = Listing.write(state, bar, found)
    if not len(listing):
        shutil.rmtree(state)
        raise ValueError(
            f"no images in {src}: it holds {sum(found.ignored.values())} other files {dict(found.ignored.most_common(5))}"
        )
    write_atomically(path, json.dumps(asked).encode())
    return listing


def finish(target: Path, listing: Listing, shards: list[np.ndarray], src: str, job: dict[str, Any]) -> None:
    """Manifest and lists from the records; counts must add up."""
    records = [json.loads((target / STATE / f"shard-{s:06d}.json").read_text()) for s in range(len(shards))]
    rejected = [line for record in records for line in record["rejected"]]
    packed = sum(record["samples"] for record in records)
    assert len(listing) == packed + len(rejected), (len(listing), packed, len(rejected))
    if not packed:
        raise ValueError(f"none of {len(listing)} images in {src} can be used; the first: {rejected[0]}")
    (target / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rejected))
    made = tuple(
        Shard(f"shard-{s:06d}.tar", record["samples"], record["bytes"], record["checksum"])
        for s, record in enumerate(records)
        if record["samples"]
    )
    save_manifest(Manifest(str(target), made, tuple(listing.classes)), target / "manifest.json")
    summary = {
        "src": src,
        "found": len(listing),
        "packed": packed,
        "rejected": len(rejected),
        "digest": listing.summary["digest"],
        **job,
    }
    write_atomically(target / SUMMARY, json.dumps(summary, indent=1).encode())
    shutil.rmtree(target / STATE)
    reasons = Counter(line["reason"] for line in rejected)
    image_bytes = sum(record["image_bytes"] for record in records)
    print(f"found {len(listing):,} = packed {packed:,} + rejected {len(rejected):,} {dict(reasons) or ''}")
    print(
        f"{len(made):,} shards, {len(listing.classes):,} classes, {image_bytes:,} bytes, {image_bytes / packed:,.0f} an image -> {target}"
    )


def main() -> int:
    parser = ArgumentParser(prog="make_shards", description="Images -> WebDataset tar shards, their index, a manifest.")
    parser.add_argument("src", type=str, help="folder of images; class folders give labels")
    parser.add_argument("dest", type=str, help="folder that the shards go to")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    parser.add_argument("--samples_per_shard", type=int, default=10_000)
    parser.add_argument(
        "--shard_bytes", type=int, default=500_000_000, help="a shard is full at this many bytes of images"
    )
    parser.add_argument("--max_pixels", type=int, default=100_000_000, help="larger images are rejected")
    parser.add_argument(
        "--no_verify", action="store_true", help="do not decode: damaged images are found in training, if at all"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete DEST if make_shards made it, begin anew")
    arguments = vars(parser.parse_args())
    try:
        make_shards(**arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
