"""The state of DEST as earlier commands left it: may this one go on with it, is all done, or is it another's?

While a command is at work, DEST/.make_shards holds its listing, its job and the records of the shards that are done;
at the end make_shards.json takes their place. DEST/.make_shards/job.json is written last of what a command begins with.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing.collect import SUMMARY
from pipeline.packing.listing import Listing
from pipeline.packing.plan import PlannedShard

JOURNAL = ".make_shards"  # in DEST: the listing and the records of finished shards, until all are
LISTING = ("listing.jsonl", "listing.bin", "listing.json", "job.json")  # the last one says that all are there
SHARDS = r"shard-\d{6,}\.(tar|idx)|manifest\.json"  # in DEST, or with a holdout in DEST/train and DEST/val
REPORTS = r"(rejected|duplicates)\.jsonl|(contact_sheet|near_duplicates)\.png|make_shards\.json"  # in DEST
OURS = f"{SHARDS}|{REPORTS}"


@contextlib.contextmanager
def journal_folder(dest: str) -> Iterator[Path]:
    """The local folder with the listing: DEST/.make_shards itself, or for a remote DEST a copy of that."""
    if not is_remote(dest):
        folder = local_path(files.join(dest, JOURNAL))
        is_new = not folder.parent.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent):
            try:
                _remove_leftovers(folder.parent)
                yield folder
                _remove_leftovers(folder.parent)
            finally:
                if not (folder / "job.json").exists():  # nothing was begun, nothing is left behind
                    shutil.rmtree(folder, ignore_errors=True)
                    if is_new:
                        with contextlib.suppress(OSError):
                            folder.parent.rmdir()  # if it is empty
        return
    with tempfile.TemporaryDirectory(prefix="make_shards-") as temporary:
        if set(LISTING) <= files.names(files.join(dest, JOURNAL)):
            fs, root = files.file_system(files.join(dest, JOURNAL))
            for name in LISTING:
                fs.get_file(f"{root}/{name}", str(Path(temporary) / name))
        yield Path(temporary)


@contextlib.contextmanager
def _locked(dest: Path) -> Iterator[None]:
    """One command at a time: it would take the other's files for what a killed one left."""
    folder = os.open(dest, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another make_shards is at work in {dest}: wait for it, or end it first") from None
        except OSError:
            pass  # not every network file system can lock a folder
        yield
    finally:
        os.close(folder)


def _remove_leftovers(dest: Path) -> None:
    """Removes the files that killed workers had not finished."""
    for place in (dest, dest / "train", dest / "val"):
        if place != dest and (place / JOURNAL).exists():
            continue  # another command may be at work there
        for left in place.glob(".*.tmp"):
            if re.fullmatch(rf"\.({OURS})\.\d+\.tmp", left.name):
                left.unlink(missing_ok=True)


def begun(journal: Path, job: dict[str, Any], dest: str) -> Listing | None:
    """The listing of an interrupted run of the same job; ValueError when it was another job."""
    records = files.join(dest, JOURNAL)
    there = files.names(records)
    before = json.loads(files.read(files.join(records, "job.json"))) if "job.json" in there else {}
    if before == job or ("src" in before and any(name.endswith(".json") and "shard-" in name for name in there)):
        _refuse_if_changed(before, job, dest)
        return Listing(journal)
    remove_ours(dest)  # no shard is done: the mistake in the earlier command costs nothing
    for split in ("", "train", "val") if job["holdout"] else ("",):
        folder = files.join(dest, split).rstrip("/")
        for name in files.names(folder):
            if re.fullmatch(OURS, name) or (not there and name.endswith(".tar")):
                raise ValueError(f"{folder} holds {name}, which make_shards did not begin there: name another folder")
    return None


def begin(journal: Path, dest: str, job: dict[str, Any], write_listing: Callable[[Path], Listing]) -> Listing:
    """Writes the listing, then the job, by which an interrupted command is known again."""
    remove_journal(dest)
    journal.mkdir(exist_ok=True)
    listing = write_listing(journal)
    files.write(str(journal / "job.json"), json.dumps(job).encode())
    records = files.join(dest, JOURNAL)
    if is_remote(records):
        files.make_folder(records)
        fs, path = files.file_system(records)
        for name in LISTING:
            fs.put_file(str(journal / name), f"{path}/{name}")
    return listing


def _refuse_if_changed(before: dict[str, Any], job: dict[str, Any], dest: str) -> None:
    names = [name for name in job | before if before.get(name) != job.get(name)]
    changed = [f"{name} {before.get(name)!r} there, {job.get(name)!r} now" for name in names]
    if changed:
        raise ValueError(
            f"{dest} was made otherwise ({'; '.join(changed)}): name another folder, or add --overwrite to make it anew"
        )


def finished_summary(dest: str, job: dict[str, Any]) -> dict[str, Any] | None:
    """The content of make_shards.json when `dest` is done; ValueError when it was made otherwise or lacks shards."""
    if SUMMARY not in files.names(dest):
        return None
    summary: dict[str, Any] = json.loads(files.read(files.join(dest, SUMMARY)))
    _refuse_if_changed(summary["job"], job, dest)
    for split, count in summary["shards"].items():
        folder = files.join(dest, split).rstrip("/")
        if (missing := count - sum(name.endswith(".tar") for name in files.names(folder))) > 0:
            raise ValueError(f"{missing} of {count} shards are missing in {folder}: add --overwrite to make it anew")
    return summary


def refuse_other_images(listing: Listing, summary: dict[str, Any], dest: str) -> None:
    """ValueError when `dest` was made from other images than those of the listing."""
    if listing.summary["digest"] != summary["digest"]:
        raise ValueError(
            f"{dest} was made from {summary['found']:,} images that are no longer those of {summary['job']['src']} "
            f"({len(listing):,} now), or had other sizes, labels or sidecars: name another folder, or add "
            "--overwrite to make it anew"
        )


def remove_ours(dest: str) -> None:
    """Deletes what make_shards wrote, in the folders that the job noted in `dest` says, and nothing else; killed in the
    middle, it can be called again."""
    if SUMMARY in files.names(dest):
        job = json.loads(files.read(files.join(dest, SUMMARY)))["job"]
    elif "job.json" in files.names(files.join(dest, JOURNAL)):
        job = json.loads(files.read(files.join(dest, f"{JOURNAL}/job.json")))
    else:  # it was killed before its job was noted, and had packed nothing
        remove_journal(dest)
        return
    holdout = job.get("holdout", 0)
    files.make_folder(files.join(dest, JOURNAL))
    files.write(files.join(dest, f"{JOURNAL}/job.json"), json.dumps({"holdout": holdout}).encode())  # of no job now
    files.remove(files.join(dest, SUMMARY))
    ours = {"": REPORTS, "train": SHARDS, "val": SHARDS} if holdout else {"": OURS}
    for split, pattern in ours.items():
        folder = files.join(dest, split).rstrip("/")
        there = files.names(folder)
        if split and SUMMARY in there:
            continue  # with its own, it is another command's DEST
        for name in there:
            if re.fullmatch(pattern, name):
                files.remove(files.join(folder, name))
    remove_journal(dest)


def remove_journal(dest: str) -> None:
    place = files.join(dest, JOURNAL)
    if not is_remote(place):
        shutil.rmtree(local_path(place), ignore_errors=True)
    elif files.names(place):
        fs, path = files.file_system(place)
        fs.rm(path, recursive=True)


def finished(dest: str, shards: list[PlannedShard]) -> set[PlannedShard]:
    """The shards that have a record, and are there unless nothing was left of them."""
    records = files.names(files.join(dest, JOURNAL))
    splits = {shard.split for shard in shards}
    tars = {split: files.names(files.join(dest, split).rstrip("/")) for split in splits}
    done = set()
    for shard in shards:
        if shard.record in records:
            there = f"shard-{shard.number:06d}.tar" in tars[shard.split]
            if there or not json.loads(files.read(files.join(dest, f"{JOURNAL}/{shard.record}")))["samples"]:
                done.add(shard)
    return done
