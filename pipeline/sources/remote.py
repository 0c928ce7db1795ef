"""Files behind a URL, through fsspec: s3://, gs://, http(s)://, hf:// and whatever else fsspec has a file system for.

Every request is tried again, with growing pauses, unless the answer is final (not there, not allowed). A read that
comes back short goes on where it ended. So a busy or flaky server costs time, never data.

`anonymous+s3://bucket/...` (and gs, hf) reads a public place without looking for credentials.
"""

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import fsspec

from pipeline.sources.http_range import Connections, Declined, write_at

T = TypeVar("T")
RANGE = 8 << 20  # bytes a request: at 100 ms of latency and 50 MB/s a connection, latency is a third of the time
REQUESTS = 16  # at once in a process; 128 MiB of memory when all are in flight
SIGNED_SECONDS = 3600  # how long the address of an object is good for
FIRST_PAUSE = 0.2  # seconds; each further one is twice as long, up to 15
TRIES = 8  # with the pauses below, a server may be away for half a minute
ANONYMOUS = "anonymous+"
WITHOUT_CREDENTIALS: dict[str, dict[str, Any]] = {
    "s3": {"anon": True},
    "s3a": {"anon": True},
    "gs": {"token": "anon"},
    "gcs": {"token": "anon"},
    "hf": {"token": False},
}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}


@functools.cache
def _filesystem(protocol: str, anonymous: bool = False, headers: tuple[tuple[str, str], ...] = ()) -> Any:
    """One for all threads, since its coroutines run in fsspec's own event loop; fsspec would make one for each."""
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp

        # Reading 1 MiB at a time instead of 64 KiB costs a third of the processor time.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(sock_connect=10, sock_read=30),
            "read_bufsize": 1 << 20,
            "headers": dict(headers),
        }
    elif protocol in ("s3", "s3a"):
        # The pool of connections is 10 unless told, fewer than our requests.
        options["config_kwargs"] = {"max_pool_connections": REQUESTS, "connect_timeout": 10, "read_timeout": 30}
    if anonymous:
        options |= WITHOUT_CREDENTIALS.get(protocol, {})
    try:
        kind = fsspec.get_filesystem_class(protocol)
        inspect.signature(kind.__init__).bind(None, **options)  # before there is half a one, which complains at its end
        return kind(**options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"`pip install -e '.[{extra}]'`" if extra else f"install it ({error})"
        raise ValueError(f"{protocol}:// needs a package that is not installed: {remedy}") from None
    except (ValueError, TypeError):  # TypeError: it takes a host, as ftp does, and would be one for each host
        raise ValueError(f"{protocol}:// is not a kind of URL that is read; s3, gs, http, https and hf are") from None


def reading_from(url: str, headers: Sequence[tuple[str, str]] = ()) -> tuple[Any, str]:
    """The fsspec file system that reads a URL, and the path in it: all threads share it, and what it listed it may list
    again from memory; `files.file_system` is for places that are written to. `headers`, name and value, go with each
    request to an HTTP server. ValueError when there is none for such a URL."""
    bare = url.removeprefix(ANONYMOUS)
    filesystem = _filesystem(bare.partition("://")[0], bare != url, tuple(headers))
    return filesystem, filesystem._strip_protocol(bare)


def with_protocol(filesystem: Any, path: str, like: str) -> str:
    """The URL of a path in the file system of `like`, read as `like` is."""
    return (ANONYMOUS if like.startswith(ANONYMOUS) else "") + str(filesystem.unstrip_protocol(path))


def is_final(error: object) -> bool:
    """Whether trying again cannot help."""
    status = getattr(error, "status", None)  # aiohttp's
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return (
        isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError | ValueError | NotImplementedError)
        or "Credentials" in type(error).__name__
    )


def retry(url: str, request: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What `request` returns. FileNotFoundError when it is not there, ValueError when not allowed, OSError after
    TRIES failures."""
    for is_last in tries(url, stop):
        try:
            return request()
        except Exception as error:  # each file system has its own kinds
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"no such object: {url}") from None
            if is_final(error):
                raise ValueError(f"{url}: {reason(error)}; {_remedy(url)}") from error
            if is_last:
                raise OSError(f"{url}: given up after {TRIES} tries, the last: {reason(error)}") from error
    raise AssertionError


def _remedy(url: str) -> str:
    """Advice for a user whom the server refuses."""
    protocol, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if protocol in WITHOUT_CREDENTIALS:
        told = (
            f"check the address and your credentials, or read a public bucket as {ANONYMOUS}{protocol}://{bucket}/..."
        )
        if protocol in ("s3", "s3a"):
            told += " (environment: AWS_ENDPOINT_URL for another endpoint, FSSPEC_S3_REQUESTER_PAYS=true where you pay)"
        return told
    return "check the address" if url.startswith(ANONYMOUS) else "check the address and your credentials"


def tries(url: str, stop: threading.Event | None = None, *, times: int = 0) -> Iterator[bool]:
    """How often all of the program asks a server: TRIES times, or `times`, with growing pauses. Yields whether this is
    the last.

    InterruptedError, which names `url`, when `stop` is set during a pause.
    """
    times = times or TRIES
    for attempt in range(times):
        yield attempt == times - 1
        pause = min(FIRST_PAUSE * 2**attempt, 15) * random.uniform(0.5, 1)
        if attempt < times - 1 and (stop or threading.Event()).wait(pause):
            raise InterruptedError(f"{url}: closed while fetching")


def reason(error: object) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_whole(url: str, stop: threading.Event | None = None) -> bytes:
    """A small file."""
    filesystem, path = reading_from(url)
    return retry(url, lambda: filesystem.cat_file(path), stop)


def stat(url: str) -> tuple[int, str]:
    """Bytes, and a stamp that changes with the content as far as the server tells (ETag, date). FileNotFoundError."""
    filesystem, path = reading_from(url)
    info = retry(url, lambda: filesystem.info(path))
    if info.get("type") == "directory" or info.get("size") is None:
        raise ValueError(f"{url}: the server tells no size for it; is it a file?")
    return int(info["size"]), _stamp(info)


def stat_many(urls: Sequence[str]) -> list[tuple[int, str]]:
    with ThreadPoolExecutor(min(32, max(1, len(urls)))) as pool:
        return list(pool.map(stat, urls))


def _stamp(info: dict[str, Any]) -> str:
    return next(
        (
            str(info[key])
            for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime")
            if key in info
        ),
        "",
    )


def listing(folder: str, suffix: str) -> list[tuple[str, int, str]]:
    """(name, bytes, stamp) of the files directly in `folder` whose names end so, sorted. [] when there is nothing."""
    filesystem, path = reading_from(folder.rstrip("/") + "/")
    try:
        entries = retry(folder, lambda: filesystem.ls(path, detail=True))
    except FileNotFoundError:
        return []
    found = {}
    for entry in entries:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry.get("type") != "directory" and name.endswith(suffix):
            found[name] = entry
    names = sorted(found)
    if any(found[name].get("size") is None for name in names):  # a web server's page of links
        return [
            (name, *known) for name, known in zip(names, stat_many([f"{folder.rstrip('/')}/{name}" for name in names]))
        ]
    return [(name, int(found[name]["size"]), _stamp(found[name])) for name in names]


def glob(pattern: str) -> list[str]:
    """URLs that match, sorted."""
    filesystem, path = reading_from(pattern)
    names = retry(pattern, lambda: filesystem.glob(path))
    return sorted(name if "://" in name else f"{pattern.partition('://')[0]}://{name}" for name in names)


class Fetcher:
    """Reads objects in many concurrent ranges. `close` ends what is under way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="range")
        self._connections = Connections()
        self._stop = threading.Event()

    def fetch(self, url: str, size: int, descriptor: int) -> None:
        """Writes the first `size` bytes of the object to the file. OSError, ValueError or FileNotFoundError
        when that fails."""
        starts, address = list(range(0, size, RANGE)), _http_address(url)
        if starts and url.startswith("http"):
            # A server that knows no ranges answers with everything: the first answer tells, before the
            # others are asked for.
            if self._range(url, address, 0, min(RANGE, size), size, descriptor):
                return
            del starts[0]
        ranges = [(start, min(start + RANGE, size)) for start in starts]
        futures = [self._pool.submit(self._range, url, address, *each, size, descriptor) for each in ranges]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            # Those that run write to `descriptor`, which the caller is about to close.
            with contextlib.suppress(Exception):
                for future in futures:
                    if not future.cancelled():
                        future.exception()
            raise

    def _range(self, url: str, address: str, start: int, end: int, size: int, descriptor: int) -> bool:
        """Bytes [start, end) into the file; True when the server sent all of it instead."""

        def request() -> int:
            if self._stop.is_set():
                raise ValueError("closed")
            if address:
                with contextlib.suppress(Declined):
                    return self._connections.read_range(address, start, end, size, descriptor)
            filesystem, path = reading_from(url)
            content = filesystem.cat_file(path, start=start, end=end)
            if not content:
                raise OSError(f"no bytes came from {start:,} on, of {size:,}")
            is_all = len(content) > end - start
            if is_all and len(content) != size:
                return -len(content)
            write_at(descriptor, memoryview(content), 0 if is_all else start)
            return size if is_all else start + len(content)

        while start < end:
            reached = retry(url, request, self._stop)
            if reached < 0:
                raise ValueError(
                    f"{url}: {-reached:,} bytes came, {size:,} were expected: it was replaced, or the server ignores "
                    "ranges"
                )
            if reached == size > end:
                return True
            start = reached
        return False

    def close(self) -> None:
        self._stop.set()
        self._connections.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _http_address(url: str) -> str:
    """Where plain HTTP reads the object, signed for an hour; "" where only fsspec can, as through a proxy."""
    protocol = url.removeprefix(ANONYMOUS).partition("://")[0]
    if protocol in ("http", "https"):
        return url.removeprefix(ANONYMOUS)
    if protocol not in ("s3", "s3a"):
        return ""
    filesystem, path = reading_from(url)
    try:
        address = str(filesystem.url(path, expires=SIGNED_SECONDS, **filesystem.req_kw))
        parts = urlsplit(address)
        through_proxy = parts.scheme in getproxies() and not proxy_bypass(parts.netloc)
        return "" if through_proxy else address
    except Exception:  # no credentials and the like: fsspec says what is wrong, when it is asked for the object
        return ""
