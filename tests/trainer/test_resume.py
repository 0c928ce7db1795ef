"""Whose a run folder is, before anything is written there."""

from pathlib import Path

import pytest

import checkpoint
from trainer.build import lock_run_folder
from trainer.resume import WRITTEN_OVER, refuse_foreign_folder


@pytest.mark.parametrize("name", [*WRITTEN_OVER, ".lock"])
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name}.*this program: give another --out, or move"):
        lock_run_folder(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_run_folder_is_taken_again(tmp_path: Path) -> None:
    """One of before folders were locked has a checkpoint; one that was killed before its first checkpoint its lock;
    other files of the user lie beside them."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    lock_run_folder(tmp_path / "new")
    (tmp_path / "new" / "recipe.yaml").write_text("lr: 1")
    refuse_foreign_folder(tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.yaml").write_text("lr: 1")
    checkpoint.save(tmp_path / "old", {}, step=1, keep=1)
    refuse_foreign_folder(tmp_path / "old")
    refuse_foreign_folder(tmp_path / "none")
