"""Ranges of objects over HTTP, from the socket into a file, with nothing in between.

fsspec's clients carry every byte through Python's event loop, which costs twice the processor time for each GB
(benchmarks/NOTES.md). This one knows only the answers that a healthy server gives. All others (redirects, refusals,
compression, passwords in the address) are declined, and the caller asks fsspec.
"""

import functools
import http.client
import os
import re
import ssl
import threading
from typing import NamedTuple
from urllib.parse import quote, urlsplit

BUFFER = 1 << 20  # bytes taken from the socket at a time
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
BUSY = (408, 429)  # and from 500 on: the same request may be answered later

_own = threading.local()  # each thread's buffer


class Declined(Exception):
    """An answer that is left to fsspec."""


class Endpoint(NamedTuple):
    scheme: str
    host: str
    port: int | None


class Connections:
    """Kept open from one request to the next. `read_range` may be called from any thread; `close` ends what is under
    way."""

    def __init__(self) -> None:
        self._idle: dict[Endpoint, list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read_range(self, address: str, start: int, end: int, size: int, descriptor: int) -> int:
        """Writes bytes [start, end) of an object of `size` bytes to the same place in the file, and returns the byte up
        to which the file is whole: less than `end` when the connection broke, `size` when the server sent everything.

        FileNotFoundError; ValueError after `close`; OSError when the same request may be answered later; Declined.
        """
        parts = urlsplit(address)
        if "@" in parts.netloc or parts.fragment or parts.scheme not in ("http", "https"):
            raise Declined
        place = Endpoint(parts.scheme, parts.hostname or "", parts.port)
        target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe="/%:=&?~+!$,;'@()*[]-._")
        connection, answer = self._ask(place, target, start, end)
        is_spent = False
        try:
            at, stop = _expected(answer, start, end, size)
            at = self._copy(answer, descriptor, at, stop)
            is_spent = at == stop and answer.isclosed() and not answer.will_close
        finally:
            if is_spent:
                self._keep(place, connection)
            else:  # something is left in it
                connection.close()
        if at <= start:
            raise OSError(f"no bytes came from {start:,} on, of {size:,}")
        return at

    def _copy(self, answer: http.client.HTTPResponse, descriptor: int, at: int, stop: int) -> int:
        """Writes the answer's body to [at, stop) of the file; up to where it came."""
        if not hasattr(_own, "buffer"):
            _own.buffer = memoryview(bytearray(BUFFER))
        while at < stop:
            if self._closed.is_set():
                raise ValueError("closed")
            try:
                count = answer.readinto(_own.buffer[: min(BUFFER, stop - at)])
            except (OSError, http.client.HTTPException):  # what came before it counts
                break
            if not count:
                break
            write_at(descriptor, _own.buffer[:count], at)
            at += count
        return at

    def _ask(
        self, place: Endpoint, target: str, start: int, end: int
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The answer's head. A kept connection that the server has closed meanwhile is opened again."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        while True:
            with self._lock:
                idle = self._idle.get(place)
                kept = idle.pop() if idle else None
            connection = kept
            try:
                if connection is None:
                    connection = self._new(place)
                    connection.connect()
                    connection.sock.settimeout(READ_SECONDS)
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                if connection is not None:
                    connection.close()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise Declined from None
                if kept is None or isinstance(error, TimeoutError):
                    raise OSError(f"{type(error).__name__}: {error}") from error

    def _new(self, place: Endpoint) -> http.client.HTTPConnection:
        if place.scheme == "http":
            return http.client.HTTPConnection(place.host, place.port, timeout=CONNECT_SECONDS)
        return http.client.HTTPSConnection(place.host, place.port, timeout=CONNECT_SECONDS, context=self._trusted)

    @functools.cached_property
    def _trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # which reads all certificates: once for all connections

    def _keep(self, place: Endpoint, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._idle.setdefault(place, []).append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            for connection in (c for idle in self._idle.values() for c in idle):
                connection.close()
            self._idle.clear()


def _expected(answer: http.client.HTTPResponse, start: int, end: int, size: int) -> tuple[int, int]:
    """The bytes [begin, end) that the answer holds."""
    if answer.status == 404:
        raise FileNotFoundError
    if answer.status in BUSY or answer.status >= 500:
        raise OSError(f"HTTP {answer.status} {answer.reason}")
    if answer.headers.get("Content-Encoding", "identity") != "identity" or answer.length is None:
        raise Declined
    if answer.status == 206:
        told = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if told is not None and int(told[1]) == start and answer.length <= end - start:
            return start, start + answer.length
    if answer.status == 200 and answer.length == size:  # a server without ranges
        return 0, size
    raise Declined


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
