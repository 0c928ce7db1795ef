"""make_shards: what comes out is what the contract says, the same bytes whatever the workers; options; errors."""

import fcntl
import gc
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageCms, ImageDraw

from pipeline import files, progress
from pipeline import make_shards as entry_point
from pipeline.command import command
from pipeline.make_shards import make_shards
from pipeline.packing import plan, workers
from pipeline.packing.collect import collect
from pipeline.packing.prepare import Options, Rejected, prepare
from pipeline.packing.summary import contact_sheet
from pipeline.pixels.formats import EXTENSIONS
from pipeline.sources.manifest import load_manifest

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def make(src: Path | str, dest: Path | str, *, options: Options | None = None, **more: Any) -> dict[str, Any]:
    make_shards(str(src), str(dest), options=options or Options(), **{"num_workers": 1, **more})
    return json.loads((Path(dest) / "make_shards.json").read_text())


def samples_of(dest: Path) -> list[dict[str, Any]]:
    return [sample for tar in sorted(dest.glob("*.tar")) for sample in samples_of_one(tar)]


def samples_of_one(tar: Path) -> list[dict[str, Any]]:
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    gc.collect(1)  # webdataset leaves the file to the garbage collector
    return samples


def digests(dest: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dest)): p.read_bytes() for p in sorted(dest.rglob("*")) if p.is_file()}


def image_of(sample: dict[str, Any]) -> bytes:
    return next(v for k, v in sample.items() if k in EXTENSIONS)


def test_every_image_once_with_its_label(image_folder: Path, shards_dir: Path) -> None:
    originals = {p.read_bytes(): p for p in image_folder.rglob("*.*")}
    samples = samples_of(shards_dir)
    assert Counter(image_of(s) for s in samples) == Counter(list(originals))
    for sample in samples:
        path = originals[image_of(sample)]
        assert sample["cls"] == path.parent.name[-1].encode()  # class_0 … class_2 in sorted order
        assert path.stem in sample["__key__"]
    manifest = load_manifest(shards_dir / "manifest.json")
    assert manifest.samples == 60 and [s.samples for s in manifest.shards] == [15] * 4
    assert manifest.classes == ("class_0", "class_1", "class_2")
    # A global shuffle: no shard is of one class.
    assert all(len({s["cls"] for s in samples[i : i + 15]}) == 3 for i in range(0, 60, 15))


def test_tar_is_plain_ustar(shards_dir: Path) -> None:
    with tarfile.open(shards_dir / "shard-000000.tar", "r:", format=tarfile.USTAR_FORMAT) as tar:
        for member in tar.getmembers():
            assert (member.mtime, member.uid, member.gid, member.mode, member.pax_headers) == (0, 0, 0, 0o644, {})
            assert member.offset_data - member.offset == 512  # no extended headers


def test_dali_reads_it_with_its_index(shards_dir: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=15, num_threads=1, device_id=None)
    def read(tar: str, index: str) -> Any:
        encoded, label = fn.readers.webdataset(paths=[tar], index_paths=[index], ext=["jpg;png", "cls"])
        return fn.decoders.image(encoded), label

    for tar in sorted(shards_dir.glob("*.tar")):
        pipe = read(str(tar), str(tar.with_suffix(".idx")))
        images, labels = pipe.run()
        expected = samples_of_one(tar)
        assert [bytes(np.array(label)) for label in labels] == [s["cls"] for s in expected]
        sizes = [Image.open(io.BytesIO(image_of(s))).size for s in expected]
        assert [np.array(image).shape[1::-1] for image in images] == sizes


@pytest.mark.slow
def test_same_bytes_whatever_the_workers(image_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "elsewhere")
    make(image_folder, tmp_path / "one", samples_per_shard=7, num_workers=1)
    make(copy, tmp_path / "three", samples_per_shard=7, num_workers=3)
    one, three = digests(tmp_path / "one"), digests(tmp_path / "three")
    del one["make_shards.json"], three["make_shards.json"]  # it names the source
    assert one == three
    make(image_folder, tmp_path / "seed", samples_per_shard=7, seed=1)
    assert digests(tmp_path / "seed")["shard-000000.tar"] != one["shard-000000.tar"]


def test_shards_are_cut_by_bytes(image_folder: Path, tmp_path: Path) -> None:
    make(image_folder, tmp_path / "d", shard_bytes=20_000)
    tars = [samples_of_one(tar) for tar in sorted((tmp_path / "d").glob("*.tar"))]
    used = [sum(len(image_of(s)) for s in samples) for samples in tars]
    assert len(tars) > 2 and max(used) <= 20_000
    assert all(u + len(image_of(after[0])) > 20_000 for u, after in zip(used, tars[1:]))


def test_cuts_equal_those_of_a_simple_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for seed in range(60):
        monkeypatch.setattr(plan, "AT_ONCE", int(generator.integers(1, 40)))
        count, full, limit = (int(generator.integers(1, high)) for high in (200, 30, 600))
        sizes = generator.integers(-1, 100, count)
        held = int(generator.integers(0, count))
        order = plan.image_numbers(0, count, count, None, seed)
        assert sorted(order) == list(range(count))
        expected = []
        for split, first, last in [("val", 0, held), ("train" if held else "", held, count)]:
            begin, used = first, 0
            for position in range(first, last):
                size = max(int(sizes[order[position]]), 0)
                if position > begin and (used + size > limit or position - begin >= full):
                    expected.append((split, begin, position))
                    begin, used = position, 0
                used += size
            expected += [(split, begin, last)] if begin < last else []
        made = plan.plan(sizes, None, seed, holdout=held, samples_per_shard=full, shard_bytes=limit)
        assert [(s.split, s.begin, s.end) for s in made] == expected


def test_held_out_split(image_folder: Path, tmp_path: Path) -> None:
    make(image_folder, tmp_path / "a", holdout=0.25)
    make(image_folder, tmp_path / "b", holdout=10)
    for dest, held in ((tmp_path / "a", 15), (tmp_path / "b", 10)):
        train, val = samples_of(dest / "train"), samples_of(dest / "val")
        assert (len(train), len(val)) == (60 - held, held)
        assert not {image_of(s) for s in train} & {image_of(s) for s in val}
        assert load_manifest(dest / "train/manifest.json").classes == load_manifest(dest / "val/manifest.json").classes
    with pytest.raises(ValueError, match="leaves nothing of 60"):
        make(image_folder, tmp_path / "c", holdout=60)
    with pytest.raises(ValueError, match=r"--holdout 0.001 of 60 images is less than one"):
        make(image_folder, tmp_path / "c", holdout=0.001)


def test_duplicates_are_left_out(image_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(image_folder, tmp_path / "source")
    shutil.copy(source / "class_0/image_000.jpg", source / "class_2/again.jpg")
    shutil.copy(source / "class_0/image_000.jpg", source / "class_0/zzz.jpg")
    (source / "class_1/bad.jpg").write_bytes(b"not an image")
    summary = make(source, tmp_path / "d", dedup=True)
    assert (summary["found"], summary["packed"], summary["rejected"], summary["duplicates"]) == (63, 60, 1, 2)
    lines = [json.loads(line) for line in (tmp_path / "d/duplicates.jsonl").read_text().splitlines()]
    assert lines == [{"name": n, "same_as": "class_0/image_000.jpg"} for n in ("class_0/zzz.jpg", "class_2/again.jpg")]
    assert len({image_of(s) for s in samples_of(tmp_path / "d")}) == 60


def test_troublesome_files_add_up(troublesome: list[Path], tmp_path: Path) -> None:
    summary = make(troublesome[0].parent.parent, tmp_path / "d")
    rejected = [json.loads(line) for line in (tmp_path / "d/rejected.jsonl").read_text().splitlines()]
    assert summary["found"] == summary["packed"] + summary["rejected"] == 82
    by_name = {Path(line["name"]).name: line["reason"] for line in rejected}
    assert by_name["empty.jpg"] == "empty file" and by_name["text.jpg"] == "not an image"
    assert by_name["sharp__giant-image.jpg"] == by_name["pillow__decompression_bomb.gif"] == "too many pixels"
    # Exactly those that Pillow, decoding all of them in full, decodes.
    Image.MAX_IMAGE_PIXELS, guard = None, Image.MAX_IMAGE_PIXELS
    try:
        for path in troublesome:
            if by_name.get(path.name) != "too many pixels":
                try:
                    Image.open(path).load()
                    decodes = True
                except Exception:
                    decodes = False
                assert decodes == (path.name not in by_name), path
    finally:
        Image.MAX_IMAGE_PIXELS = guard
    # A misnamed file gets the extension of what it is.
    names = [next(k for k in s if k in EXTENSIONS) for s in samples_of(tmp_path / "d")]
    assert {"jpg", "png", "gif", "webp", "bmp", "tif", "ppm"} <= set(names)


def test_cut_photographs_are_noticed(photos: list[Path]) -> None:
    """The fast decode (an eighth, grey) notices what the full one does."""
    generator = np.random.default_rng(0)
    for path in photos[:30]:
        data = path.read_bytes()
        assert prepare(data, path.name, Options()) == (data, "jpg")
        with pytest.raises(Rejected):
            prepare(data[: int(generator.integers(300, len(data) - 4))], path.name, Options())


def jpeg(image: Image.Image, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **more)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a.convert("RGB"), np.float32) - np.asarray(b.convert("RGB"), np.float32)).mean())


def test_shrinking_matches_pillow(photos: list[Path]) -> None:
    for path in photos[:20]:
        data = path.read_bytes()
        image = Image.open(path)
        image = image.convert("RGB")
        for side in (64, 160, 256):
            small, kind = prepare(data, path.name, Options(short_side=side, quality=95))
            if min(image.size) <= side:
                assert small == data  # never enlarged, never encoded again for nothing
                continue
            scale = side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            assert kind == "jpg" and opened(small).size == size and min(size) == side
            expected = image.resize(size, Image.Resampling.BICUBIC)
            # The same as Pillow's where all is decoded; where the DCT helps, the low-pass filter is its own.
            more = 0.2 if scale > 0.5 else 5.0
            assert distance(opened(small), expected) < distance(opened(jpeg(expected)), expected) + more


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [40, 100])  # by the DCT and resizing; by resizing alone
def test_shrunken_images_are_upright(orientation: int, side: int) -> None:
    coarse = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((240, 160), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(image, exif=exif)
    from PIL import ImageOps

    expected = ImageOps.exif_transpose(opened(data))
    small = opened(prepare(data, "a.jpg", Options(short_side=side))[0])
    assert small.getexif().get(0x0112, 1) == 1
    assert distance(small, expected.resize(small.size, Image.Resampling.BICUBIC)) < 4
    assert small.size == ((side, side * 3 // 2) if orientation > 4 else (side * 3 // 2, side))


@pytest.mark.parametrize(("short_side", "convert"), [(32, False), (0, True), (32, True)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_colour_profile_goes_along_and_changes_no_pixel(kind: str, short_side: int, convert: bool) -> None:
    """Training ignores profiles. Applied where an image was encoded again, they gave the same file two colours."""
    image = Image.new("RGB", (64, 64), (200, 60, 30))
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())

    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    at = swapped.index("sRGB".encode("utf-16-be"))
    swapped[at : at + 8] = "ABCD".encode("utf-16-be")
    for profile, kept in (
        (bytes(swapped), True),
        (b"no profile at all", False),
        (bytes(swapped) + bytes(20_000), False),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, icc_profile=profile)
        data = buffer.getvalue()
        packed = prepare(data, f"a.{kind.lower()}", Options(short_side=short_side, convert=convert))[0]
        assert (opened(packed).info.get("icc_profile") == profile) == (kept or packed == data)
        assert distance(opened(packed), Image.new("RGB", opened(packed).size, (200, 60, 30))) < 3


def test_a_profile_of_printing_inks_does_not_fit_rgb() -> None:
    data = jpeg(Image.new("CMYK", (64, 64), (0, 200, 200, 0)), icc_profile=b"of inks")
    assert "icc_profile" not in opened(prepare(data, "a.jpg", Options(short_side=32))[0]).info


def test_other_formats_are_kept_or_converted(troublesome: list[Path]) -> None:
    for path in troublesome:
        data = path.read_bytes()
        try:
            _, kind = prepare(data, path.name, Options(max_pixels=10_000_000))
        except Rejected:
            continue
        small, small_kind = prepare(data, path.name, Options(short_side=30, max_pixels=10_000_000))
        converted, converted_kind = prepare(data, path.name, Options(convert=True, max_pixels=10_000_000))
        sides = opened(data).size
        assert converted_kind == "jpg" and sorted(opened(converted).size) == sorted(sides)
        assert min(opened(small).size) == min(30, *sides), path
        assert small_kind == (kind if min(sides) <= 30 or kind in ("jpg", "png", "webp") else "png"), path
        assert opened(small).mode in ("L", "LA", "RGB", "RGBA") or small == data
        if kind == "jpg":
            assert converted == data


def test_size_limits(image_folder: Path, tmp_path: Path) -> None:
    side = [min(Image.open(p).size) for p in image_folder.rglob("*.*")]
    area = [int(np.prod(Image.open(p).size)) for p in image_folder.rglob("*.*")]
    options = Options(min_side=55, max_pixels=4000)
    expected = sum(s >= 55 and a <= 4000 for s, a in zip(side, area))
    summary = make(image_folder, tmp_path / "d", options=options)
    assert summary["packed"] == expected and summary["reasons"] == dict(
        Counter("too many pixels" if a > 4000 else "side too small" for s, a in zip(side, area) if s < 55 or a > 4000)
    )


def test_unverified_shards_hold_everything(troublesome: list[Path], tmp_path: Path) -> None:
    summary = make(troublesome[0].parent.parent, tmp_path / "d", options=Options(no_verify=True))
    assert summary["reasons"] == {"too many pixels": 3, "empty file": 1, "not an image": 1}
    originals = {p.read_bytes() for p in troublesome}
    assert {image_of(s) for s in samples_of(tmp_path / "d")} <= originals


def test_without_verification_headers_are_looked_at(image_folder: Path, tmp_path: Path) -> None:
    """Damage is let through; what is no image, or is of no use whatever follows the header, is not."""
    photo = next(image_folder.rglob("*.jpg")).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    (tmp_path / "in_header.jpg").write_bytes(photo[:20])
    frame = b"," + (60_000).to_bytes(2, "little") * 2
    bomb = b"GIF89a\1\0\1\0\0\0\0," + bytes(4) + frame[1:] + b"\0\2\2L\1\0;"
    (tmp_path / "bomb.gif").write_bytes(bomb)
    ramp = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(ramp).save(tmp_path / "float.tif")
    Image.fromarray((ramp * 1e6).astype(np.int32)).save(tmp_path / "int32.tif")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n")
    names = ["/etc/passwd", "/proc/self/environ", *(path.name for path in sorted(tmp_path.iterdir()))]
    (tmp_path / "list.txt").write_text("\n".join(names))
    summary = make(tmp_path / "list.txt", tmp_path / "d", options=Options(no_verify=True))
    assert summary["reasons"] == {"not an image": 3, "no black and white": 2, "too many pixels": 1}
    assert {image_of(s) for s in samples_of(tmp_path / "d")} == {photo[: len(photo) // 2], photo[:20]}


def test_a_finished_destination(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(image_folder, tmp_path / "source")
    make(source, tmp_path / "d", samples_per_shard=20)
    before = digests(tmp_path / "d")
    make(source, tmp_path / "d", samples_per_shard=20)
    assert "is complete" in capsys.readouterr().out and digests(tmp_path / "d") == before
    with pytest.raises(ValueError, match=r"samples_per_shard 20 there, 30 now.*--overwrite"):
        make(source, tmp_path / "d", samples_per_shard=30)
    (tmp_path / "d/shard-000001.tar").rename(tmp_path / "elsewhere.tar")
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing in .*--overwrite"):
        make(source, tmp_path / "d", samples_per_shard=20)
    (tmp_path / "elsewhere.tar").rename(tmp_path / "d/shard-000001.tar")
    with pytest.raises(ValueError, match=r"SRC and DEST are both .*: name another DEST"):
        make(source, f"{source}/")
    (source / "class_0/image_000.jpg").unlink()
    with pytest.raises(ValueError, match=r"60 images .* \(59 now\).*--overwrite"):
        make(source, tmp_path / "d", samples_per_shard=20)
    (tmp_path / "d/mine.txt").write_text("keep me")
    assert make(source, tmp_path / "d", samples_per_shard=30, overwrite=True)["packed"] == 59
    assert sorted(p.name for p in (tmp_path / "d").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert (tmp_path / "d/mine.txt").read_text() == "keep me"


def test_tars_of_others_are_not_touched(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/theirs.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="did not begin"):
            make(image_folder, tmp_path / "d", overwrite=overwrite)
    assert (tmp_path / "d/theirs.tar").read_bytes() == b"precious"


def test_contact_sheet(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image twice while there are others; captions are the classes' names, cut to their cell."""
    cells = []
    paste, text = Image.Image.paste, ImageDraw.ImageDraw.text
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "paste", lambda *a: cells.append(a[1].tobytes()) or paste(*a))
        names = []
        patch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: names.append((a[2], k["font"])) or text(*a, **k))
        tars = [(f"shard-{i:06d}.tar", 15) for i in range(4)]
        sheet = opened(contact_sheet(str(shards_dir), tars, ["c0", "très long nom d’une classe", "c2\n"], 0))
        assert sheet.size == (8 * 128, 6 * 144) and np.asarray(sheet).std() > 20
        assert len(set(cells)) == 48
        assert {name for name, _ in names} == {"c0", "très long nom d’une…", "c2"}
        assert max(font.getlength(name) for name, font in names) <= 124
        assert opened(contact_sheet(str(shards_dir), [("shard-000000.tar", 3)], [], 0)).size == (3 * 128, 144)


def run_file(*arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPOSITORY / "pipeline/make_shards.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.process
def test_as_a_file_from_elsewhere(image_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    result = run_file(image_folder, "out", "--samples_per_shard", 15, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/shard-000003.tar").read_bytes() == (shards_dir / "shard-000003.tar").read_bytes()
    assert "packed                60" in result.stdout and "\r" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "local://"])  # a folder; the same by way of fsspec, as any URL
def test_another_job_after_an_interruption(
    scheme: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "d"

    def make_some(count: int, **more: Any) -> None:
        def interrupted(work: Any, tasks: Any, **_: Any) -> None:
            for task in itertools.islice(tasks, count):
                work(task)
            raise OSError("interrupted")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="interrupted"):
            patch.setattr(workers, "run", interrupted)
            make_shards(str(image_folder), f"{scheme}{dest}", options=Options(), samples_per_shard=7, **more)

    make_some(3)
    (dest / ".make_shards/shard-000002.json").unlink()  # killed before it was written
    for name in ("shard-000004.tar", "contact_sheet.png"):
        (dest / f".{name}.123.tmp").write_bytes(b"a killed worker's")
    with pytest.raises(ValueError, match=r"was made otherwise \(seed 0 there, 1 now\): name another folder, or add"):
        make_some(1, seed=1)
    for number in range(2):
        (dest / f".make_shards/shard-00000{number}.json").unlink()
    make_some(1, holdout=0.5)  # nothing was done, so nothing is lost; and nothing is left
    assert [p.relative_to(dest) for p in dest.rglob("*.tar")] == [Path("val/shard-000000.tar")]
    remove, removed = files.remove, []

    def remove_one(place: str) -> None:
        if place.endswith(".tar"):
            if removed:
                raise OSError("interrupted")
            removed.append(place)
        remove(place)

    again: dict[str, Any] = {"options": Options(), "num_workers": 1}
    make_shards(str(image_folder), f"{scheme}{dest}", samples_per_shard=7, overwrite=True, **again)
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", remove_one)
        make_some(1, overwrite=True)
    make_shards(str(image_folder), f"{scheme}{dest}", samples_per_shard=20, **again)
    make(image_folder, tmp_path / "expected", samples_per_shard=20)
    made, expected = digests(dest), digests(tmp_path / "expected")
    if scheme:
        made = {name: content for name, content in made.items() if not name.endswith(".tmp")}
    assert made == expected


@pytest.mark.slow
def test_what_others_made_is_left_alone(image_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(shards_dir, tmp_path / "d/train")
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"d/train holds .*, which make_shards did not begin there"):
        make(image_folder, tmp_path / "d", holdout=0.1, overwrite=True)
    theirs = digests(tmp_path / "d/train")
    make(image_folder, tmp_path / "d")  # beside them, without a holdout
    make(image_folder, tmp_path / "d", samples_per_shard=7, overwrite=True)
    assert digests(tmp_path / "d/train") == theirs
    (tmp_path / "d/train/make_shards.json").unlink()  # by another program
    make(image_folder, tmp_path / "d", overwrite=True)
    assert digests(tmp_path / "d/train") == {n: c for n, c in theirs.items() if n != "make_shards.json"}
    with pytest.raises(ValueError, match=r"d/train holds .*, which make_shards did not begin there"):
        make(image_folder, tmp_path / "d", holdout=0.1, overwrite=True)
    assert digests(tmp_path / "d/train") == {n: c for n, c in theirs.items() if n != "make_shards.json"}
    shutil.rmtree(tmp_path / "d")
    shutil.copytree(shards_dir, tmp_path / "d/train")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text("my own")
    with pytest.raises(ValueError, match=r"mine holds manifest.json"):
        make(image_folder, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"DEST local:.* is a URL with .*: name another"):
        make(image_folder, f"local://{tmp_path}/d[12]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="leaves nothing"):
        make(image_folder, tmp_path / "empty", holdout=60)
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(tmp_path / "empty")  # it is still there
    assert digests(tmp_path) == before


def test_one_command_at_a_time(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d/.make_shards").mkdir(parents=True)
    (tmp_path / "d/.make_shards/listing.jsonl").write_text("the other's")
    folder = os.open(tmp_path / "d", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another make_shards is at work in"):
        make(image_folder, tmp_path / "d")
    assert (tmp_path / "d/.make_shards/listing.jsonl").read_text() == "the other's"
    os.close(folder)
    assert make(image_folder, tmp_path / "d")["packed"] == 60


def test_errors_of_file_systems_are_one_line(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoCredentialsError(Exception):  # botocore's is neither an OSError nor a ValueError
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(files, "names", refuse)
    monkeypatch.setattr(sys, "argv", ["make_shards", str(image_folder), "local:///nowhere/d"])
    with pytest.raises(SystemExit, match="2"):
        command(entry_point.main, resumes=True)
    error = capsys.readouterr().err
    assert error.startswith(
        "error: local:///nowhere/d: NoCredentialsError: Unable to locate credentials; check address"
    )


@pytest.mark.process
def test_progress_in_a_log_file(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line now and then, with a total and without; nothing at all of what takes less than that."""
    for name in ("FEW_SECONDS", "LINE_EVERY"):  # longer than workers take to start on a busy machine
        monkeypatch.setattr(progress, name, 600.0)
    make(image_folder, tmp_path / "quick")
    assert capsys.readouterr().err == ""

    def slowly(*arguments: Any, **more: Any) -> Any:
        for entry in collect(*arguments, **more):
            time.sleep(0.005)
            yield entry

    class Prompt(progress.Progress):  # packing so few may take less than a tenth of a second
        def __init__(self, *arguments: Any, **more: Any) -> None:
            progress.FEW_SECONDS = progress.LINE_EVERY = 1e-6
            super().__init__(*arguments, **more)

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            progress.FEW_SECONDS = 600.0  # nothing of what comes after it

    monkeypatch.setattr(entry_point, "collect", slowly)
    monkeypatch.setattr(workers, "Progress", Prompt)
    for name in ("FEW_SECONDS", "LINE_EVERY"):
        monkeypatch.setattr(progress, name, 0.1)
    make(image_folder, tmp_path / "slow", samples_per_shard=5)
    lines = capsys.readouterr().err.splitlines()
    listing = [line for line in lines if re.fullmatch(r"listing: \d+ images, \d+ a second", line)]
    assert len(listing) >= 2 and listing[-1].startswith("listing: 60 images")
    packing = [line for line in lines if re.fullmatch(r"packing: \d+ of 60 images(, .* a second, .*\d MB/s)?", line)]
    assert packing and len(listing) + len(packing) == len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("folder", ["--samples_per_shard", "0"], "at least 1"),
        ("folder", ["--quality", "101"], "from 1 to 100"),
        ("folder", ["--holdout", "-1"], "fraction below 1"),
        ("folder", ["--holdout", "1.5"], "fraction below 1, or a number of images"),
        ("folder", ["--workers", "-1"], "--workers -1: at least 0"),
        ("folder", ["--short_side", "-5"], "--short_side -5: at least 0"),
        ("folder", ["--max_pixels", "0"], "--max_pixels 0: at least 1"),
        ("folder", ["--labels", "nowhere.txt"], "nowhere.txt"),
        ("folder/nowhere", [], "no such folder or file: .*/nowhere"),
        ("empty", [], "no images in .*/empty: it holds 1 md"),
        ("empty/notes.md", [], "notes.md is none of what can be read: a folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    source: str,
    flags: list[str],
    message: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").symlink_to(image_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["make_shards", str(tmp_path / source), str(tmp_path / "d"), *flags])
    with pytest.raises(SystemExit, match="2"):
        command(entry_point.main, resumes=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(f"error: .*{message}", lines[0]), lines
    assert not list((tmp_path / "d").glob("*")) or source == "folder"
