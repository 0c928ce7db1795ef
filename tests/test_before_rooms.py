"""The files of an earlier version open and go on.

before_rooms.tar.xz was written by commit 26c238e, the last one before the code moved into rooms: `images/`, `shards/`
before_rooms.tar.xz was written by commit 26c238e, the last before the code moved into rooms: `images/`, `shards/`
that opening it built, and `run/`, two steps of a tiny training; expected.json has the losses with which that version
went on to step 4. The listing in `half/` names its images by the absolute path below.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import REPOSITORY, cpu_environment

if TYPE_CHECKING:
    from training import Runs

ARCHIVE = Path(__file__).with_name("before_rooms.tar.xz")
PACKED_FROM = Path("/tmp/moco-pipeline-fixture/images")


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, timeout=120)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".idx")}


@pytest.mark.process
def test_half_packed_folder_goes_on(before: Path) -> None:
    done = (before / "half" / "shard-000000.tar").stat().st_mtime_ns
    shutil.rmtree(PACKED_FROM.parent, ignore_errors=True)
    shutil.copytree(before / "images", PACKED_FROM)
    try:
        result = run("pipeline.make_shards", PACKED_FROM, before / "half", "--samples_per_shard", "8")
    finally:
        shutil.rmtree(PACKED_FROM.parent)
    assert result.returncode == 0, result.stderr
    assert (before / "half" / "shard-000000.tar").stat().st_mtime_ns == done, "a finished shard was packed again"
    assert shards_of(before / "half") == shards_of(before / "shards")
    assert (before / "half" / "manifest.json").read_bytes() == (before / "shards" / "manifest.json").read_bytes()


@pytest.mark.process
def test_finished_folder_is_complete(before: Path) -> None:
    summary = before / "shards" / "make_shards.json"
    content = json.loads(summary.read_text())
    content["job"]["src"] = str(before / "images")  # the images have moved with the archive
    summary.write_text(json.dumps(content))
    result = run("pipeline.make_shards", before / "images", before / "shards", "--samples_per_shard", "8")
    assert result.returncode == 0, result.stderr
    assert "is complete: 24 of 24 images" in result.stdout


@pytest.mark.parametrize("name", ["shards", "foreign"])
@pytest.mark.process
def test_manifest_and_indexes_are_used_as_they_are(before: Path, name: str) -> None:
    files = {path: path.read_bytes() for path in sorted((before / name).iterdir())}
    result = run("pipeline.manifest", before / name, "--check")
    assert result.returncode == 0, result.stderr
    assert "checked 3 shards, 24 samples: 0 faults" in result.stdout
    # The same sample ids and order as before: the fingerprint that the earlier version printed.
    assert "fingerprint b4899a5943579e5e5dbd91b2b67c7b09" in result.stdout
    assert {path: path.read_bytes() for path in sorted((before / name).iterdir())} == files


def test_run_goes_on_with_the_same_losses(before: Path, runs: "Runs") -> None:
    folder = before / "run"
    recipe: dict[str, Any] = {"recipe": folder / "recipe.yaml", "max_steps": 4}
    assert runs.train(folder, before / "shards", **recipe) == [0], folder.with_suffix(".log").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    expected = {row["step"]: row["loss"] for row in json.loads((before / "expected.json").read_text())}
    assert losses == pytest.approx(expected, rel=1e-4)  # another CPU may round otherwise
