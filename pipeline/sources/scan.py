"""Many tars at once, in parallel and with a progress bar: the indexes of those that have none."""

import contextlib
import multiprocessing
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash

from pipeline.files import is_remote, local_path, read, write_atomically
from pipeline.progress import track
from pipeline.sources.cache import locked
from pipeline.sources.index import Component, NoImages, format_index, image_rank, index_tar, read_index
from pipeline.sources.manifest import Manifest
from pipeline.sources.storage import Storage

T = TypeVar("T")
R = TypeVar("R")
FETCHES = 4  # remote shards being fetched and indexed at a time; each is fetched in many ranges


class Scanned(NamedTuple):
    """The result of scanning one tar."""

    samples: int
    bytes: int
    checksum: str  # "" when the tar was not read as a whole
    images_beyond: int = 0  # further images of a key, beyond the one that is used
    problem: str = ""  # why there are no samples
    sparse: int = 0  # members with holes left out, which are not used
    index_differs: bool = False  # another .idx is there already: it was left alone, and none was written
    damaged: bool = False  # `problem` says how; an index cannot be made
    lacks_end: int = 0  # 1: there is no mark of the tar's end


def index_shards(
    tars: Sequence[str], indexes: Sequence[Path], storage: Storage, *, workers: int, progress: bool
) -> Iterator[Scanned]:
    """Writes indexes[i] for tars[i], each a path or a URL, and says what they hold, in order, as it comes to know.

    Local tars have only their headers read, in processes; remote ones are fetched whole, in threads, and so get a
    checksum too. A damaged tar does not stop the others. FileNotFoundError for one that is not there, OSError from a
    server that fails.
    """
    jobs = list(zip(tars, indexes))
    if any(is_remote(tar) for tar in tars):
        with ThreadPoolExecutor(FETCHES) as pool:
            results = map_ahead(pool, partial(_index_remote, storage), jobs)
            yield from track(results, "indexing" if progress else "", len(jobs), unit="shards")
    else:
        yield from in_processes(_index_local, jobs, "indexing", workers, progress)


def _index_local(job: tuple[str, Path]) -> Scanned:
    tar, index = job
    path = local_path(tar)
    kinds: Counter[str] = Counter()
    try:
        samples = index_tar(path, kinds)
    except NoImages as error:
        return Scanned(0, path.stat().st_size, "", problem=str(error))
    except ValueError as error:
        return Scanned(0, path.stat().st_size, "", problem=str(error), damaged=True)
    status = path.stat()
    # One that says something else is somebody's own, for other members or another grouping; or it is of an older tar,
    # which its date does not tell, since copying changes dates.
    if index.exists() and read(str(index)) != format_index(samples):
        return Scanned(len(samples), status.st_size, "", index_differs=True)
    return _write(samples, kinds, index, status.st_size, "")


def _index_remote(storage: Storage, job: tuple[str, Path]) -> Scanned:
    tar, index = job
    data = storage.open(tar)
    kinds: Counter[str] = Counter()
    try:
        samples = index_tar(data, kinds)
    except NoImages as error:
        return Scanned(0, len(data), "", problem=str(error).replace("the tar", tar, 1))
    except ValueError as error:
        return Scanned(0, len(data), "", problem=str(error).replace("the tar", tar, 1), damaged=True)
    scanned = _write(samples, kinds, index, len(data), checksum_of(data))
    storage.learn(tar, scanned.bytes, scanned.checksum)
    return scanned


def read_index_text(manifest: Manifest, shard: int, storage: Storage) -> bytes:
    """The text of a shard's `.idx`. Where there is none it is built from the tar and kept in the cache, for the tar of
    this size and checksum: nothing is written where the shard is.

    ValueError when the tar is not as the manifest says, or cannot be indexed."""
    with contextlib.suppress(FileNotFoundError):
        return storage.read_bytes(manifest.index_url(shard))
    tar, entry = manifest.shard_url(shard), manifest.shards[shard]
    tar_now = f"{tar}\n{entry.bytes}\n{entry.checksum}\n{entry.samples}"
    key = xxhash.xxh3_128_hexdigest(tar_now.encode("utf-8", "surrogateescape"))
    built = storage.cache_dir / "indexes" / f"{key}.idx"
    with locked(storage.cache_dir / "locks" / f"index-{key}"):
        if not built.exists():
            data = storage.open(tar, bytes=entry.bytes, checksum=entry.checksum)
            try:
                text = format_index(index_tar(data))
            except ValueError as error:
                raise ValueError(str(error).replace("the tar", tar, 1)) from None
            read_index(text, samples=entry.samples, size=entry.bytes, label=f"what is in {tar}")
            built.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(built, text)
    return built.read_bytes()


def _write(samples: list[list[Component]], kinds: Counter[str], index: Path, size: int, checksum: str) -> Scanned:
    index.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(index, format_index(samples))
    beyond = sum(sum(image_rank(c.extension) >= 0 for c in sample) - 1 for sample in samples)
    return Scanned(len(samples), size, checksum, beyond, sparse=kinds["sparse"], lacks_end=kinds["no end"])


def checksum_of(data: np.ndarray) -> str:
    """As manifests have it: "xxh3_64:" and 16 hex digits."""
    digest = xxhash.xxh3_64()
    for begin in range(0, len(data), 1 << 24):
        digest.update(data[begin : begin + (1 << 24)].data)
    return f"xxh3_64:{digest.hexdigest()}"


# --- in parallel ------------------------------------------------------------------------------------------------------


def in_processes(work: Callable[[T], R], jobs: Sequence[T], what: str, workers: int, progress: bool) -> Iterator[R]:
    label = what if progress else ""
    workers = min(workers, len(jobs) // 4)  # a process costs half a second to start, a shard some tens of milliseconds
    if workers < 2:
        yield from track(map(work, jobs), label, len(jobs), unit="shards")
        return
    # spawn: the parent may have threads (DALI, fsspec) that a fork would not survive.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        with starting_processes():
            results = map_ahead(pool, work, jobs)
        yield from track(results, label, len(jobs), unit="shards")


@contextlib.contextmanager
def starting_processes() -> Iterator[None]:
    """Processes that are started inside this block do not import the script that the user runs, and Ctrl-C, which a
    terminal sends to all of them, does not reach them: the parent decides.

    They need nothing of the script, it may take seconds (torch), and one without `if __name__ == "__main__"` would
    start its own work again in each of them. They inherit SIGINT blocked; a handler that they set themselves would be
    too late for a Ctrl-C while they start."""
    main = sys.modules["__main__"]
    resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT in this thread
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def map_ahead(pool: Executor, work: Callable[[T], R], jobs: Sequence[T]) -> Iterator[R]:
    """Begins all jobs; results in order. At the first error those that have not begun are dropped, and it is raised."""
    futures = [pool.submit(work, job) for job in jobs]

    def results() -> Iterator[R]:
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    return results()
