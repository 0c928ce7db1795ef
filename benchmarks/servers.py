"""Servers on loopback that behave like far and busy ones, for the remote tests and benchmarks.

    python benchmarks/servers.py http FOLDER PORT --latency 0.02 --busy_every 7 --reset_every 11 --short_every 13
    python benchmarks/servers.py s3 FOLDER PORT ...    # moto, FOLDER's files as s3://data/...

Both answer each request after `latency` seconds; http sends at most `bandwidth` MB/s over all connections. Each n-th
GET of an object is answered with 503, or cut off in the middle by a reset connection, or (http) with fewer bytes than
asked for and a true Content-Length. `GET /__counts__` tells what was asked for, and how often it went wrong. `GET
/__refuse_puts__` (s3) has every PUT refused from then on, `GET /__accept_puts__` ends that. http serves as an S3
endpoint, too, for clients that only get objects.
"""

import argparse
import contextlib
import email.utils
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 1 << 18  # bytes sent at once over a line of limited bandwidth


class Faults:
    """Which request goes wrong, counted over all connections."""

    def __init__(
        self, latency: float, busy_every: int, reset_every: int, short_every: int, bandwidth: float = 0.0
    ) -> None:
        self.latency, self.bandwidth = latency, bandwidth  # seconds; bytes a second, 0: as fast as it goes
        self.line_is_free = 0.0  # the clock's time from which on the line can take more
        self.every = {"busy": busy_every, "reset": reset_every, "short": short_every}
        self.requests = 0
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def next(self, path: str) -> str:
        """The fault of this request, "" for none."""
        with self.lock:
            self.requests += 1
            self.counts[f"requests {path}"] += 1
            for fault, every in self.every.items():
                if every and self.requests % every == 0:
                    self.counts[fault] += 1
                    return fault
        return ""

    def pass_line(self, count: int) -> None:
        """Returns when the line, which all connections share, has taken `count` bytes."""
        if self.bandwidth:
            with self.lock:
                self.line_is_free = max(self.line_is_free, time.monotonic()) + count / self.bandwidth
                until = self.line_is_free
            time.sleep(max(0.0, until - time.monotonic()))


def reset(connection: socket.socket) -> None:
    """Closes with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def make_http_server(root: Path, port: int, faults: Faults, ranges: bool) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 20

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            if self.path == "/__counts__":
                self.send(200, json.dumps(faults.counts).encode(), True)
                return
            time.sleep(faults.latency)
            path = root / self.path.partition("?")[0].lstrip("/")
            fault = faults.next(path.name) if body and path.is_file() else ""
            if fault == "busy":
                self.send(503, b"slow down", body)
            elif path.is_dir():
                links = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in sorted(path.iterdir()))
                self.send(200, links.encode(), body, kind="text/html")
            elif not path.is_file():
                self.send(404, b"not here", body)
            else:
                self.send_file(path, body, fault)

        def send_file(self, path: Path, body: bool, fault: str) -> None:
            size = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted and ranges else (0, size)
            if start >= size and wanted:
                self.send(416, b"", body)
                return
            if fault == "short" and wanted:
                end = start + max(1, (end - start) // 2)
            self.send_response(206 if wanted and ranges else 200)
            if wanted and ranges:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{size}-{path.stat().st_mtime_ns}"')
            self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
            self.end_headers()
            if not body:
                return
            self.wfile.flush()
            with path.open("rb") as f:
                if fault == "reset":
                    self.connection.sendfile(f, start, max(1, (end - start) // 3))
                    self.close_connection = True
                    reset(self.connection)
                    return
                for offset in range(start, end, BLOCK) if faults.bandwidth else ():
                    faults.pass_line(min(BLOCK, end - offset))
                    self.connection.sendfile(f, offset, min(BLOCK, end - offset))
                if not faults.bandwidth:
                    self.connection.sendfile(f, start, end - start)
            with faults.lock:
                faults.counts[f"bytes {path.name}"] += end - start

        def send(self, status: int, content: bytes, body: bool, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", kind)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Server(("127.0.0.1", port), Handler)


def make_s3_server(root: Path, port: int, faults: Faults) -> Any:
    """moto with the faults around it, and the folder's files in the bucket `data`."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *args: Any, **kwargs: Any) -> None:
            pass

    moto = DomainDispatcherApplication(create_backend_app)
    ready, refusing = threading.Event(), threading.Event()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/__counts__":
            content = json.dumps(faults.counts).encode()
            start_response("200 OK", [("Content-Length", str(len(content)))])
            return [content]
        if path in ("/__refuse_puts__", "/__accept_puts__"):
            refusing.set() if path == "/__refuse_puts__" else refusing.clear()
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        if not ready.is_set():
            return moto(environ, start_response)
        if refusing.is_set() and environ["REQUEST_METHOD"] in ("PUT", "POST"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            content = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
            headers = [("Content-Length", str(len(content))), ("Content-Type", "application/xml")]
            start_response("403 Forbidden", headers)
            return [content]
        time.sleep(faults.latency)
        is_object = environ["REQUEST_METHOD"] == "GET" and path.count("/") > 1 and not path.endswith("/")
        fault = faults.next(path.rpartition("/")[2]) if is_object else ""
        if fault == "busy":
            content = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>'
            headers = [("Content-Length", str(len(content))), ("Content-Type", "application/xml")]
            start_response("503 Slow Down", headers)
            return [content]
        chunks = moto(environ, start_response)
        if fault in ("reset", "short"):
            content = b"".join(chunks)
            reset_socket = environ["werkzeug.socket"]

            def cut() -> Iterable[bytes]:
                yield content[: len(content) // 2]
                reset(reset_socket)

            return cut()
        return chunks

    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.port}"
    client = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )
    client.create_bucket(Bucket="data", ACL="public-read")
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        client.put_object(Bucket="data", Key=str(path.relative_to(root)), Body=path.read_bytes(), ACL="public-read")
    ready.set()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["http", "s3"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int, help="0: any free one; the first line printed tells which")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="http: MB/s over all connections; 0: no limit")
    parser.add_argument("--busy_every", type=int, default=0)
    parser.add_argument("--reset_every", type=int, default=0)
    parser.add_argument("--short_every", type=int, default=0)
    parser.add_argument("--no_ranges", action="store_true", help="http: always send whole files")
    options = parser.parse_args()
    faults = Faults(
        options.latency, options.busy_every, options.reset_every, options.short_every, 1e6 * options.bandwidth
    )
    if options.kind == "http":
        server = make_http_server(options.folder, options.port, faults, not options.no_ranges)
        print(server.server_address[1], flush=True)
        server.serve_forever()
    else:
        server = make_s3_server(options.folder, options.port, faults)
        print(server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
