"""Runs whose --out is a URL: train.py against an S3 server on loopback, with kills, other machines and refusals."""

import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Runs, log_of, losses

import checkpoint
from pipeline import files
from trainer.mirror import pull, read_pointer

pytestmark = pytest.mark.process
Serve = Callable[..., str]


def environment(tmp_path: Path, machine: str) -> dict[str, str]:
    """For the child, which was forked from a server that does not know them: another machine has another cache."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return aws | {"XDG_CACHE_HOME": str(tmp_path / machine)}


def folder_of(tmp_path: Path, machine: str) -> Path:
    return next((tmp_path / machine / "moco-pipeline" / "runs").iterdir())


def start(runs: Runs, url: str, shards_dir: Path, tmp_path: Path, machine: str, **options: Any) -> list[int]:
    """The same command on this machine or another; its output goes to MACHINE.log."""
    log = tmp_path / machine
    patch = "from trainer import mirror; mirror.RENEW_SECONDS, mirror.LEASE_SECONDS = 0.2, 2.0\n"
    patch += options.pop("patch", "")
    return runs.start(
        log, shards_dir, env=environment(tmp_path, machine), patch=patch, **({"url": url, "save_every": 4} | options)
    )


@pytest.mark.slow
def test_killed_in_mid_upload_and_continued_on_a_fresh_machine(
    runs: Runs, serve: Serve, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "bucket").mkdir()
    url = f"{serve('s3', tmp_path / 'bucket', '--latency', '0.3')}/runs/photos"
    pids = start(runs, url, shards_dir, tmp_path, "first")
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("first/moco-pipeline/runs/*/checkpoints/step_00000008.pt")):
        assert time.monotonic() < deadline, log_of(tmp_path / "first").read_text()
        time.sleep(0.005)
    os.kill(pids[0], signal.SIGKILL)
    runs.wait(pids)
    pointer = read_pointer(url)
    assert pointer is not None and pointer["step"] == 4  # 8 was on its way
    pids = start(runs, url, shards_dir, tmp_path, "second", trackers="[tensorboard]", curves=True)
    assert runs.wait(pids) == [0], log_of(tmp_path / "second").read_text()
    said = log_of(tmp_path / "second").read_text()
    assert "steps 4 to 20" in said
    assert losses(folder_of(tmp_path, "second")) == losses(undisturbed)
    pull(url, tmp_path / "third")
    assert losses(tmp_path / "third") == losses(undisturbed)
    assert {"curves.png", "finished", "recipe.yaml", "moco"} <= {p.name for p in (tmp_path / "third").iterdir()}
    assert f"out: {url}" in (tmp_path / "third" / "recipe.yaml").read_text()
    assert checkpoint.load_newest(tmp_path / "third")["step"] == 20  # type: ignore[index]
    assert runs.wait(start(runs, url, shards_dir, tmp_path, "third")) == [0]  # nothing to do, nothing lost
    assert read_pointer(url)["step"] == 20  # type: ignore[index]


def test_a_store_that_refuses_costs_the_upload_and_not_the_run(
    runs: Runs, serve: Serve, shards_dir: Path, undisturbed: Path, tmp_path: Path, s3_address: Callable[[], str]
) -> None:
    (tmp_path / "bucket").mkdir()
    url = f"{serve('s3', tmp_path / 'bucket')}/runs/photos"
    refuse = f"""
import urllib.request, checkpoint
save = checkpoint.save
def then_refuse(*arguments, step, **options):
    if step == 8:
        urllib.request.urlopen("{s3_address()}/__refuse_puts__").close()
    return save(*arguments, step=step, **options)
checkpoint.save = then_refuse
"""
    pids = start(runs, url, shards_dir, tmp_path, "machine", patch=refuse)
    assert runs.wait(pids) == [1]
    folder, said = folder_of(tmp_path, "machine"), log_of(tmp_path / "machine").read_text()
    assert f"warning: step 8 is saved in {folder} alone (" in said
    assert "the last steps are not saved: " in said
    assert f"they are in {folder} alone, and the same command uploads them" in said
    assert losses(folder) == losses(undisturbed)
    urllib.request.urlopen(f"{s3_address()}/__accept_puts__").close()
    assert read_pointer(url)["step"] == 4  # type: ignore[index]
    assert runs.wait(start(runs, url, shards_dir, tmp_path, "machine")) == [0]
    assert read_pointer(url)["step"] == 20  # type: ignore[index]
    assert "finished" in files.names(url)


@pytest.mark.slow
def test_two_machines_as_two_ranks_and_a_stranger(runs: Runs, serve: Serve, shards_dir: Path, tmp_path: Path) -> None:
    """Each machine has its own folder; a second training of the same URL is refused as long as the first lives."""
    (tmp_path / "bucket").mkdir()
    url = f"{serve('s3', tmp_path / 'bucket')}/runs/photos"
    folders = [tmp_path / "one", tmp_path / "two"]
    pids = start(runs, url, shards_dir, tmp_path, "pair", ranks=2, work_dir=folders, max_steps=8)
    assert runs.wait(pids) == [0, 0], log_of(tmp_path / "pair").read_text()
    assert checkpoint.list_steps(folders[0]) == [4, 8]
    assert not checkpoint.list_steps(folders[1])
    slow = "import time, checkpoint; save = checkpoint.save\n"
    slow += "checkpoint.save = lambda *arguments, **options: (time.sleep(6), save(*arguments, **options))[1]"
    pids = start(runs, url, shards_dir, tmp_path, "pair", ranks=2, work_dir=folders, max_steps=12, patch=slow)
    while checkpoint.list_steps(folders[1]) != [8]:  # its machine has fetched where rank 0 goes on
        time.sleep(0.02)
    assert runs.wait(start(runs, url, shards_dir, tmp_path, "stranger")) == [2]
    assert "is written to by process" in log_of(tmp_path / "stranger").read_text()
    assert runs.wait(pids) == [0, 0], log_of(tmp_path / "pair").read_text()
    assert read_pointer(url)["step"] == 12  # type: ignore[index]
