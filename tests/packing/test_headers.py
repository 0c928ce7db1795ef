"""Lists whose servers want a header: it is sent, and written nowhere."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import make_shards as door
from pipeline.packing import shard
from pipeline.packing.fetch import parse_headers
from pipeline.packing.prepare import Options

SECRET = "s3cret-t0ken"


@pytest.fixture
def server(image_folder: Path) -> Iterator[str]:
    """Gives images to who shows the secret."""
    images = sorted(image_folder.rglob("*.jpg"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") == f"Bearer {SECRET}" and self.headers.get("X-More") == "1"
            body = images[int(self.path.strip("/").partition(".")[0])].read_bytes() if allowed else b"no"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["make_shards", *map(str, arguments)])
    door.main()


def test_headers_are_sent_and_written_nowhere(
    server: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{server}/{i}.jpg\n" for i in range(4)))
    with pytest.raises(ValueError, match=r"none of the 4 images can be used; 4: refused by its server"):
        command(monkeypatch, tmp_path / "list.txt", tmp_path / "none")
    monkeypatch.setenv("TOKEN", SECRET)
    given = ("--header", "Authorization: Bearer $TOKEN", "--header", "X-More: 1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # what the journal holds meanwhile
        patch.setattr(door, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        command(monkeypatch, tmp_path / "list.txt", tmp_path / "d", "--dedup", *given)
    written = [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    assert any(path.name == "job.json" for path in written)
    monkeypatch.setenv("TOKEN", "expired")  # another one goes on: what is done is done
    command(monkeypatch, tmp_path / "list.txt", tmp_path / "d", "--dedup", *given)
    written += [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    for path in written:
        assert not path.exists() or SECRET.encode() not in path.read_bytes(), path
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert json.loads((tmp_path / "d/make_shards.json").read_text())["packed"] == 4


def test_a_task_shows_no_header_when_it_is_told_of() -> None:
    task = shard.PackTask("a.tar", "a.json", [], Options(), parse_headers([f"Authorization: Bearer {SECRET}"]))
    assert SECRET not in repr(task)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Authorization", "has to be `Name: value`"),
        ("Two words: x", "has to be `Name: value`"),
        ("Name:", "has to be `Name: value`"),
        ("Name: a\nOther: b", "has to be `Name: value`"),
        ("Name: $NOT_SET_ANYWHERE", r"\$NOT_SET_ANYWHERE is not set in the environment"),
    ],
)
def test_a_header_that_is_none(given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_headers([given])
