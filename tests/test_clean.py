"""`make clean` and `make demo` delete what they made, and nothing of the user's."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

MINE = ("runs/photos/checkpoints/step_00000001.pt", "shards/photos/shard-000000.tar", "demo/run/mine", ".venv/bin/mine")

pytestmark = pytest.mark.process


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "demo.sh"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in MINE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def test_clean(clone: Path) -> None:
    subprocess.run(["make", "clean"], cwd=clone, check=True)
    assert all((clone / name).read_text() == "mine" for name in MINE)
    (clone / ".venv" / "installed").touch()  # by `make install`
    (clone / "demo" / ".made_by_make_demo").touch()
    (clone / "demo" / "notes.txt").write_text("mine")
    subprocess.run(["make", "clean"], cwd=clone, check=True)
    assert not (clone / ".venv").exists()
    assert [path.name for path in (clone / "demo").iterdir()] == ["notes.txt"]
    assert all((clone / name).exists() for name in MINE[:2])


def test_a_demo_folder_of_the_user(clone: Path) -> None:
    ended = subprocess.run(["bash", "demo.sh"], cwd=clone, capture_output=True, text=True)
    assert ended.returncode == 2 and "the folder demo was not made by `make demo`: move it away" in ended.stderr
    assert all((clone / name).read_text() == "mine" for name in MINE)
