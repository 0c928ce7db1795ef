"""Ranges over plain HTTP: right bytes, and every answer that is not a healthy server's is left to fsspec."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.sources import http_range
from pipeline.sources.http_range import Connections, Declined

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server(ThreadingHTTPServer):
    """`says` is what it does with the next request: "" is what a healthy server does."""

    daemon_threads = True
    says = ""
    seen: list[tuple[str, Any]] = []  # noqa: RUF012 - each test has a server of its own
    going_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        says, self.server.says = self.server.says, ""
        self.server.seen.append((self.path, self.client_address))
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body, status = CONTENT[begin : end + 1], 206
        headers = {"Content-Range": f"bytes {begin}-{end}/{len(CONTENT)}"}
        if says.isdigit():
            body, status, headers = b"told why", int(says), {"Location": "/elsewhere"}
        elif says == "everything":
            body, status, headers = CONTENT, 200, {}
        elif says == "another":
            body, status, headers = CONTENT[:-1], 200, {}
        elif says == "shifted":
            headers = {"Content-Range": f"bytes {begin + 1}-{end + 1}/{len(CONTENT)}"}
        elif says == "gzip":
            headers |= {"Content-Encoding": "gzip"}
        elif says == "more":
            body = CONTENT[begin : end + 100]
        elif says == "chunked":
            headers |= {"Transfer-Encoding": "chunked"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if says != "chunked":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: {"cut": 1000, "stall": http_range.BUFFER + 1000}.get(says)])
        if says in ("cut", "hang up"):
            self.close_connection = True
        if says == "hang up":  # after a whole answer, as servers do with idle connections
            self.connection.shutdown(socket.SHUT_RDWR)
        if says == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        if says == "stall":
            self.server.going_on.wait()
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.seen, made.going_on = [], threading.Event()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.going_on.set()
    made.shutdown()
    made.server_close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def address(server: Server, path: str = "a.tar") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{path}"


def test_ranges_come_over_one_connection(server: Server, file: int) -> None:
    connections = Connections()
    for start in range(0, len(CONTENT), 700_000):
        end = min(start + 700_000, len(CONTENT))
        assert connections.read_range(address(server, "a b%20ü.tar?key=a/b+c"), start, end, len(CONTENT), file) == end
    assert os.pread(file, len(CONTENT), 0) == CONTENT
    assert {path for path, _ in server.seen} == {"/a%20b%20%C3%BC.tar?key=a/b+c"}
    assert len({client for _, client in server.seen}) == 1
    connections.close()
    with pytest.raises(ValueError, match="closed"):
        connections.read_range(address(server), 0, 10, len(CONTENT), file)


@pytest.mark.parametrize(
    "says", ["301", "302", "307", "400", "401", "403", "416", "another", "shifted", "gzip", "more", "chunked"]
)
def test_others_answers_are_declined(server: Server, file: int, says: str) -> None:
    connections, server.says = Connections(), says
    with pytest.raises(Declined):
        connections.read_range(address(server), 1000, 2000, len(CONTENT), file)
    assert os.fstat(file).st_size == 0
    assert connections.read_range(address(server), 1000, 2000, len(CONTENT), file) == 2000  # nothing of it is left over
    assert os.pread(file, 1000, 1000) == CONTENT[1000:2000]
    connections.close()


@pytest.mark.parametrize(
    "bad", ["http://me:secret@127.0.0.1/a.tar", "ftp://127.0.0.1/a.tar", "http://127.0.0.1/a#b.tar"]
)
def test_addresses_that_are_declined(file: int, bad: str) -> None:
    with pytest.raises(Declined):
        Connections().read_range(bad, 0, 10, 10, file)


def test_what_may_come_later_and_what_never_comes(server: Server, file: int) -> None:
    connections = Connections()
    for says, error in [("503", OSError), ("429", OSError), ("404", FileNotFoundError)]:
        server.says = says
        with pytest.raises(error):
            connections.read_range(address(server), 0, 1000, len(CONTENT), file)
    server.says = "everything"
    assert connections.read_range(address(server), 0, 1000, len(CONTENT), file) == len(CONTENT)
    assert os.pread(file, len(CONTENT), 0) == CONTENT
    connections.close()


def test_a_broken_connection_keeps_what_came(server: Server, file: int) -> None:
    connections, server.says = Connections(), "cut"
    assert connections.read_range(address(server), 500, 9000, len(CONTENT), file) == 1500
    assert connections.read_range(address(server), 1500, 9000, len(CONTENT), file) == 9000
    assert os.pread(file, 8500, 500) == CONTENT[500:9000]
    connections.close()


def test_a_file_that_cannot_be_written_is_no_broken_connection(server: Server, tmp_path: Path) -> None:
    """The disk's own error comes out, as when it is full: to ask the server again would not help."""
    (tmp_path / "part").touch()
    descriptor = os.open(tmp_path / "part", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Connections().read_range(address(server), 0, 1000, len(CONTENT), descriptor)
    os.close(descriptor)


def test_a_server_that_falls_silent(server: Server, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its body the wait ends and whole buffers count; before its head, the request may be answered later."""
    monkeypatch.setattr(http_range, "READ_SECONDS", 0.3)
    connections, server.says = Connections(), "stall"
    began = time.monotonic()
    came = 500 + http_range.BUFFER
    assert connections.read_range(address(server), 500, len(CONTENT), len(CONTENT), file) == came
    assert time.monotonic() - began < 10
    assert connections.read_range(address(server), came, came + 900, len(CONTENT), file) == came + 900
    assert os.pread(file, came + 400, 500) == CONTENT[500 : came + 900]
    connections.close()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(OSError, match="TimeoutError"):
        Connections().read_range(f"http://127.0.0.1:{mute.getsockname()[1]}/a", 0, 10, 10, file)


def test_a_connection_that_the_server_closed_is_opened_again(server: Server, file: int) -> None:
    connections, server.says = Connections(), "hang up"
    for start in (0, 1000, 2000):
        assert connections.read_range(address(server), start, start + 1000, len(CONTENT), file) == start + 1000
    assert os.pread(file, 3000, 0) == CONTENT[:3000]
    assert len(server.seen) == 3
    connections.close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="ConnectionRefusedError"):
            Connections().read_range(f"http://127.0.0.1:{unused.getsockname()[1]}/a", 0, 10, 10, file)
    assert len(CONTENT) > http_range.BUFFER
