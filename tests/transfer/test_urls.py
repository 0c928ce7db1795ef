"""Runs and results at URLs, against an S3 server on loopback: nothing ends in a local folder named `s3:`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import checkpoint
from pipeline import files
from trainer import mirror
from trainer.mirror import Mirror, local_folder
from transfer import arguments, curves, export, gallery, linear, report

Serve = Callable[..., str]


@pytest.fixture
def bucket(serve: Serve, tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that holds the run of `run_folder` at runs/small."""
    monkeypatch.setattr(mirror, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(mirror, "LEASE_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    url = serve("s3", tmp_path / "empty")
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (1, 2, 7)))
    sending = Mirror(f"{url}/runs/small", run)
    sending.begin()
    sending.push(keep=1)
    sending.close()
    return url


def call(name: str, module: object, *flags: str | Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sys.argv", [name, *map(str, flags)])
    module.main(getattr(arguments, name)())  # type: ignore[attr-defined]


def test_results_go_to_urls(bucket: str, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"{bucket}/runs/small"
    call("export", export, "--run", run, "--output", f"{bucket}/out/r18.pth", patch=monkeypatch)
    assert files.read(f"{bucket}/out/r18.pth")[:2] == b"PK"
    flags = ["--run", run, "--data", shards_dir, "--queries", "2", "--output", f"{bucket}/out/g.png"]
    call("gallery", gallery, *flags, patch=monkeypatch)
    assert files.read(f"{bucket}/out/g.png")[:4] == b"\x89PNG"
    call("report", report, run, "--images", "0", patch=monkeypatch)
    assert files.read(f"{run}/report.html").startswith(b"<!doctype html>")
    call("curves", curves, run, patch=monkeypatch)
    assert files.read(f"{run}/curves.png")[:4] == b"\x89PNG"
    assert not (tmp_path / "s3:").exists()


def test_the_linear_protocol_continues_on_a_fresh_machine(
    bucket: str, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{bucket}/runs/small"
    flags = ["--run", run, "--train", shards_dir, "--val", shards_dir, "--lr", "0.1", "--batch_size", "30"]
    epoch = linear.train_epoch

    def fail_in_the_second(*given: object) -> torch.Tensor:
        if files.exists(checkpoint.path_of(local_folder(f"{run}/linear"), 1)):
            raise OSError("the machine is gone")
        return epoch(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "train_epoch", fail_in_the_second)
    with pytest.raises(OSError, match="the machine is gone"):
        call("linear", linear, *flags, "--epochs", "2", "--num_threads", "1", patch=monkeypatch)
    monkeypatch.setattr(linear, "train_epoch", epoch)
    pointer = mirror.read_pointer(f"{run}/linear")
    assert pointer is not None and pointer["step"] == 1
    shutil.rmtree(local_folder(f"{run}/linear"))  # another machine
    call("linear", linear, *flags, "--epochs", "2", "--num_threads", "1", patch=monkeypatch)
    rows = [json.loads(line) for line in files.read(f"{run}/linear/metrics.jsonl").splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["epoch"] == 2
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("name", ["embed", "probe"])
def test_what_needs_a_local_folder_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"embed": ["--run", "r", "--data", "d"], "probe": ["--train", "t", "--val", "v"]}[name]
    monkeypatch.setattr("sys.argv", [name, *flags, "--output", "s3://bucket/features"])
    with pytest.raises(SystemExit) as ended:
        getattr(arguments, name)()
    assert ended.value.code == 2
    assert "s3://bucket/features is a URL: this command needs a local folder" in capsys.readouterr().err
