"""Local files and fsspec URLs alike. A file that is written here appears whole or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> Path:
    path = Path(url.removeprefix("file://"))
    try:
        return path.expanduser()
    except RuntimeError:  # "~name" of no user is a name like others
        return path


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False too for a pattern that is longer than a name can be."""
    try:
        return path.exists()
    except OSError:
        return False


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec  # a fifth of a second, and only remote places need it

    return fsspec.core.url_to_fs(url, use_listings_cache=False)  # other processes write there too


def join(place: str, name: str) -> str:
    return f"{place.rstrip('/')}/{name}"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file or folder to the error of a full disk: the system names it when a file is opened, not when it is
    written to."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def writing_beside(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that becomes `path` when the block ends without an error: a reader sees the old file or the
    new one, whole, whatever dies when."""
    # Not the process's number alone: in containers on two machines that share the folder it is often the same.
    beside = path.with_name(f".{path.name[:200]}.{secrets.randbelow(10**18)}.tmp")
    try:
        # Images are larger than the buffer: they are not copied once more.
        with naming(path), beside.open("xb", buffering=1 << 14) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def rename(complete: Path, path: Path) -> None:
    """Gives a complete file, or a folder, its final name in one step. A file there is replaced; a folder only when it
    is empty, else OSError."""
    complete.replace(path)


def write_atomically(path: str | Path, content: bytes) -> None:
    with writing_beside(Path(path)) as file:
        file.write(content)


def append_line(place: str, line: bytes) -> None:
    """Adds `line`, which has no line break in it, to a file of lines; makes the file. Several processes may do it at
    once. Who is killed there leaves a piece of a line, and the next line does not go on with it.

    An object at a URL is read and written anew: of two writers at the same moment, one line may be lost.
    """
    if is_remote(place):
        try:
            before = read(place)
        except FileNotFoundError:
            before = b""
        write(place, before + (b"\n" if before and not before.endswith(b"\n") else b"") + line + b"\n")
        return
    with local_path(place).open("a+b", buffering=0) as file, naming(place):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        end = file.seek(0, os.SEEK_END)
        torn = False
        if end:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
        content = (b"\n" if torn else b"") + line + b"\n"
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        os.fsync(file.fileno())


def make_folder(place: str) -> None:
    if is_remote(place):
        fs, path = file_system(place)
        if path.startswith("/"):  # a bucket has no folders, and one that is not there is a mistake in its name
            fs.makedirs(path, exist_ok=True)
    else:
        local_path(place).mkdir(parents=True, exist_ok=True)


def names(place: str) -> set[str]:
    """The names of what lies directly in a folder; empty when there is none."""
    if not is_remote(place):
        return {p.name for p in local_path(place).iterdir()} if local_path(place).is_dir() else set()
    fs, path = file_system(place)
    with contextlib.suppress(FileNotFoundError):
        return {str(found).rstrip("/").rpartition("/")[2] for found in fs.ls(path, detail=False)}
    return set()


def read(place: str) -> bytes:
    """A small file. ValueError for a folder, a pipe or a device: to read the latter may never end."""
    if not is_remote(place):
        local = local_path(place)
        if local.exists() and not local.is_file():
            raise ValueError(f"{local} is no file but a folder, a pipe or a device: move it away")
        return local.read_bytes()
    fs, path = file_system(place)
    return bytes(fs.cat_file(path))


def write(place: str, content: bytes) -> None:
    if is_remote(place):
        fs, path = file_system(place)
        fs.pipe_file(path, content)  # an object appears when its upload is complete
    else:
        write_atomically(local_path(place), content)


def remove(place: str) -> None:
    """Removes a file; nothing happens when there is none."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(place):
            fs, path = file_system(place)
            fs.rm_file(path)
        else:
            local_path(place).unlink()


def make_folder_of(place: str) -> None:
    """Makes the folder that a file is about to be written to."""
    if is_remote(place):
        make_folder(place.rpartition("/")[0])
    else:
        local_path(place).parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(place: str) -> Iterator[BinaryIO]:
    """A file to write to, that becomes `place` when the block ends without an error."""
    if is_remote(place):
        with naming(tempfile.gettempdir()), tempfile.NamedTemporaryFile(prefix="make_shards-") as file:
            yield file  # type: ignore[misc]
            file.flush()
            fs, path = file_system(place)
            fs.put_file(file.name, path)
    else:
        with writing_beside(local_path(place)) as local:
            yield local
