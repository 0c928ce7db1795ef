"""Which files are taken for images, and what is told of the others."""

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset  # noqa: F401 (with it comes torch, whose import starts a program: here, before any test runs)
from PIL import Image

from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's


def pack(src: Path, dest: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, int], str]:
    """Reasons of rejections, and what was printed."""
    capsys.readouterr()
    make_shards(str(src), str(dest), options=Options(), num_workers=1)
    reasons: dict[str, int] = json.loads((dest / "make_shards.json").read_text())["reasons"]
    return reasons, capsys.readouterr().out


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(np.stack([ramp[None].repeat(48, 0), ramp[:48, None].repeat(64, 1)] * 2, -1)[..., :3])


def test_formats_that_pillow_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    src.mkdir()
    other = picture().transpose(Image.Transpose.ROTATE_180)
    for name, format in (("a.j2k", "JPEG2000"), ("a.jp2", "JPEG2000"), ("a.dib", "DIB"), ("a.BMP", "BMP")):
        picture().save(src / name, format)
    picture().save(src / "a.apng", "PNG", save_all=True, append_images=[other])
    picture().save(src / "a.mpo", "MPO", save_all=True, append_images=[other])
    reasons, told = pack(src, tmp_path / "d", capsys)
    assert reasons == {} and "packed                 6" in told and "not images" not in told


def test_heic_without_its_extra_is_a_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    src = tmp_path / "src"
    src.mkdir()
    picture().save(src / "a.jpg")
    (src / "b.jpg").write_bytes((src / "a.jpg").read_bytes()[:300])
    (src / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(4) + b"mif1heic" + bytes(400))
    reasons, told = pack(src, tmp_path / "d", capsys)
    assert reasons == {"does not decode": 1, "no decoder installed": 1}
    assert "1  no decoder installed; the first: c.HEIC HEIC and HEIF take pillow-heif: pip install -e" in told
    assert "1  does not decode; the first: b.jpg " in told


def test_what_is_no_image_is_named_by_all_its_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    src.mkdir()
    picture().save(src / "a.jpg")
    kinds = ["cr2", "nef", "mp4", "mov", "psd", "svg", "pdf", "xmp", "dng", "db"]
    for kind in kinds:
        (src / f"x.{kind}").write_bytes(b"x")
    (src / "y.cr2").write_bytes(b"x")
    _, told = pack(src, tmp_path / "d", capsys)
    line = next(line for line in told.splitlines() if line.startswith("not images"))
    assert line.split()[2] == "11" and "(2 cr2, " in line and all(f"1 {kind}" in line for kind in kinds[1:])
    (src / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no images in .*: it holds 2 cr2, .*1 db"):
        make_shards(str(src), str(tmp_path / "x"), options=Options(), num_workers=1)


def test_the_file_that_libtiff_complains_about_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for name in ("good.tif", "odd.tif"):
        buffer = io.BytesIO()
        picture().convert("1").save(buffer, "TIFF", compression="group4")
        fax = bytearray(buffer.getvalue())
        if name == "odd.tif":
            start = struct.unpack_from("<I", fax, 4)[0]
            fax[12 if start > 40 else len(fax) - 6] ^= 255
        (src / name).write_bytes(fax)
    make_shards(str(src), str(tmp_path / "d"), options=Options(), num_workers=1)
    told, complaints = capfd.readouterr()
    assert "1  libtiff complained; the first: odd.tif: " in told and "libtiff" not in complaints
