"""Bytes of shards: from local files, or from URLs by way of `sources.cache`, which looks the same from outside.

1. `read` copies bytes out of a shard with a single system call; `opened` and `read_at` do so for several images.
2. `open` maps a whole shard; for scanning.
3. `prefetch` begins to fetch remote shards (and their indexes) before they are needed.
4. `list`, `glob` and `stat` say which shards there are.
"""

import ctypes
import functools
import glob
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import braceexpand
import numpy as np

from pipeline import files
from pipeline.files import exists, is_remote, local_path
from pipeline.sources import remote
from pipeline.sources.cache import Cache, default_cache_dir
from pipeline.sources.manifest import CachePlace, Source

SHARDS_AT_ONCE = 4  # fetched in the background, each in many ranges
INDEX_MEMORY = 32 << 20  # bytes of remote indexes kept

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _Mapping:
    """A read-only mapping that keeps no file descriptor, unlike Python's mmap before 3.13; unmapped with its last
    view."""

    def __init__(self, path: Path) -> None:
        self._address = None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(descriptor).st_size
            if self._size:
                address = _libc.mmap(None, self._size, 1, 1, descriptor, 0)  # PROT_READ, MAP_SHARED
                if address in (None, ctypes.c_void_p(-1).value):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
                self._address = address
        finally:
            os.close(descriptor)
        data = (self._address, True) if self._address else b""
        self.__array_interface__ = {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def __del__(self) -> None:
        if self._address:
            _libc.munmap(self._address, self._size)


class Storage:
    """One per process; its methods may be called from several threads.

    A file is open only during a call, or while `opened` lasts. At most `open_files` mappings of local shards are kept;
    an array that is still held outlives its place among them. Remote shards come through a cache of `cache_bytes` in
    `cache_dir`, default ~/.cache/moco-pipeline.
    """

    def __init__(
        self, *, cache_dir: str | None = None, cache_bytes: int = CachePlace.limit, open_files: int = 128
    ) -> None:
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._open_files = open_files
        self._mappings: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.RLock()
        self._cache: Cache | None = None  # made with the first remote shard
        self._pool: ThreadPoolExecutor | None = None
        self._fetching: dict[str, Future[object]] = {}
        self._indexes: OrderedDict[str, bytes] = OrderedDict()

    @property
    def cache_dir(self) -> Path:
        return Path(self._cache_dir).expanduser() if self._cache_dir else default_cache_dir()

    @property
    def fetches(self) -> int:
        """Remote shards that this process fetched so far."""
        return self._cache.fetches if self._cache else 0

    # --- shards -------------------------------------------------------------------------------------------------------

    def read(self, url: str, offset: int, size: int, *, bytes: int = -1, checksum: str = "") -> np.ndarray:
        """`size` bytes at `offset` of a shard, as uint8 [size]; `bytes` and `checksum` are the whole shard's.

        Copied rather than mapped: a page fault on a slow disk would hold the interpreter's lock, and a shard cut short
        under a mapping kills the process. FileNotFoundError when it is not there, ValueError when it is not of `bytes`.
        """
        content = np.empty(size, np.uint8)
        with self.opened(url, bytes=bytes, checksum=checksum) as descriptor:
            read_at(descriptor, url, offset, content)
        return content

    @contextmanager
    def opened(self, url: str, *, bytes: int = -1, checksum: str = "") -> Iterator[int]:
        """A descriptor of a shard, for `read_at`. Errors as `read`."""
        descriptor = self._descriptor(url, bytes, checksum)
        try:
            check_size(url, os.fstat(descriptor).st_size, bytes)
            yield descriptor
        finally:
            os.close(descriptor)

    def open(self, url: str, *, bytes: int = -1, checksum: str = "") -> np.ndarray:
        """The whole shard as uint8 [size], mapped. Errors as `read`."""
        with self._lock:
            view = self._mappings.get(url)
            if view is not None:
                self._mappings.move_to_end(url)
        if view is None:
            view = np.asarray(self._map(url, bytes, checksum))
            if not is_remote(url):  # a mapping would keep the room of a shard that the cache has removed
                with self._lock:
                    self._mappings[url] = view
                    while len(self._mappings) > self._open_files:
                        self._mappings.popitem(last=False)
        check_size(url, len(view), bytes)
        return view

    def _map(self, url: str, size: int, checksum: str) -> _Mapping:
        descriptor = self._descriptor(url, size, checksum)
        try:
            return _Mapping(Path(f"/proc/self/fd/{descriptor}"))
        finally:
            os.close(descriptor)

    def _descriptor(self, url: str, size: int, checksum: str) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if not is_remote(url):
            try:
                return _open_file(_local_name(url), flags)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"no shard {url}: put it back, or delete the manifest.json beside it to have it rebuilt without it"
                ) from None
        cache = self._open_cache()
        for _ in range(100):
            try:
                return os.open(self._fetched(cache, url, size, checksum), flags)
            except FileNotFoundError as error:
                if not error.filename:  # the server's answer, not the removal from the cache between fetch and open
                    raise
        raise OSError(
            f"{url} is removed from the cache of {self._cache_bytes:,} bytes as fast as it is fetched: raise --cache_gb"
        )

    def _fetched(self, cache: Cache, url: str, size: int, checksum: str) -> Path:
        with self._lock:
            future = self._fetching.pop(url, None)
        if future is not None and not future.cancel():
            future.result()
        path = cache.fetch(url, size, checksum)
        assert path is not None
        return path

    def prefetch(self, urls: Iterable[str | tuple[str, int, str]]) -> None:
        """Begins to fetch remote shards, (url, bytes, checksum), and indexes, their URLs alone; soonest needed first.

        Fetches that only an earlier call asked for are dropped, unless they have begun. Local shards are left alone.
        """
        wanted = [item if isinstance(item, tuple) else (item, -1, "") for item in urls]
        wanted = [item for item in wanted if is_remote(item[0])]
        if not wanted:
            return
        cache = self._open_cache()
        names = {url for url, _, _ in wanted}
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="prefetch")
            for url, future in list(self._fetching.items()):
                if (url not in names and future.cancel()) or (future.done() and not future.exception()):
                    del self._fetching[url]
            for url, size, checksum in wanted:
                if url in self._fetching or url in self._indexes:
                    continue
                if not url.partition("?")[0].endswith(".tar"):
                    self._fetching[url] = self._pool.submit(self.read_bytes, url)
                elif cache.find(url, size, checksum) is None:
                    self._fetching[url] = self._pool.submit(cache.fetch, url, size, checksum, wait=False)

    def learn(self, url: str, size: int, checksum: str) -> None:
        """Says what a remote shard that was opened without size and checksum has, so that it is not fetched again."""
        self._open_cache().rename(url, size, checksum)

    def _open_cache(self) -> Cache:
        with self._lock:
            if self._cache is None:
                self._cache = Cache(self.cache_dir, self._cache_bytes)
            return self._cache

    def read_bytes(self, url: str) -> bytes:
        """A whole small file: a manifest, an index. FileNotFoundError when it is not there."""
        if not is_remote(url):
            return files.read(url)
        with self._lock:
            content = self._indexes.get(url)
        if content is None:
            content = remote.read_whole(url)
            with self._lock:
                self._indexes[url] = content
                while len(self._indexes) > 1 and sum(map(len, self._indexes.values())) > INDEX_MEMORY:
                    self._indexes.popitem(last=False)
        return content

    def close(self) -> None:
        """Ends fetches and forgets the mappings. Arrays that were handed out stay valid."""
        with self._lock:
            self._mappings.clear()
            self._indexes.clear()
            if self._cache is not None:
                self._cache.close()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._fetching.clear()

    # --- which shards there are ---------------------------------------------------------------------------------------

    def list(self, folder: str, suffix: str) -> list[tuple[str, int, str]]:
        """(name, bytes, stamp) of the files directly in `folder` whose names end so, sorted. A stamp changes
        with the content."""
        if is_remote(folder):
            return remote.listing(folder, suffix)
        with os.scandir(local_path(folder)) as scan:
            entries = [(e.name, e.stat()) for e in scan if _is_listed(e, suffix)]
        return sorted((name, s.st_size, str(s.st_mtime_ns)) for name, s in entries)

    def glob(self, pattern: str) -> Sequence[str]:
        """The names that a pattern of braces, *, ? and [] gives, in its order; locally, what is there under exactly
        this name, and folders that lead to the pattern, are taken as they are. A name without * ? [] is given whether
        it is there or not. FileNotFoundError when nothing matches."""
        expanded: Sequence[tuple[str, Sequence[str]]]
        if is_remote(pattern):
            expanded = [(p, remote.glob(p) if "*" in p else [p]) for p in _braces(pattern)]
        else:
            path = local_path(pattern)
            if exists(path):
                return [str(path)]
            folder = next(f for f in path.parents if (exists(f) and f.is_dir()) or f == f.parent)
            rest = str(path.relative_to(folder))
            expanded = [(str(folder / p), _glob_below(folder, p)) for p in _braces(rest)]
        for name, found in expanded:
            if not found:
                raise FileNotFoundError(f"nothing matches {name}")
        return [name for _, found in expanded for name in found]

    def stat(self, root: str, paths: Sequence[str]) -> Sequence[tuple[str, int, str]]:
        """As `list`, for given files below `root`. FileNotFoundError naming the first that is not there."""
        if is_remote(root):
            known = remote.stat_many([f"{root}/{path}" for path in paths])
            return [(path, size, stamp) for path, (size, stamp) in zip(paths, known)]
        found = []
        for path in paths:
            tar = local_path(root) / path
            if not tar.is_file():
                raise FileNotFoundError(f"no such shard: {tar}")
            status = tar.stat()
            found.append((path, status.st_size, str(status.st_mtime_ns)))
        return found


def storage_for(source: Source, cache_dir: str | None = None, cache_bytes: int | None = None) -> Storage:
    """With the cache that the source was opened with, but for what is given here."""
    return Storage(
        cache_dir=source.cache.folder if cache_dir is None else cache_dir,
        cache_bytes=source.cache.limit if cache_bytes is None else cache_bytes,
    )


def _is_listed(entry: os.DirEntry[str], suffix: str) -> bool:
    """A link to nothing is: that it leads nowhere must not pass unnoticed."""
    return entry.name.endswith(suffix) and not entry.name.startswith(".") and not entry.is_dir()


def _braces(pattern: str) -> Sequence[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:  # braces that do not close
        return [pattern]


def _glob_below(folder: Path, pattern: str) -> Sequence[str]:
    if exists(folder / pattern) or not glob.has_magic(pattern):
        return [str(folder / pattern)]
    return [str(folder / name) for name in sorted(glob.glob(pattern, root_dir=folder))]  # noqa: PTH207 (any folder name)


@functools.lru_cache(1 << 12)
def _local_name(url: str) -> str:
    """Parsing a path takes as long as opening the file."""
    return str(local_path(url))


def _open_file(path: str, flags: int) -> int:
    """A descriptor. ValueError for a folder, a pipe or a device: to open a pipe would wait for its writer for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no file but a folder, a pipe or a device: move it away")
    return descriptor


def read_at(descriptor: int, url: str, offset: int, into: np.ndarray) -> None:
    """Fills `into`, uint8 [size], with the bytes at `offset`. ValueError when there are fewer."""
    size = os.preadv(descriptor, [into.data], offset)
    if size != len(into):
        raise ValueError(
            f"{url}: {size:,} of {len(into):,} bytes at {offset:,}: it is cut short; fetch or write it again"
        )


def check_size(url: str, size: int, expected: int) -> None:
    if expected >= 0 and size != expected:
        what = "cut short" if size < expected else "replaced or added to"
        raise ValueError(
            f"{url} has {size:,} bytes, its manifest says {expected:,}: it was {what}; "
            "fetch or write it again, or delete its manifest.json and .idx to have them rebuilt"
        )
