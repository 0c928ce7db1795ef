"""A line of a list that cannot be fetched costs that line; the others are packed, and it can be tried again."""

import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset  # noqa: F401 (with it comes torch, whose import starts a program: here, before any test runs)
from PIL import Image

from pipeline.make_shards import make_shards
from pipeline.packing.fetch import fetch
from pipeline.packing.prepare import Options, Rejected
from pipeline.packing.survey import ListedImage
from pipeline.sources import remote
from pipeline.sources.manifest import load_manifest

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's


@pytest.fixture(autouse=True)
def pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.002)


class Web(http.server.ThreadingHTTPServer):
    """/ok/N gives image N; /late/N answers 503 until `late` is set; anything else is not there."""

    late = False
    asked = 0


class Answer(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked += 1
        _, kind, name = self.path.split("/")
        content = png(int(name.partition(".")[0])) if kind in ("ok", "late") else b""
        status = 404 if not content else 503 if kind == "late" and not self.server.late else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (i, 99, 77)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(web: Web, path: str) -> str:
    return f"http://127.0.0.1:{web.server_port}/{path}"


def write_list(path: Path, lines: list[str], labels: str = "") -> Path:
    path.write_text("path,label\n" + "".join(f"{line},{label}\n" for line, label in zip(lines, labels or "x" * 999)))
    return path


def pack(src: Path, dest: Path, **more: Any) -> dict[str, Any]:
    make_shards(str(src), str(dest), options=Options(), num_workers=1, **more)
    summary: dict[str, Any] = json.loads((dest / "make_shards.json").read_text())
    return summary


def rejected(dest: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (dest / "rejected.jsonl").read_text().splitlines()]
    return {line["name"]: f"{line['reason']}: {line['detail']}" for line in lines}


DEAD = {
    "http://127.0.0.1:1/x.jpg": "not fetched: ClientConnectorError: Cannot connect to host 127.0.0.1:1",
    "http://no-such-host.invalid/x.jpg": "not fetched: ClientConnectorDNSError: Cannot connect to host no-such-host",
    "ftp://127.0.0.1/x.jpg": "not fetched: ValueError: ftp:// is not a kind of URL that is read; s3, gs, http",
    "unheard-of://x/y.jpg": "not fetched: ValueError: unheard-of:// is not a kind of URL that is read",
    "http://[half/x.jpg": "not fetched: ",
}


def test_dead_hosts_cost_their_lines(web: Web, tmp_path: Path) -> None:
    (tmp_path / "local.png").write_bytes(png(200))
    lines = ["local.png", *(url(web, f"ok/{i}.png") for i in range(5)), url(web, "none/7.jpg"), *DEAD]
    summary = pack(write_list(tmp_path / "list.csv", lines), tmp_path / "d")
    assert (summary["found"], summary["packed"]) == (7 + len(DEAD), 6)
    assert summary["reasons"] == {"not fetched": len(DEAD), "no such file": 1}
    told = rejected(tmp_path / "d")
    for line, reason in DEAD.items():
        assert told[line].startswith(reason), told[line]


def test_a_host_that_never_answers_is_not_waited_for_by_every_line() -> None:
    """Lists from the web name thousands of dead hosts, many times each."""
    images = [ListedImage(f"http://127.0.0.1:1/{i}.jpg", -1, -1, "x") for i in range(200)]
    began = time.monotonic()
    reasons = [answer.detail for answer in fetch(images) if isinstance(answer, Rejected)]
    assert len(reasons) == 200 and time.monotonic() - began < 10
    assert sum("did not answer the lines before" in reason for reason in reasons) == 200 - 32  # all but the first group


@pytest.mark.slow
def test_a_host_that_answers_again_is_asked_again(web: Web) -> None:
    names = ["none/1", *(f"late/{i}" for i in range(40)), "ok/1"]
    answers = list(fetch(ListedImage(url(web, name), -1, -1, name) for name in names))
    assert [a.reason if isinstance(a, Rejected) else "" for a in answers] == ["no such file", *["not fetched"] * 40, ""]


def test_hosts_are_no_classes(tmp_path: Path, web: Web) -> None:
    names = [url(web, "ok/1.png"), "http://127.0.0.1:1/ok/2.png", url(web, "ok/3.png")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert pack(tmp_path / "list.txt", tmp_path / "d")["classes"] == 0


def test_a_hopeless_packing_is_stopped(web: Web, tmp_path: Path) -> None:
    lines = [url(web, f"ok/{i}.png") for i in range(12)] + [f"http://127.0.0.1:1/{i}.jpg" for i in range(8)]
    src, dest = write_list(tmp_path / "list.csv", lines), tmp_path / "d"
    message = r"\d of 20 images could not be fetched, more than --max_failed 0\.1 allows \(one is http://127.0.0.1:1/"
    for _ in range(2):  # those of the shards that are done count too
        with pytest.raises(ValueError, match=message):
            pack(src, dest, max_failed=0.1, samples_per_shard=4)
    assert not (dest / "make_shards.json").exists()
    assert pack(src, dest, max_failed=0.4, samples_per_shard=4)["packed"] == 12
    assert pack(src, tmp_path / "same", samples_per_shard=4)["packed"] == 12
    for path in sorted((tmp_path / "same").glob("*.tar")):
        assert path.read_bytes() == (dest / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("holdout", [0, 4])
def test_what_failed_is_packed_into_further_shards(
    holdout: int, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [url(web, f"{'late' if i % 3 == 0 else 'ok'}/{i}.png") for i in range(30)] + ["http://127.0.0.1:1/x.jpg"]
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    src = write_list(tmp_path / "list.csv", [*lines, "damaged.jpg"], labels="abc" * 11)
    dest, options = tmp_path / "d", {"samples_per_shard": 4, "holdout": float(holdout)}
    part = dest / "train" if holdout else dest

    def files_of(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(dest)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    with pytest.raises(ValueError, match="is not complete: the same command without --retry_failed comes first"):
        pack(src, dest, retry_failed=True, **options)
    summary = pack(src, dest, **options)
    assert summary["reasons"] == {"not fetched": 11, "not an image": 1} and summary["classes"] == 2
    val = summary["samples"].get("val")
    first = files_of(dest)
    asked = web.asked
    web.late = True
    pack(src, dest, **options)
    assert files_of(dest) == first and web.asked == asked  # a finished packing stays as it is

    for place in ("make_shards.finish", "packing.summary.contact_sheet"):  # all is packed; the manifest is written too
        monkeypatch.setattr(f"pipeline.{place}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(src, dest, retry_failed=True, **options)
        monkeypatch.undo()
    capsys.readouterr()
    pack(src, dest, **options)
    assert "a --retry_failed was interrupted here" in capsys.readouterr().out
    summary = pack(src, dest, retry_failed=True, **options)
    assert "going on: 3 of 3 shards are done" in capsys.readouterr().out
    assert (summary["found"], summary["packed"], summary["rejected"], summary["classes"]) == (32, 30, 2, 3)
    assert summary["reasons"] == {"not fetched": 1, "not an image": 1}
    assert rejected(dest).keys() == {"http://127.0.0.1:1/x.jpg", "damaged.jpg"}
    second = files_of(dest)
    tars = {name for name in first if name.endswith((".tar", ".idx"))}
    assert all(second[name] == first[name] for name in tars)
    manifest = load_manifest(part / "manifest.json")
    assert sum(shard.samples for shard in manifest.shards) == 30 - (summary["samples"]["val"] if holdout else 0)
    assert [shard.path for shard in manifest.shards] == sorted(p.name for p in part.glob("*.tar"))
    assert sum(summary["samples"].values()) == 30
    assert summary["samples"].get("val") == val  # what was held out stays as it is
    with_index = {p.stem for p in part.glob("*.idx")}
    assert with_index == {p.stem for p in part.glob("*.tar")}

    assert pack(src, dest, retry_failed=True, **options) == summary  # the dead host is still dead
    assert {n: b for n, b in files_of(dest).items() if n.endswith(".tar")} == {
        n: b for n, b in second.items() if n.endswith(".tar")
    }
    (tmp_path / "fine.csv").write_text(f"path\n{tmp_path / 'fine.png'}\n")
    (tmp_path / "fine.png").write_bytes(png(1))
    pack(tmp_path / "fine.csv", tmp_path / "fine")
    pack(tmp_path / "fine.csv", tmp_path / "fine", retry_failed=True)
    assert "nothing to retry" in capsys.readouterr().out


def test_further_shards_overwrite_none(web: Web, tmp_path: Path) -> None:
    """A shard of which nothing was left has no tar: there are fewer than the highest number says."""
    lines = [url(web, f"late/{i}.png") for i in range(12)] + [url(web, "ok/99.png")]
    src, dest, options = write_list(tmp_path / "list.csv", lines), tmp_path / "d", {"samples_per_shard": 1}
    assert pack(src, dest, **options)["packed"] == 1
    (before,) = dest.glob("*.tar")
    content = before.read_bytes()
    assert before.name != "shard-000000.tar"
    web.late = True
    assert pack(src, dest, retry_failed=True, **options)["packed"] == 13
    assert before.read_bytes() == content and len(list(dest.glob("*.tar"))) == 13
    manifest = load_manifest(dest / "manifest.json")
    assert manifest.shards[0].path == before.name and len({shard.path for shard in manifest.shards}) == 13


def test_a_port_that_accepts_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aiohttp

    made = aiohttp.ClientTimeout
    monkeypatch.setattr(aiohttp, "ClientTimeout", lambda **more: made(**(more | {"sock_read": 0.2})))
    remote._filesystem.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}/x.jpg"
        (answer,) = fetch([ListedImage(address, -1, -1, address)])
    remote._filesystem.cache_clear()
    assert isinstance(answer, Rejected) and answer.reason == "not fetched" and "imeout" in answer.detail
