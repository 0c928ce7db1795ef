"""What is written appears whole, whoever else writes there."""

import os
from pathlib import Path

import pytest

from pipeline import files


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers on two machines that share a folder, two processes often have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "shard-000000.idx"
    with files.writing_beside(path) as one:
        one.write(b"one" * 1000)
        with files.writing_beside(path) as two:
            two.write(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one" * 1000
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_other_temporary_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / f".a.txt.{os.getpid()}.tmp").write_text("mine")
    files.write_atomically(tmp_path / "a.txt", b"new")
    assert (tmp_path / f".a.txt.{os.getpid()}.tmp").read_text() == "mine"


def test_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
