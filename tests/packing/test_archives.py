"""Archives and folders as strangers name and write them: odd names, damaged and unusual tars."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset  # noqa: F401 (with it comes torch, whose import starts a program: here, before any test runs)
from PIL import Image

from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options
from pipeline.sources.opening import open_source

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (i, 99, 77)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, images: int = 20, sparse: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(images):
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = len(png(i))
            if info.name == sparse:
                info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": info.name}
            tar.addfile(info, io.BytesIO(png(i)))
    return path


def pack(src: Path | str, dest: Path, **more: Any) -> dict[str, Any]:
    make_shards(str(src), str(dest), options=Options(), num_workers=1, **more)
    summary: dict[str, Any] = json.loads((dest / "make_shards.json").read_text())
    return summary


@pytest.mark.parametrize(
    "name",
    ["[v2]", "{a,b}", "{1..3}", "star*", "what?", "ends.tar", "ends.yaml", "ends.txt", "ends.zip", "ends.tar.gz"],
)
def test_what_is_there_is_no_pattern(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder of images, of tars, as a tar, as a folder in a pattern, and as destination."""
    images, tars, plain = tmp_path / "images" / name, tmp_path / "tars" / name, tmp_path / "plain"
    images.mkdir(parents=True)
    plain.mkdir()
    for i in range(3):
        (images / f"{i}.png").write_bytes(png(i))
    write_tar(tars / "a.tar", 4)
    write_tar(plain / f"{name}.tar", 5)
    sources = {images: 3, images.parent: 3, tars: 4, tars / "a.tar": 4, f"{tars}/*.tar": 4, plain / f"{name}.tar": 5}
    for number, (src, count) in enumerate(sources.items()):
        dest = tmp_path / str(number) / name
        assert pack(src, dest)["packed"] == count, src
        capsys.readouterr()
        pack(src, dest)
        assert "is complete" in capsys.readouterr().out
        assert open_source(str(dest), progress=False).samples == count
    (tmp_path / f"{name}.txt").write_text(f"images/{name}/1.png\n")
    assert pack(tmp_path / f"{name}.txt", tmp_path / "list")["packed"] == 1


def test_all_damaged_tars_are_named_at_once(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for i in range(5):
        tar = write_tar(src / f"{i}.tar")
        if i % 2:
            tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"src/1\.tar is cut short.*; .*src/3\.tar is cut short"):
        pack(src, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_tars_without_an_end_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut between two members, a tar looks whole but for the mark of its end."""
    src = tmp_path / "src"
    for i in range(4):
        tar = write_tar(src / f"{i}.tar")
        if i > 1:
            tar.write_bytes(tar.read_bytes()[: 7 * 1024])  # a block of header and one of data each
    assert pack(src, tmp_path / "d")["packed"] == 2 * 20 + 2 * 7
    told = capsys.readouterr().out
    assert "2  tars without a mark of the end (cut short there, or the writer left it out); the first: " in told
    assert f"{src}/2.tar, {src}/3.tar" in told


def test_a_sparse_member_costs_that_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bytes in the tar are not those of the file."""
    summary = pack(write_tar(tmp_path / "a.tar", 6, sparse="0003.png"), tmp_path / "d")
    assert (summary["packed"], summary["ignored"]) == (5, {"sparse": 1})
    told = capsys.readouterr().out
    assert "1  members are sparse files" in told and "the first: 0003.png in" in told
