"""A folder of fetched shards, bounded in bytes, shared by all processes of a machine.

1. A shard is fetched into `NAME.part`, by the one process that holds a lock on that file; others wait, or do without.
2. Its room is set aside before the first byte comes: the shards used longest ago go, until it fits.
3. Size and checksum are verified, the file is flushed to disk and renamed to `NAME.tar`: what has this name is whole.
4. A process that is killed leaves a `.part` whose lock is free: the next to want the shard, or the room, takes it over.
5. Nothing but what was written here is counted or removed: the folder is one that this program made and marked, and of
   the files in it only those count that have a name as `Cache.path` gives.

A shard that is removed while somebody reads it stays readable for them (POSIX keeps the data of an open or mapped
file), and is fetched again by whoever opens it next. Locks are flock's, so the folder should be on a local disk.
"""

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pipeline import files
from pipeline.sources import remote

FOLDER = "fetched-shards"
# The name and first line are those of the Cache Directory Tagging Specification, so that backups leave the folder out.
MARK_NAME = "CACHEDIR.TAG"
MARK = b"""Signature: 8a477f597d28d172789f06886806bc55
# Shards that moco-pipeline fetched. It removes them again when it needs the room.
"""
_OWN_NAME = re.compile(r".{0,60}-[0-9a-f]{16}\.(tar|part)", re.DOTALL)
ROOM_PATIENCE = 600.0  # seconds to wait for other processes' fetches to end when they fill the cache


def default_cache_dir() -> Path:
    """~/.cache/moco-pipeline, or one in the temporary folder where there is no home that can be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "moco-pipeline"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"moco-pipeline-{os.getuid()}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process, and one thread of it, is inside for a given path; freed by the system when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Cache:
    """See the module. `limit` is in bytes. Its methods may be called from any thread."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / FOLDER
        self.limit = limit
        self.fetches = 0
        try:
            made = _make_marked(self.folder)
        except OSError as error:
            raise ValueError(
                f"the cache {folder} cannot be written to ({error.strerror}): name another with --cache_dir"
            ) from None
        if made:
            _name_old_folder(folder / "shards")
        self._fetcher = remote.Fetcher()

    def path(self, url: str, size: int, checksum: str) -> Path:
        """Where the shard is kept. Size and checksum are part of the name: what replaces a shard gets a new file."""
        key = xxhash.xxh3_64_hexdigest(f"{url}\n{size}\n{checksum}".encode())
        name = url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
        return self.folder / f"{name[-60:]}-{key}.tar"

    def find(self, url: str, size: int, checksum: str) -> Path | None:
        """Where the shard is, if it has been fetched; it then counts as just used, so that others go before it."""
        path = self.path(url, size, checksum)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, url: str, size: int = -1, checksum: str = "", *, wait: bool = True) -> Path | None:
        """The local path of a shard, fetched if need be; None if another process is fetching it and `wait` is False.

        ValueError when it is not what the manifest says, FileNotFoundError when it is not there, OSError when the
        server fails.
        """
        path = self.path(url, size, checksum)
        part = path.with_suffix(".part")
        while True:
            if self.find(url, size, checksum) is not None:
                return path
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    return None
                # Who waited may hold a file that was renamed or removed meanwhile, or a new one after the shard came.
                if not _is_at(descriptor, part):
                    continue
                if path.exists():
                    part.unlink()
                    continue
                try:
                    self._fill(url, size, checksum, part, descriptor)
                    files.rename(part, path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return path
            finally:
                os.close(descriptor)

    def _fill(self, url: str, size: int, checksum: str, part: Path, descriptor: int) -> None:
        if size < 0 or not checksum:  # else the checksum tells
            size = _same_size(url, size)
        found = ""
        for _ in range(2):  # bytes that went wrong on the way come right the second time, others do not
            self._make_room(size, part, descriptor)
            try:
                self._fetcher.fetch(url, size, descriptor)
            except ValueError:
                _same_size(url, size)  # a better reason than "416 Range Not Satisfiable"
                raise
            self.fetches += 1
            found = _checksum(descriptor, size) if checksum else ""
            if found == checksum:
                os.fsync(descriptor)
                return
        raise ValueError(
            f"{url}: checksum {found}, its manifest says {checksum}: upload it again, or rebuild the manifest"
        )

    def _make_room(self, size: int, part: Path, descriptor: int) -> None:
        """Sets `size` bytes aside for `part`, removing the shards used longest ago."""
        if size > self.limit:
            raise ValueError(f"a shard of {size:,} bytes does not fit into a cache of {self.limit:,}: raise --cache_gb")
        begun = time.monotonic()
        while True:
            with locked(self.folder / ".room"):
                if self._evict(self.limit - size, part):
                    os.ftruncate(descriptor, 0)
                    try:
                        os.posix_fallocate(descriptor, 0, size) if size else None
                    except OSError as error:
                        raise OSError(
                            f"no room for {size:,} bytes in {self.folder}: {error.strerror}; make room, set a "
                            "smaller --cache_gb or another --cache_dir"
                        ) from None
                    return
            if time.monotonic() - begun > ROOM_PATIENCE:
                raise OSError(
                    f"{self.folder}: other processes' fetches fill the cache of {self.limit:,} bytes: raise --cache_gb"
                )
            time.sleep(0.05)

    def _evict(self, limit: int, own: Path) -> bool:
        """Removes files until at most `limit` bytes are left beside `own`; False if fetches under way leave too
        little."""
        files, total = [], 0
        with os.scandir(self.folder) as scan:
            for entry in scan:
                if _OWN_NAME.fullmatch(entry.name) and entry.name != own.name and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                        total += status.st_size
        for _, size, path in sorted(files):
            if total <= limit:
                break
            if path.suffix == ".tar":
                path.unlink(missing_ok=True)
                total -= size
            elif _remove_abandoned(path):
                total -= size
        return total <= limit

    def rename(self, url: str, size: int, checksum: str) -> None:
        """A shard that was fetched with nothing known about it: now this is known."""
        with contextlib.suppress(FileNotFoundError):
            files.rename(self.path(url, -1, ""), self.path(url, size, checksum))

    def close(self) -> None:
        self._fetcher.close()


def _make_marked(folder: Path) -> bool:
    """Makes the folder with its mark in it, at once, so that no other process sees it without; True when it was not
    there. ValueError when a folder of this name is there that this program did not make."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK_NAME
    if mark.is_file() and mark.read_bytes() == MARK:
        return False
    beside = folder.with_name(f".{FOLDER}-{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        (beside / MARK_NAME).write_bytes(MARK)
        files.rename(beside, folder)  # takes the place of nothing, or of an empty folder
        return True
    except OSError:
        (beside / MARK_NAME).unlink(missing_ok=True)
        beside.rmdir()
        if mark.is_file() and mark.read_bytes() == MARK:  # another process was faster
            return False
        if folder.exists():
            raise ValueError(
                f"{folder} was not made by this program (it has no {MARK_NAME} of it), so it is not used as a cache: "
                "move it away, or name another folder with --cache_dir"
            ) from None
        raise


def _name_old_folder(folder: Path) -> None:
    """Says once that shards which earlier versions fetched lie there unused. Files of the user may be among them, which
    those versions could not tell apart, so none is deleted."""
    old = [p for p in folder.glob("*.tar") if _OWN_NAME.fullmatch(p.name)]
    if old:
        print(
            f"note: {folder} holds {len(old):,} shards that an earlier version fetched, "
            f"{sum(p.stat().st_size for p in old) / 1e9:.3f} GB: they are not used any more; delete them yourself if "
            "nothing of yours is among them",
            file=sys.stderr,
        )


def _same_size(url: str, expected: int) -> int:
    """The size that the server gives; ValueError when the manifest says something else."""
    size, _ = remote.stat(url)
    if 0 <= expected != size:
        what = "cut short" if size < expected else "replaced"
        raise ValueError(
            f"{url} has {size:,} bytes, its manifest says {expected:,}: it was {what}; upload it again, or "
            f"rebuild the manifest"
        )
    return size


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(part: Path) -> bool:
    """Removes it if the process that was fetching it has died; under its lock, so that nobody takes it over
    meanwhile."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, part):
            part.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _checksum(descriptor: int, size: int) -> str:
    digest = xxhash.xxh3_64()
    for offset in range(0, size, 1 << 24):
        digest.update(os.pread(descriptor, 1 << 24, offset))
    return f"xxh3_64:{digest.hexdigest()}"
