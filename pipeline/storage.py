"""Bytes of a shard, from a local file. (Remote shards come through `pipeline.cache`.)"""

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _Mapping:
    """A read-only mapping that, unlike Python's mmap before 3.13, keeps no file descriptor; unmapped with its last view."""

    def __init__(self, path: str | Path) -> None:
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
        self.__array_interface__ = {
            "shape": (self._size,),
            "typestr": "|u1",
            "data": (self._address, True) if self._address else b"",
            "version": 3,
        }

    def __del__(self) -> None:
        if self._address:
            _libc.munmap(self._address, self._size)


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


class Storage:
    """Whole shards as arrays, from local files. One per process; its methods may be called from several threads.

    At most `open_files` mappings are kept; an array that is still held outlives its place in that list.
    """

    def __init__(self, *, cache_dir: str | None = None, cache_bytes: int = 50 << 30, open_files: int = 128) -> None:
        self._open_files = open_files
        self._mappings: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, url: str, *, bytes: int = -1, checksum: str = "") -> np.ndarray:
        """The shard as uint8 [size], not copied. `bytes` and `checksum` are the manifest's, -1 and "" when unknown.

        FileNotFoundError when it is not there, ValueError when its size is not `bytes`.
        """
        with self._lock:
            view = self._mappings.get(url)
            if view is not None:
                self._mappings.move_to_end(url)
        if view is None:
            view = np.asarray(_Mapping(self._local(url, bytes, checksum)))
            with self._lock:
                self._mappings[url] = view
                while len(self._mappings) > self._open_files:
                    self._mappings.popitem(last=False)
        check_size(url, len(view), bytes)
        return view

    def read(self, url: str, offset: int, size: int, *, bytes: int = -1, checksum: str = "") -> np.ndarray:
        """`size` bytes at `offset` of a shard, copied, as uint8 [size]: one system call that does not hold the interpreter's lock
        while the disk is slow, and a clear error (no SIGBUS) when the file was cut short meanwhile."""
        path = self._local(url, bytes, checksum)
        descriptor = _open(path, url)
        try:
            check_size(url, os.fstat(descriptor).st_size, bytes)
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(content) != size:
            raise ValueError(
                f"{url}: {len(content):,} of {size:,} bytes at {offset:,}: the shard is cut short; fetch or write it again"
            )
        return np.frombuffer(content, dtype=np.uint8)

    def prefetch(self, urls: Iterable[str]) -> None:
        """Begins to fetch remote shards in the background; nothing for local ones."""

    def read_bytes(self, url: str) -> bytes:
        """A whole small file (manifest, index). FileNotFoundError when it is not there."""
        return local_path(url).read_bytes()

    def close(self) -> None:
        """Forgets the mappings. Arrays that were handed out stay valid."""
        with self._lock:
            self._mappings.clear()

    def _local(self, url: str, bytes: int, checksum: str) -> Path:
        if is_remote(url):
            raise ValueError(f"{url}: remote shards are not supported yet")
        path = local_path(url)
        if not path.exists():
            raise FileNotFoundError(
                f"no shard {path}: put it back, or delete manifest.json beside it to have it rebuilt from what is there"
            )
        return path


def _open(path: Path, url: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} has gone") from None


def check_size(url: str, size: int, expected: int) -> None:
    if expected >= 0 and size != expected:
        what = "cut short" if size < expected else "replaced or added to"
        raise ValueError(
            f"{url} has {size:,} bytes, its manifest says {expected:,}: it was {what}; "
            "fetch or write it again, or delete its manifest.json and .idx to have them rebuilt"
        )
