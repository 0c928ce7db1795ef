"""A run folder at a URL, against an S3 server on loopback: what is saved arrives, and one writer at a time."""

import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from pipeline import files
from trainer import mirror
from trainer.mirror import Mirror, bring, local_folder, pull, read_pointer

Serve = Callable[..., str]


@pytest.fixture
def url(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mirror, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "LEASE_SECONDS", 3.0)
    (tmp_path / "empty").mkdir()
    return f"{serve('s3', tmp_path / 'empty')}/runs/photos"


@pytest.fixture
def mirrors() -> Iterator[list[Mirror]]:
    made: list[Mirror] = []
    yield made
    for one in made:
        one._over.set()


def begun(mirrors: list[Mirror], url: str, folder: Path) -> Mirror:
    mirrors.append(Mirror(url, folder))
    mirrors[-1].begin()
    return mirrors[-1]


def save(folder: Path, step: int, keep: int = 3, keep_every: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, step + 1)))
    return checkpoint.save(
        folder, {"step": step, "weights": torch.full((10,), step)}, step=step, keep=keep, keep_every=keep_every
    )


def names(url: str) -> set[str]:
    fs, root = files.file_system(url)
    fs.invalidate_cache()
    return {path.removeprefix(root + "/") for path in fs.find(root)}


def test_what_is_saved_arrives_on_a_fresh_machine(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert pull(url, here) is None
    with pytest.raises(FileNotFoundError, match=r"no run at s3://data/runs/photos"):
        bring(url)
    mirror = begun(mirrors, url, here)
    for step in (2, 4, 6, 8):
        save(here, step)
        mirror.push(keep=3)
    assert read_pointer(url) == {
        "step": 8,
        "file": "step_00000008.pt",
        "bytes": checkpoint.path_of(here, 8).stat().st_size,
    }
    kept = {f"checkpoints/step_0000000{step}.pt" for step in (4, 6, 8)}  # as locally: the three newest
    assert names(url) == kept | {"checkpoints/latest.json", "metrics.jsonl", "writer-000001.json"}
    assert pull(url, there) == 8
    assert torch.equal(checkpoint.load_newest(there)["weights"], torch.full((10,), 8))  # type: ignore[index]
    assert (there / "metrics.jsonl").read_text() == (here / "metrics.jsonl").read_text()
    assert checkpoint.list_steps(there) == [8]
    assert checkpoint.list_steps(bring(url)) == [8]


def test_a_fresh_machine_removes_no_checkpoint_that_is_kept(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    """It has only the newest one in its folder; those of every fourth step are kept for good, and strangers' files."""
    first = begun(mirrors, url, tmp_path / "one")
    for step in (2, 4, 6, 8):
        save(tmp_path / "one", step, keep=1, keep_every=4)
        first.push(keep=1, keep_every=4)
    first.close()
    files.write(f"{url}/checkpoints/step_copy.pt", b"somebody's")
    second = begun(mirrors, url, tmp_path / "two")
    save(tmp_path / "two", 10, keep=1, keep_every=4)
    second.push(keep=1, keep_every=4)
    there = {name.removeprefix("checkpoints/") for name in names(url) if name.endswith(".pt")}
    assert there == {"step_00000004.pt", "step_00000008.pt", "step_00000010.pt", "step_copy.pt"}


def test_a_folder_that_is_ahead_keeps_what_it_has(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    """After a failed upload the local checkpoint is newer than the pointer's, and goes up when the run goes on."""
    save(tmp_path / "run", 2)
    mirror = begun(mirrors, url, tmp_path / "run")
    assert read_pointer(url)["step"] == 2  # type: ignore[index]
    save(tmp_path / "run", 4)
    assert pull(url, tmp_path / "run") == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    mirror.close()
    begun(mirrors, url, tmp_path / "run")
    assert read_pointer(url)["step"] == 4  # type: ignore[index]


def test_failed_upload_leaves_the_pointer(
    url: str, tmp_path: Path, mirrors: list[Mirror], s3_address: Callable[[], str]
) -> None:
    mirror = begun(mirrors, url, tmp_path / "run")
    save(tmp_path / "run", 2)
    mirror.push(keep=3)
    urllib.request.urlopen(f"{s3_address()}/__refuse_puts__").close()
    save(tmp_path / "run", 4)
    with pytest.raises((OSError, ValueError), match="photos"):
        mirror.push(keep=3)
    urllib.request.urlopen(f"{s3_address()}/__accept_puts__").close()
    assert read_pointer(url)["step"] == 2  # type: ignore[index]
    assert pull(url, tmp_path / "fresh") == 2
    assert checkpoint.load_newest(tmp_path / "fresh")["step"] == 2  # type: ignore[index]
    mirror.push(keep=3)  # nothing new was saved: what had failed goes up
    assert read_pointer(url)["step"] == 4  # type: ignore[index]
    assert len(files.read(f"{url}/metrics.jsonl").splitlines()) == 4


def test_a_run_that_goes_on_is_not_finished(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    mirror = begun(mirrors, url, tmp_path / "run")
    save(tmp_path / "run", 2)
    (tmp_path / "run" / "finished").write_text("2")
    mirror.push(keep=3)
    assert "finished" in names(url)
    (tmp_path / "run" / "finished").unlink()
    save(tmp_path / "run", 4)
    mirror.push(keep=3)
    assert "finished" not in names(url)


def test_second_writer_is_kept_out(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    mirror = begun(mirrors, url, tmp_path / "one")
    with pytest.raises(ValueError, match=r"is written to by process \d+ on .*: wait for its end, or give another"):
        begun(mirrors, url, tmp_path / "two")
    save(tmp_path / "one", 2)
    mirror.push(keep=3)


def test_a_dead_writer_is_followed_after_its_lease(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    first = begun(mirrors, url, tmp_path / "one")
    save(tmp_path / "one", 2)
    first.push(keep=3)
    first._over.set()  # as a machine that is gone: nothing is renewed any more
    assert first._thread is not None
    first._thread.join()
    began = time.monotonic()
    second = begun(mirrors, url, tmp_path / "two")
    assert 3.0 <= time.monotonic() - began < 30
    # The first was only paused, and comes back.
    save(tmp_path / "one", 4)
    with pytest.raises(ValueError, match="was taken over by another run"):
        first.push(keep=3)
    assert read_pointer(url)["step"] == 2  # type: ignore[index]
    save(tmp_path / "two", 6)
    second.push(keep=3)
    assert read_pointer(url)["step"] == 6  # type: ignore[index]


def test_a_lost_answer_is_no_other_run(
    url: str, tmp_path: Path, mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store made the writer's object, and the connection broke before it said so: the next try finds the object."""
    usual, lost = files.file_system, list[str]()

    class Losing:
        def __init__(self, fs: Any) -> None:
            self.fs = fs

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fs, name)

        def pipe_file(self, path: str, *arguments: Any, **options: Any) -> None:
            self.fs.pipe_file(path, *arguments, **options)
            if not lost:
                lost.append(path)
                raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(files, "file_system", lambda place: (Losing(usual(place)[0]), usual(place)[1]))
        begun(mirrors, url, tmp_path / "one")
    assert lost and {name for name in names(url) if "writer" in name} == {"writer-000001.json"}


def test_of_two_that_begin_at_once_one_is_refused(
    url: str, tmp_path: Path, mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(mirrors, url, tmp_path / "one")
    monkeypatch.setattr(Mirror, "_numbers", lambda _: [])  # it looked before the other had begun
    with pytest.raises(ValueError, match="was taken by another run at this moment"):
        begun(mirrors, url, tmp_path / "two")


def test_one_that_has_ended_is_followed_at_once(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    begun(mirrors, url, tmp_path / "one").close()
    began = time.monotonic()
    begun(mirrors, url, tmp_path / "two")
    assert time.monotonic() - began < 2.5
    assert {name for name in names(url) if "writer" in name} == {"writer-000002.json"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step_00000001.pt"])
def test_what_others_saved_is_not_written_over(url: str, tmp_path: Path, mirrors: list[Mirror], name: str) -> None:
    """Without a pointer and without a writer, no run of this program has been there."""
    files.write(f"{url}/{name}", b"theirs")
    save(tmp_path / "run", 2)
    with pytest.raises(ValueError, match=rf"runs/photos holds {name} and no run of this program: give another --out"):
        begun(mirrors, url, tmp_path / "run")
    assert files.read(f"{url}/{name}") == b"theirs" and names(url) == {name}


def test_nothing_outside_the_folder_is_written(url: str, tmp_path: Path, mirrors: list[Mirror]) -> None:
    mirror = begun(mirrors, url, tmp_path / "one")
    save(tmp_path / "one", 2)
    mirror.push(keep=3)
    fs, root = files.file_system(url)
    fs.pipe_file(f"{root}/../../outside.txt", b"x")
    files.write(f"{url}/checkpoints/latest.json", b'{"step": 9, "file": "../../step_00000009.pt", "bytes": 1}')
    with pytest.raises(ValueError, match="is not a pointer to a checkpoint"):
        pull(url, tmp_path / "deep" / "two")
    shutil.rmtree(tmp_path / "one")
    assert not list(tmp_path.rglob("outside.txt"))


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_folder("runs/photos") == Path("runs/photos")
    assert local_folder("s3://b/runs/photos", str(tmp_path / "w")) == tmp_path / "w"
    assert local_folder("s3://b/runs/photos").parent == tmp_path / "moco-pipeline" / "runs"
    assert local_folder("s3://b/runs/photos/") == local_folder("s3://b/runs/photos")
    assert local_folder("s3://b/runs/photos") != local_folder("s3://c/runs/photos")
