"""Images -> WebDataset tar shards, their index, a manifest.

    python pipeline/make_shards.py SRC DEST

1. List: every image of SRC, in a fixed order, into a listing on disk (`pipeline.collect`).
2. Hash, with `--dedup`: the contents, in parallel; equal ones but the first drop out.
3. Plan: a permutation by the seed, cut into shards (`pipeline.plan`); known before any image is looked at.
4. Pack: each shard by one worker (`pipeline.pack`), verified. A shard that is done has a record; the same command after
   an interruption packs those without one.
5. Finish: found = packed + rejected + duplicates; manifest, lists, contact sheet, table (`pipeline.finish`).
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import xxhash
from jsonargparse import ArgumentParser

from pipeline import destination, lists, workers
from pipeline.card import is_pattern
from pipeline.collect import Found, Listing, collect
from pipeline.finish import finish, table
from pipeline.pack import HashTask, Item, PackTask, hash_contents, pack
from pipeline.plan import Planned, find_duplicates, image_numbers, plan
from pipeline.storage import is_remote, local_path
from pipeline.verify import Options

STATE = ".make_shards"  # in DEST: the listing and the records of finished shards, until all are
SUMMARY = "make_shards.json"  # in DEST: what it was made from, when all is done
LISTING = (
    "listing.jsonl",
    "listing.bin",
    "listing.json",
    "job.json",
)  # in this order: the last one says that all are there
OURS = re.compile(
    r"shard-\d{6,}\.(tar|idx)|manifest\.json|rejected\.jsonl|duplicates\.jsonl|contact_sheet\.png|make_shards\.json"
)
HASHED_TOGETHER = 5_000


def make_shards(
    src: str,
    dest: str,
    *,
    options: Options,
    seed: int = 0,
    samples_per_shard: int = 10_000,
    shard_bytes: int = 500_000_000,
    labels: str = "auto",
    classes: str = "",
    holdout: float = 0.0,
    dedup: bool = False,
    overwrite: bool = False,
    num_workers: int = 0,
    scheduler: str = "",
) -> None:
    """Packs the images of `src` into shards in `dest`; prints the table of what came of it.

    ValueError, FileNotFoundError and OSError say what to do; the same call then goes on where this one stopped.
    """
    began = time.monotonic()
    src = src if is_remote(src) else os.path.abspath(local_path(src))  # noqa: PTH100 (links stay as they were named)
    dest = dest if is_remote(dest) else str(local_path(dest).resolve())
    job: dict[str, Any] = {
        "src": src,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "shard_bytes": shard_bytes,
        "labels": labels if labels in ("auto", "none") else _digest(labels),
        "classes": _digest(classes) if classes else "",
        "holdout": holdout,
        "dedup": dedup,
        **asdict(options),
    }
    how: dict[str, Any] = {"workers": num_workers or len(os.sched_getaffinity(0)), "scheduler": scheduler}

    def write_listing(folder: Path) -> Listing:
        found = Found()
        entries = collect(src, found, exclude=dest)
        if labels not in ("auto", "none"):
            entries = lists.labelled(entries, labels)
        with workers.bar("listing", entries) as counted:
            names = lists.class_names(classes) if classes else []
            listing = Listing.write(folder, counted, found, classes=names, labels=labels != "none")
        if not len(listing):
            others = ", ".join(f"{count} {kind}" for kind, count in found.ignored.most_common(5))
            remedy = "; archives in folders of it are not opened: name their folder" if found.ignored["tar"] else ""
            raise ValueError(f"no images in {src}: it holds {others or 'nothing'}{remedy}")
        return listing

    if not is_remote(src) and not is_pattern(src) and not Path(src).exists():
        raise FileNotFoundError(f"no such folder or file: {src}")
    if not scheduler:
        workers.warm_up()
    if overwrite:
        remove_ours(dest)
    if is_complete(dest, job, write_listing):
        return
    with state_folder(dest) as state:
        records = destination.join(dest, STATE)
        listing = begun(state, job, dest)
        if listing is None:
            listing = write_listing(state)
            (state / "job.json").write_text(json.dumps(job))
            _copy_up(state, records)
        kept = remove_duplicates(listing, state, records, how) if dedup else None
        shards = plan(
            listing.sizes, kept, seed, holdout=holdout, samples_per_shard=samples_per_shard, shard_bytes=shard_bytes
        )
        for split in dict.fromkeys(shard.split for shard in shards):
            destination.make_folder(destination.join(dest, split).rstrip("/"))
        done = finished(dest, shards)
        if done:
            print(f"going on: {len(done):,} of {len(shards):,} shards are done")
        workers.run(
            pack,
            pack_tasks(listing, kept, seed, (shard for shard in shards if shard not in done), dest, options),
            what="packing",
            total=sum(shard.end - shard.begin for shard in shards),
            done=sum(shard.end - shard.begin for shard in done),
            **how,
        )
        if missing := set(shards) - finished(dest, shards):
            raise ValueError(
                f"{len(missing)} shards were packed but are not in {dest}: do all workers see that folder?"
            )
        counts = finish(dest, records, state, listing, shards, seed)
    summary = {"job": job, "digest": listing.summary["digest"], **counts}
    destination.write(destination.join(dest, SUMMARY), json.dumps(summary, indent=1).encode())
    remove_state(dest)
    print(table(counts, dest, time.monotonic() - began))


def pack_tasks(
    listing: Listing, kept: np.ndarray | None, seed: int, shards: Iterator[Planned], dest: str, options: Options
) -> Iterator[PackTask]:
    count = len(listing) if kept is None else len(kept)
    for shard in shards:
        items = []
        for number in image_numbers(shard.begin, shard.end, count, kept, seed).tolist():
            entry = listing[number]
            own = any(name == "cls" for name, _, _ in entry.beside or ())
            items.append(Item(number, entry, None if own and entry.label is None else listing.label(entry)))
        tar = destination.join(dest, f"{shard.name}.tar")
        yield PackTask(tar, destination.join(dest, f"{STATE}/{shard.record}"), items, options)


def finished(dest: str, shards: list[Planned]) -> set[Planned]:
    """The shards that have a record, and are there unless nothing was left of them."""
    records = destination.names(destination.join(dest, STATE))
    splits = {shard.split for shard in shards}
    tars = {split: destination.names(destination.join(dest, split).rstrip("/")) for split in splits}
    done = set()
    for shard in shards:
        if shard.record in records:
            there = f"shard-{shard.number:06d}.tar" in tars[shard.split]
            if there or not json.loads(destination.read(destination.join(dest, f"{STATE}/{shard.record}")))["samples"]:
                done.add(shard)
    return done


def remove_duplicates(listing: Listing, state: Path, records: str, how: dict[str, Any]) -> np.ndarray:
    """Numbers of the images that are not the same as an earlier one."""
    names = [f"hashes-{i:06d}" for i in range(-(-len(listing) // HASHED_TOGETHER))]
    there = destination.names(records)

    def tasks() -> Iterator[HashTask]:
        for i, name in enumerate(names):
            if name not in there:
                numbers = range(i * HASHED_TOGETHER, min((i + 1) * HASHED_TOGETHER, len(listing)))
                yield HashTask(destination.join(records, name), [listing[n] for n in numbers])

    done = min(len(there & set(names)) * HASHED_TOGETHER, len(listing))
    workers.run(hash_contents, tasks(), what="hashing", total=len(listing), done=done, **how)
    with (state / "hashes.bin").open("wb") as file:
        for name in names:
            file.write(destination.read(destination.join(records, name)))
    kept, _ = find_duplicates(np.memmap(state / "hashes.bin", np.uint64, "r").reshape(-1, 2), state)
    return kept


@contextlib.contextmanager
def state_folder(dest: str) -> Iterator[Path]:
    """The local folder with the listing: DEST/.make_shards itself, or for a remote DEST a copy of that."""
    if not is_remote(dest):
        folder = local_path(destination.join(dest, STATE))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            remove_leftovers(folder.parent)
            yield folder
            remove_leftovers(folder.parent)
        finally:
            if not (folder / "job.json").exists():  # nothing was begun, nothing is left behind
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # if it is empty
        return
    with tempfile.TemporaryDirectory(prefix="make_shards-") as temporary:
        if set(LISTING) <= destination.names(destination.join(dest, STATE)):
            fs, root = destination.file_system(destination.join(dest, STATE))
            for name in LISTING:
                fs.get_file(f"{root}/{name}", str(Path(temporary) / name))
        yield Path(temporary)


def remove_leftovers(dest: Path) -> None:
    """What workers that were killed had not finished."""
    for place in (dest, dest / "train", dest / "val"):
        for left in place.glob(".shard-*.tmp"):
            left.unlink(missing_ok=True)


def begun(state: Path, job: dict[str, Any], dest: str) -> Listing | None:
    """The listing of an interrupted run of the same job; ValueError when it was another job."""
    if not (state / "job.json").exists():
        if any(re.fullmatch(r".*\.tar", name) for name in destination.names(dest)):
            raise ValueError(f"{dest} holds tars that make_shards did not begin: name another folder")
        return None
    before = json.loads((state / "job.json").read_text())
    if before != job and not any(name.endswith(".json") and "shard-" in name for name in destination.names(str(state))):
        remove_state(dest)  # no shard is done: the mistake in the earlier command costs nothing
        state.mkdir(exist_ok=True)
        return None
    refuse_if_changed(before, job, dest)
    return Listing(state)


def refuse_if_changed(before: dict[str, Any], job: dict[str, Any], dest: str) -> None:
    changed = [f"{name} {before.get(name)} there, {job[name]} now" for name in job if before.get(name) != job[name]]
    if changed:
        raise ValueError(
            f"{dest} was made otherwise ({'; '.join(changed)}): name another folder, or add --overwrite to make it anew"
        )


def is_complete(dest: str, job: dict[str, Any], write_listing: Any) -> bool:
    """Whether `dest` is done already, with the same inputs and options; ValueError when they were others."""
    if SUMMARY not in destination.names(dest):
        return False
    summary = json.loads(destination.read(destination.join(dest, SUMMARY)))
    refuse_if_changed(summary["job"], job, dest)
    with tempfile.TemporaryDirectory(prefix="make_shards-") as folder:
        listing = write_listing(Path(folder))
        if listing.summary["digest"] != summary["digest"]:
            raise ValueError(
                f"{dest} was made from {summary['found']:,} images that are no longer those of {job['src']} "
                f"({len(listing):,} now): name another folder, or add --overwrite to make it anew"
            )
    remove_state(dest)
    print(f"{dest} is complete: {summary['packed']:,} of {summary['found']:,} images packed; nothing to do")
    return True


def remove_ours(dest: str) -> None:
    """Deletes what make_shards wrote, nothing else."""
    there = destination.names(dest)
    if SUMMARY not in there and STATE not in there:
        return
    destination.remove(destination.join(dest, SUMMARY))  # first: what is left then is not taken for complete
    for split in ("", "train", "val"):
        folder = destination.join(dest, split).rstrip("/")
        for name in destination.names(folder):
            if OURS.fullmatch(name):
                destination.remove(destination.join(folder, name))
    remove_state(dest)


def remove_state(dest: str) -> None:
    place = destination.join(dest, STATE)
    if not is_remote(place):
        shutil.rmtree(local_path(place), ignore_errors=True)
    elif destination.names(place):
        fs, path = destination.file_system(place)
        fs.rm(path, recursive=True)


def _copy_up(state: Path, records: str) -> None:
    if is_remote(records):
        fs, path = destination.file_system(records)
        for name in LISTING:
            fs.put_file(str(state / name), f"{path}/{name}")


def _digest(place: str) -> str:
    """A file by its content, so that another one under the same name is noticed."""
    where = destination.join(place, "manifest.json") if not is_remote(place) and local_path(place).is_dir() else place
    return f"{place} {xxhash.xxh3_64_hexdigest(destination.read(where))}"


def main() -> int:
    parser = ArgumentParser(prog="make_shards", description="Images -> WebDataset tar shards, their index, a manifest.")
    add = parser.add_argument
    add(
        "src",
        type=str,
        help="folder, list (.txt .csv .tsv .parquet), .tar, .zip, shards ({000000..000099}.tar), or a URL",
    )
    add("dest", type=str, help="folder or URL that the shards go to")
    add("--seed", type=int, default=0, help="of the shuffle")
    add("--workers", type=int, default=0, help="processes; 0: one for each core")
    add(
        "--scheduler",
        type=str,
        default="",
        help="address of a Dask scheduler: its workers pack instead of local processes",
    )
    add("--samples_per_shard", type=int, default=10_000, help="a shard is full at this many images")
    add("--shard_bytes", type=int, default=500_000_000, help="or at this many bytes of images, as they are in SRC")
    add(
        "--labels",
        type=str,
        default="auto",
        help="auto: of the source, its folders; none; or a file of names and labels",
    )
    add(
        "--classes", type=str, default="", help="class names in the order of their numbers: a text file or another DEST"
    )
    add(
        "--holdout",
        type=float,
        default=0.0,
        help="fraction (0.1) or number (5000) of images for DEST/val, the others to DEST/train",
    )
    add("--dedup", action="store_true", help="leave out exact duplicates (reads every image twice)")
    add("--short_side", type=int, default=0, help="shrink images whose shorter side is longer than this many pixels")
    add("--quality", type=int, default=90, help="JPEG quality of what is encoded again")
    add("--convert", action="store_true", help="other formats to JPEG")
    add("--min_side", type=int, default=0, help="reject images with a shorter side than this many pixels")
    add("--max_pixels", type=int, default=100_000_000, help="reject images with more pixels")
    add(
        "--no_verify", action="store_true", help="do not decode: damaged images are packed and cost samples in training"
    )
    add("--overwrite", action="store_true", help="delete what make_shards wrote to DEST before, begin anew")
    given = vars(parser.parse_args())
    fields = ("no_verify", "max_pixels", "min_side", "short_side", "quality", "convert")
    options = Options(**{name: given.pop(name) for name in fields})
    try:
        for name in ("samples_per_shard", "shard_bytes"):
            if given[name] < 1:
                raise ValueError(f"--{name} {given[name]}: at least 1")
        if not 1 <= options.quality <= 100:
            raise ValueError(f"--quality {options.quality}: from 1 to 100")
        if given["holdout"] < 0:
            raise ValueError(f"--holdout {given['holdout']:g}: a fraction below 1, or a number of images")
        if options.no_verify:
            print("--no_verify: damaged images are packed; each will cost a sample in training", file=sys.stderr)
        make_shards(given.pop("src"), given.pop("dest"), options=options, num_workers=given.pop("workers"), **given)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # without waiting for the shards in work; workers end with their parent
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = ": make room, then the same command goes on where this one stopped" if full else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
