"""Images -> WebDataset tar shards, their index, a manifest.

    python pipeline/make_shards.py SRC DEST

1. List: every image of SRC, in a fixed order, into a listing on disk (`pipeline.packing.collect`).
2. Hash, with `--dedup` or `--dedup_near`: contents or pictures, in parallel; like ones but the first drop out.
3. Plan: a permutation by the seed, cut into shards (`pipeline.packing.plan`); known before any image is looked at.
4. Pack: each shard by one worker (`pipeline.packing.shard`), verified. A shard that is done has a record; the same
   command after an interruption packs those without one (`pipeline.packing.journal`).
5. Finish: found = packed + rejected + duplicates; manifest, lists, contact sheet, table (`pipeline.packing.summary`).
"""

import glob
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import xxhash
from jsonargparse import ArgumentParser

from pipeline import files
from pipeline.command import command
from pipeline.files import is_remote, local_path
from pipeline.packing import lists, near, workers
from pipeline.packing.collect import SUMMARY, collect
from pipeline.packing.fetch import FAILED, NO_HEADERS, Headers, parse_headers
from pipeline.packing.journal import (
    JOURNAL,
    begin,
    begun,
    finished,
    finished_summary,
    journal_folder,
    refuse_other_images,
    remove_journal,
    remove_ours,
)
from pipeline.packing.listing import Listing
from pipeline.packing.plan import PlannedShard, find_duplicates, image_numbers, plan
from pipeline.packing.prepare import Options
from pipeline.packing.retry import begun_retry, further, new_retry
from pipeline.packing.shard import HashTask, PackTask, PlannedImage, TaskDone, hash_contents, pack
from pipeline.packing.summary import finish, table
from pipeline.packing.survey import Survey, listed_kinds
from pipeline.packing.tables import Unpacked
from pipeline.pixels.formats import Grey16, grey16_range
from pipeline.progress import Progress
from pipeline.sources.card import is_pattern, is_tar
from pipeline.sources.index import LABEL_EXTENSION
from pipeline.sources.manifest import NAME, load_manifest
from pipeline.sources.remote import reason

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
    label_key: str = "",
    image_key: str = "",
    classes: str = "",
    holdout: float = 0.0,
    dedup: bool = False,
    dedup_near: int = -1,
    headers: Headers = NO_HEADERS,
    max_failed: float = 1.0,
    retry_failed: bool = False,
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
    options = options if options.grey16_range else replace(options, grey16_range=known_range(src))
    job: dict[str, Any] = {
        "src": src,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "shard_bytes": shard_bytes,
        "labels": labels if labels in ("auto", "none") else _digest(labels),
        "classes": _digest(classes) if classes else "",
        "holdout": holdout,
        "dedup": dedup,
        **{name: value for name, value in asdict(options).items() if name != "grey16_range"},
    }
    if options.grey16_range:
        job["grey16_range"] = list(options.grey16_range)
    if dedup_near >= 0:
        job["dedup_near"] = dedup_near
        near.check_installed()
        if dedup:
            raise ValueError("--dedup_near finds exact duplicates too: drop --dedup")
    if image_key:
        job["image_key"] = image_key
    if label_key:
        job["label_key"] = label_key
        if labels != "auto":
            raise ValueError(f"--labels {labels} and --label_key {label_key} both say where the labels are: drop one")
    how: dict[str, Any] = {"workers": num_workers or len(os.sched_getaffinity(0)), "scheduler": scheduler}

    def write_listing(folder: Path, *, unpacks: bool = True) -> Listing:
        with Progress("listing") as progress, Unpacked(files.join(dest, JOURNAL)) as unpacked:
            survey = Survey(progress)
            keys = {"label_key": label_key, "image_key": image_key}
            images = collect(src, survey, exclude=dest, **keys, unpacked=unpacked if unpacks else None)
            if labels not in ("auto", "none"):
                images = lists.labelled(images, labels)
            names = lists.class_names(classes) if classes else []
            listing = Listing.write(folder, images, survey, classes=names, labels=labels != "none")
        if not len(listing):
            others = listed_kinds(survey.ignored)
            inside = survey.ignored["tar"] or survey.ignored["parquet"]
            remedy = "; archives and tables in folders of it are not opened: name their folder" if inside else ""
            raise ValueError(f"no images in {src}: it holds {others or 'nothing'}{remedy}")
        return listing

    if not is_remote(src) and not is_pattern(src) and not Path(src).exists():
        raise FileNotFoundError(f"no such folder or file: {src}")
    if src.rstrip("/") == dest.rstrip("/"):
        raise ValueError(f"SRC and DEST are both {src}: name another DEST, such as {files.join(src, 'shards')}")
    if is_remote(dest) and glob.has_magic(dest):  # what fsspec removes there would be all that matches
        raise ValueError(f"DEST {dest} is a URL with *, ? or [, which are patterns there: name another")
    if not scheduler:
        workers.warm_up()
    before = None if overwrite else finished_summary(dest, job)
    if retry_failed and not before:
        raise ValueError(f"{dest} is not complete: the same command without --retry_failed comes first")

    def write_same_listing(folder: Path, *, unpacks: bool = True) -> Listing:
        listing = write_listing(folder, unpacks=unpacks)
        refuse_other_images(listing, before or {}, dest)
        return listing

    ongoing = begun_retry(dest) if before else None
    if before and not retry_failed:
        with tempfile.TemporaryDirectory(prefix="make_shards-") as folder:
            write_same_listing(Path(folder), unpacks=False)
        print(f"{dest} is complete: {before['packed']:,} of {before['found']:,} images packed; nothing to do")
        if ongoing:
            print("a --retry_failed was interrupted here: the same command with that flag goes on with it")
        else:
            remove_journal(dest)
        return
    with journal_folder(dest) as journal:
        records = files.join(dest, JOURNAL)
        retry = None
        if before:
            retry = ongoing or new_retry(dest, before)
            if not retry.numbers:
                print(f"{dest} is complete, and all of its images were fetched: nothing to retry")
                return
            listing = Listing(journal) if ongoing else begin(journal, dest, retry._asdict(), write_same_listing)
            kept: np.ndarray | None = np.array(retry.numbers)
        else:
            if overwrite:
                remove_ours(dest)
            listing = begun(journal, job, dest) or begin(journal, dest, job, write_listing)
            kept = None
            if dedup:
                hashes = content_hashes(listing, journal, records, "hashes", hash_contents, headers, None, how)
                kept, _ = find_duplicates(hashes, journal)
            elif dedup_near >= 0:
                hashes = content_hashes(listing, journal, records, "near", near.hash_pictures, headers, options, how)
                kept, _ = near.find_near_duplicates(hashes, dedup_near, journal)
        shards = plan(
            listing.sizes,
            kept,
            seed,
            holdout=0 if retry else holdout,
            samples_per_shard=samples_per_shard,
            shard_bytes=shard_bytes,
        )
        shards = further(shards, retry) if retry else shards
        for split in dict.fromkeys(shard.split for shard in shards):
            files.make_folder(files.join(dest, split).rstrip("/"))
        done = finished(dest, shards)
        if done:
            print(f"going on: {len(done):,} of {len(shards):,} shards are done")
        total = sum(shard.end - shard.begin for shard in shards)
        workers.run(
            pack,
            pack_tasks(listing, kept, seed, (shard for shard in shards if shard not in done), dest, options, headers),
            what="packing",
            total=total,
            done=sum(shard.end - shard.begin for shard in done),
            check=failing(max_failed, total, records, done) if max_failed < 1 else None,
            **how,
        )
        if missing := set(shards) - finished(dest, shards):
            raise ValueError(
                f"{len(missing)} shards were packed but are not in {dest}: do all workers see that folder?"
            )
        counts = finish(dest, records, journal, listing, shards, seed, retry, options.grey16_range, headers)
    summary = {"job": job, "digest": listing.summary["digest"], **counts}
    files.write(files.join(dest, SUMMARY), json.dumps(summary, indent=1).encode())
    remove_journal(dest)
    print(table(counts, dest, time.monotonic() - began))


def pack_tasks(
    listing: Listing,
    kept: np.ndarray | None,
    seed: int,
    shards: Iterator[PlannedShard],
    dest: str,
    options: Options,
    headers: Headers = NO_HEADERS,
) -> Iterator[PackTask]:
    count = len(listing) if kept is None else len(kept)
    for shard in shards:
        images = []
        for number in image_numbers(shard.begin, shard.end, count, kept, seed).tolist():
            image = listing[number]
            own = any(sidecar.extension == LABEL_EXTENSION for sidecar in image.sidecars or ())
            images.append(PlannedImage(number, image, None if own and image.label is None else listing.label(image)))
        tar = files.join(dest, f"{shard.name}.tar")
        yield PackTask(tar, files.join(dest, f"{JOURNAL}/{shard.record}"), images, options, headers)


def failing(max_failed: float, total: int, records: str, done: Iterable[PlannedShard]) -> Callable[[TaskDone], None]:
    """Counts the images that could not be fetched, those of the shards that are done included. The function that it
    returns raises ValueError when they are more than this fraction of all."""
    rejected = (json.loads(files.read(files.join(records, shard.record)))["rejected"] for shard in done)
    failed = sum(line["reason"] in FAILED for lines in rejected for line in lines)

    def check(task: TaskDone) -> None:
        nonlocal failed
        failed += task.failed
        if failed > max_failed * total:
            raise ValueError(
                f"{failed:,} of {total:,} images could not be fetched, more than --max_failed {max_failed:g} allows "
                f"(one is {task.first_failed}): go on with a larger one and fetch them with --retry_failed at the end, "
                "or begin anew with --overwrite"
            )

    return check


def content_hashes(
    listing: Listing,
    journal: Path,
    records: str,
    kind: str,
    work: Callable[[HashTask], TaskDone],
    headers: Headers,
    options: Options | None,
    how: dict[str, Any],
) -> np.ndarray:
    """uint64 [n, 2]: what `work` makes of each image, in parallel; parts that are done are not done again."""
    names = [f"{kind}-{i:06d}" for i in range(-(-len(listing) // HASHED_TOGETHER))]
    there = files.names(records)

    def tasks() -> Iterator[HashTask]:
        for i, name in enumerate(names):
            if name not in there:
                numbers = range(i * HASHED_TOGETHER, min((i + 1) * HASHED_TOGETHER, len(listing)))
                yield HashTask(files.join(records, name), [listing[n] for n in numbers], options, headers)

    done = min(len(there & set(names)) * HASHED_TOGETHER, len(listing))
    workers.run(work, tasks(), what="hashing", total=len(listing), done=done, **how)
    with (journal / f"{kind}.bin").open("wb") as file:
        for name in names:
            file.write(files.read(files.join(records, name)))
    return np.memmap(journal / f"{kind}.bin", np.uint64, "r").reshape(-1, 2)


def known_range(src: str) -> Grey16 | None:
    """The range of 16-bit grey that the manifest of SRC gives, where SRC is shards of ours on this machine."""
    if is_remote(src):
        return None
    folder = Path(src) if Path(src).is_dir() else Path(src).parent
    if folder != Path(src) and not (is_tar(src) or is_pattern(src)):
        return None
    try:
        return load_manifest(folder / NAME).grey16_range
    except (ValueError, OSError):  # there is none, or it is of something else
        return None


def _digest(place: str) -> str:
    """A file by its content, so that another one under the same name is noticed."""
    where = files.join(place, "manifest.json") if not is_remote(place) and local_path(place).is_dir() else place
    return f"{place} {xxhash.xxh3_64_hexdigest(files.read(where))}"


def main() -> None:
    parser = ArgumentParser(prog="make_shards", description="Images -> WebDataset tar shards, their index, a manifest.")
    parser.add_argument(
        "src",
        type=str,
        help="folder, list (.txt .csv .tsv .parquet), tables of images ('train-*.parquet'), .tar, .zip, shards "
        "('old/*.tar'), or a URL",
    )
    parser.add_argument("dest", type=str, help="folder or URL that the shards go to")
    flags: tuple[tuple[str, Any, str], ...] = (
        ("seed", 0, "of the shuffle"),
        ("workers", 0, "processes; 0: one for each core"),
        ("scheduler", "", "address of a Dask scheduler: its workers pack instead of local processes"),
        ("samples_per_shard", 10_000, "a shard is full at this many images"),
        ("shard_bytes", 500_000_000, "or at this many bytes of images, as they are in SRC"),
        ("labels", "auto", "auto: of the source, its folders; none; or a file of names and labels"),
        ("label_key", "", "labels from this column of the list or table, or this key of the JSON beside each image"),
        ("image_key", "", "column of a list that holds the paths or URLs, or of a table that holds the images"),
        ("classes", "", "class names in the order of their numbers: a text file or another DEST"),
        ("holdout", 0.0, "fraction (0.1) or number (5000) of images for DEST/val, the others to DEST/train"),
        ("dedup", False, "leave out exact duplicates (reads every image twice)"),
        (
            "dedup_near",
            -1,
            "leave out images whose 64-bit perceptual hash is at most this many bits (0 to 3) from that of an earlier "
            "one; takes about 120 bytes of memory an image, and reads every image twice; -1: keep them",
        ),
        ("short_side", 0, "shrink images whose shorter side is longer than this many pixels; 0: none"),
        ("quality", 90, "JPEG quality of what is encoded again"),
        ("convert", False, "other formats to JPEG"),
        ("grey16_range", [], "black and white of 16-bit grey: 0 4095 for scans of 12 bits; the manifest keeps it"),
        ("min_side", 0, "reject images with a shorter side than this many pixels"),
        ("max_pixels", 100_000_000, "reject images with more pixels"),
        ("no_verify", False, "look at headers only: damaged images are packed and cost samples in training"),
        ("max_failed", 1.0, "stop when more than this fraction (0.1) of the images cannot be fetched; 1: no limit"),
        ("retry_failed", False, "DEST is complete: pack what could not be fetched into further shards (train's)"),
        ("overwrite", False, "delete what make_shards wrote to DEST before, begin anew"),
    )
    for name, default, text in flags:
        how: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        if name == "grey16_range":
            how = {"type": int, "nargs": 2, "metavar": ("LOW", "HIGH")}
        parser.add_argument(f"--{name}", default=default, help=text, **how)
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="HTTP header of the requests for lines of a list, whatever their host; may be repeated; $NAME in quotes "
        "'...' is taken from the environment; it is written nowhere",
    )
    given = vars(parser.parse_args())
    headers = parse_headers(given.pop("header"))
    fields = ("no_verify", "max_pixels", "min_side", "short_side", "quality", "convert")
    grey16 = grey16_range(given.pop("grey16_range") or None, "--grey16_range")
    options = Options(**{name: given.pop(name) for name in fields}, grey16_range=grey16)
    if not given["src"] or not given["dest"]:
        raise ValueError("SRC and DEST may not be empty: an unset variable?")  # it would be this folder
    for name, value in (given | asdict(options)).items():
        least = 1 if name in ("samples_per_shard", "shard_bytes", "max_pixels") else 0
        if name not in ("seed", "holdout", "dedup_near") and isinstance(value, int) and value < least:
            raise ValueError(f"--{name} {value}: at least {least}")
    if not -1 <= given["dedup_near"] <= near.MOST_BITS:
        raise ValueError(f"--dedup_near {given['dedup_near']}: bits, from 0 to {near.MOST_BITS}; -1: keep all")
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality {options.quality}: from 1 to 100")
    if not (0 <= given["holdout"] < 1 or (given["holdout"] >= 1 and given["holdout"].is_integer())):
        raise ValueError(f"--holdout {given['holdout']:g}: a fraction below 1, or a number of images")
    if not 0 <= given["max_failed"] <= 1:
        raise ValueError(f"--max_failed {given['max_failed']:g}: a fraction from 0 to 1")
    if given["retry_failed"] and given["overwrite"]:
        raise ValueError("--retry_failed keeps what is in DEST and --overwrite deletes it: drop one")
    if options.no_verify:
        print("--no_verify: damaged images are packed; each will cost a sample in training", file=sys.stderr)
    places = [place for place in (given["src"], given["dest"]) if is_remote(place)]
    disk = tempfile.gettempdir() if is_remote(given["dest"]) else given["dest"]  # an upload is written there first
    try:
        with files.naming(disk):
            make_shards(options=options, num_workers=given.pop("workers"), headers=headers, **given)
    except (ValueError, OSError, RuntimeError):
        raise
    except Exception as error:  # each file system behind a URL has its own kinds
        if not places:
            raise
        raise OSError(
            f"{' -> '.join(places)}: {reason(error)}; check address, network and credentials, then the same command "
            "goes on where this one stopped"
        ) from error


if __name__ == "__main__":
    command(main, resumes=True)
