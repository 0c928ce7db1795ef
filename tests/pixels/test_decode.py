"""The one policy of decoding: the right pixels, the right refusals, without memory, without starting a program."""

import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import awkward_images
import numpy as np
import pytest
from awkward_images import bombs, encode, known_images, not_images, quadrants, without_black_and_white
from PIL import Image

from pipeline.packing.prepare import Options, Rejected, prepare
from pipeline.pixels import decode as policy
from pipeline.pixels import libtiff
from pipeline.pixels.decode import BadImage, decode, picture
from pipeline.pixels.formats import EXTENSIONS, sniff
from pipeline.pixels.screen import inspect, verify

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KNOWN = known_images()


def as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def reason(content: bytes) -> str:
    """Why it is refused, "" when it is not; the same whether it is decoded or verified."""
    try:
        decode(as_array(content))
        decoded = ""
    except BadImage as error:
        decoded = error.reason
    try:
        verify(as_array(content))
        verified = ""
    except BadImage as error:
        verified = error.reason
    assert decoded == verified
    return decoded


@pytest.mark.parametrize("name", KNOWN)
def test_the_right_pixels(name: str) -> None:
    content, shown = KNOWN[name]
    pixels = decode(as_array(content))
    assert pixels.shape == shown.shape
    assert np.abs(pixels.astype(int) - shown).mean() < (2 if name.endswith(("jpg", "mpo", "jp2", "j2k")) else 0.5)
    assert inspect(as_array(content)) in (None, shown.shape[:2])


def test_first_bytes_say_what_a_file_is() -> None:
    for name, (content, _) in KNOWN.items():
        extension = name.rpartition(".")[2]
        assert sniff(content) == {"mpo": "jpg", "apng": "png", "pgm": "ppm"}.get(extension, extension), name
        assert extension in EXTENSIONS
    for name, content in not_images().items():
        assert sniff(content) == "", name
    for name, content in bombs().items():
        assert sniff(content) == name.rpartition(".")[2], name


def test_numbers_without_black_and_white_are_refused() -> None:
    for name, content in without_black_and_white().items():
        assert reason(content) == "no black and white", name
        for options in (Options(), Options(short_side=30), Options(convert=True), Options(no_verify=True, min_side=1)):
            with pytest.raises(Rejected) as caught:
                prepare(content, name, options)
            assert caught.value.reason == "no black and white" and "8 or 16 bits first" in caught.value.detail


def test_more_than_three_bands_are_refused() -> None:
    """Nothing says which three are to be seen: before, Pillow showed the first three of some, and refused others by an
    error of its own."""
    for name, content in awkward_images.too_many_bands().items():
        assert reason(content) == "more than three bands", name
        for options in (Options(), Options(short_side=30), Options(convert=True), Options(no_verify=True)):
            with pytest.raises(Rejected, match="bands") as caught:
                prepare(content, name, options)
            assert "write the three that are to be seen" in caught.value.detail


def test_a_given_range_of_grey_is_black_to_white() -> None:
    """Below it black, above it white; the high byte without one. 8 bits are left alone."""
    ramp = np.linspace(0, 255, 120)
    for name, content in awkward_images.dark_scans().items():
        found = decode(as_array(content), grey16=(0, 4095), remark=lambda *said: pytest.fail(str(said)))
        assert np.abs(found - ramp[None, :, None]).max() <= 1, name
        assert (decode(as_array(content), grey16=(1024, 3071))[0, [0, 29, 90, 119], 0] == [0, 0, 255, 255]).all()
    twelve = awkward_images.sixteen_bits()["grey12.tif"]
    assert (decode(as_array(twelve), grey16=(0, 4095)) == decode(as_array(twelve))).all()
    inverted = awkward_images.sixteen_bits()["grey16_white_is_zero.tif"]
    assert np.abs(decode(as_array(inverted), grey16=(0, 65535)) - ramp[None, :, None]).max() <= 1
    plain = encode(quadrants(), "PNG")
    assert (decode(as_array(plain), grey16=(0, 100)) == np.asarray(quadrants())).all()


def test_dark_scans_are_told_of() -> None:
    said: list[tuple[str, str]] = []

    def note(kind: str, detail: str) -> None:
        said.append((kind, detail))

    for name, content in awkward_images.dark_scans().items():
        said.clear()
        for options in (Options(), Options(short_side=30), Options(convert=True)):
            prepare(content, name, options, note)
        verify(as_array(content), remark=note)
        decode(as_array(content), remark=note)
        assert len(said) == 5 and {kind for kind, _ in said} == {"dark 16-bit grey"}
        assert "4,095 of 65,535" in said[0][1]
    for content in awkward_images.sixteen_bits().values():
        decode(as_array(content), remark=lambda kind, detail: pytest.fail(f"{kind}: {detail}"))


def test_not_images_are_refused_everywhere() -> None:
    for name, content in not_images().items():
        assert reason(content) == "not an image", name
        for options in (Options(), Options(no_verify=True), Options(short_side=30), Options(convert=True)):
            with pytest.raises(Rejected) as caught:
                prepare(content, name, options)
            assert caught.value.reason == "not an image", name


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
def test_a_png_with_a_wrong_checksum_is_refused_everywhere(kind: bytes) -> None:
    """DALI refuses it, and costs the whole batch; Pillow itself looks at some of them only."""
    content = bytearray(encode(quadrants().quantize(8), "PNG"))
    at = content.index(kind)
    content[at + 4 + int.from_bytes(content[at - 4 : at], "big")] ^= 1
    for look in (inspect, decode, verify, picture):
        with pytest.raises(BadImage, match=f"does not decode: PNG chunk {kind.decode()} at byte {at - 4:,}"):
            look(as_array(bytes(content)))
    for options in (Options(), Options(short_side=30), Options(convert=True)):
        with pytest.raises(Rejected, match=f"PNG chunk {kind.decode()}"):
            prepare(bytes(content), "a.png", options)


BOMBS_SCRIPT = """
import resource, sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from awkward_images import bombs
from pipeline.packing.prepare import Options, Rejected, prepare
from pipeline.pixels.decode import BadImage, decode, picture
from pipeline.pixels.screen import inspect, verify

files = bombs()
size = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
for name, content in files.items():
    encoded = np.frombuffer(content, np.uint8)
    ways = [lambda: decode(encoded), lambda: verify(encoded), lambda: picture(encoded, least_side=8)]
    for options in (Options(), Options(convert=True), Options(short_side=4), Options(no_verify=True, min_side=1)):
        ways.append(lambda options=options: prepare(content, name, options))
    for number, way in enumerate(ways):
        started = time.perf_counter()
        try:
            way()
            print(name, number, "accepted")
        except (BadImage, Rejected) as error:
            if error.reason != "too many pixels":
                print(name, number, error.reason, error.detail)
        if time.perf_counter() - started > 0.1:
            print(name, number, "took", time.perf_counter() - started)
print("end")
"""


@pytest.mark.process
def test_bombs_are_refused_in_milliseconds_without_memory() -> None:
    """64 MiB more than the process has are refused to it; each bomb asks for 0.4 GB at least."""
    command = [sys.executable, "-c", BOMBS_SCRIPT, str(Path(__file__).parent)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.stdout == "end\n", result.stdout + result.stderr


def scanned(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose last scan comes so many times more."""
    content = encode(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scans * last + content[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_takes_minutes() -> None:
    content = scanned(2000, 600)  # 60 kB; decoded it took two seconds, and as much in each epoch
    began = time.process_time()
    assert reason(content) == "too many scans"
    for ending in (content, content + b"\0"):  # the second is Pillow's case in training, too
        with pytest.raises(BadImage, match="606 of 2000x2000 pixels"):
            inspect(as_array(ending)) or decode(as_array(ending))
    with pytest.raises(Rejected):
        prepare(content, "scans.jpg", Options(no_verify=True))
    assert time.process_time() - began < 0.5
    for usual in (scanned(64, 300), scanned(2000, 50)):
        assert inspect(as_array(usual)) is not None and reason(usual) == ""


def test_the_limit_is_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limit is below ours, and users may ask for more than both."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for content, shown in KNOWN.values():
        area = shown.shape[0] * shown.shape[1]
        assert decode(as_array(content), area).shape == shown.shape
        with pytest.raises(BadImage, match=f"is {area:,} pixels, the limit is {area - 1:,}"):
            decode(as_array(content), area - 1)


@pytest.mark.process
def test_no_file_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "started"
    programs = tmp_path / "programs"
    programs.mkdir()
    # Pillow asks Ghostscript for its version first, and goes on only when it gets an answer.
    script = f'#!/bin/sh\n[ "$1" = --version ] && exit 0\ntouch {marker}\nexit 1\n'
    for program in ("gs", "djpeg", "cjpeg", "wmf2gif", "pdftoppm"):
        (programs / program).write_text(script)
        (programs / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    trapped = pytest.raises(subprocess.CalledProcessError)  # the trap works
    with trapped, Image.open(io.BytesIO(awkward_images.POSTSCRIPT)) as image:
        image.load()
    assert marker.exists()
    marker.unlink()
    for name in ("a.jpg", "a.png", "a.eps", "a.ps", "a.tif"):
        for options in (Options(), Options(no_verify=True), Options(short_side=8), Options(convert=True)):
            with pytest.raises(Rejected, match="not an image"):
                prepare(awkward_images.POSTSCRIPT, name, options)
    for look in (decode, verify, picture):
        with pytest.raises(BadImage, match="not an image"):
            look(as_array(awkward_images.POSTSCRIPT))
    assert not marker.exists()


def test_pillow_s_libtiff_is_told_from_that_of_dali() -> None:
    maps = """7f01-7f02 r-xp 00000000 fe:00 1 /site-packages/nvidia/nvimgcodec/extensions/libtiff_ext.so.0.9.0
7f03-7f04 r--p 00000000 fe:00 2 /site-packages/pillow.libs/libtiff-20b7e810.so.6.3.0
7f05-7f06 r-xp 00000000 fe:00 3 /usr/lib/x86_64-linux-gnu/libtiff.so.6
7f07-7f08 rw-p 00000000 00:00 0
"""
    assert libtiff.libraries(maps) == [
        "/site-packages/pillow.libs/libtiff-20b7e810.so.6.3.0",
        "/usr/lib/x86_64-linux-gnu/libtiff.so.6",
    ]


def test_libtiff_s_lines_are_kept_with_their_file(capfd: pytest.CaptureFixture[str]) -> None:
    damaged = bytearray(encode(quadrants(), "TIFF", compression="tiff_adobe_deflate"))
    damaged[30] ^= 255
    with pytest.raises(BadImage, match=r"libtiff: .*incorrect|libtiff: .*invalid|libtiff: .*ZIPDecode"):
        decode(as_array(bytes(damaged)))
    fax = bytearray(encode(quadrants().convert("1"), "TIFF", compression="group4"))
    start = struct.unpack_from("<I", fax, 4)[0]
    fax[12 if start > 40 else len(fax) - 6] ^= 255
    said: list[tuple[str, str]] = []
    decode(as_array(bytes(fax)), remark=lambda kind, detail: said.append((kind, detail)))
    assert [kind for kind, _ in said] == ["libtiff complained"] and "at line" in said[0][1]
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""
    with libtiff.complaints() as lines:
        pass
    with pytest.raises(OSError), Image.open(io.BytesIO(bytes(damaged))) as image:  # somebody else's: as it was
        image.load()
    assert lines == [] and "ZIPDecode" in capfd.readouterr().err


def test_heif_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1"):
        with pytest.raises(BadImage, match=r"pip install -e '\.\[heif\]'"):
            decode(as_array(b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + b"heic" + bytes(400)))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heif(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    pillow_heif.from_pillow(quadrants()).save(file, quality=95, exif=exif.tobytes())
    pixels = decode(as_array(file.getvalue()))
    turn = awkward_images.UNDO.get(orientation)
    shown = np.asarray(quadrants() if turn is None else quadrants().transpose(Image.Transpose(turn)))
    assert pixels.shape == shown.shape and np.abs(pixels.astype(int) - shown).mean() < 4
    shrunk, kind = prepare(file.getvalue(), "a.heic", Options(short_side=30, convert=True))
    assert kind == "jpg" and min(picture(as_array(shrunk)).size) == 30
    with pytest.raises(BadImage, match="too many pixels"):
        decode(as_array(file.getvalue()), 100)


def test_mutated_headers_cost_neither_memory_nor_time() -> None:
    """Sizes, tags and counts of valid files replaced: BadImage or pixels within the limit, nothing else."""
    rng = np.random.default_rng(0)
    limit = 1 << 20
    values = [0, 1, 255, 65_535, 100_000, (1 << 24) - 1, (1 << 31) - 1, (1 << 32) - 1]
    files = [
        content for name, (content, _) in KNOWN.items() if not name.startswith(("turned_3", "turned_5", "turned_7"))
    ]
    started = time.monotonic()
    for content in files:
        for _ in range(20):
            data = bytearray(content)
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(0, min(len(data), 300) - 4))
                data[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), values[rng.integers(len(values))])
            try:
                height, width, _ = decode(as_array(bytes(data)), limit).shape
            except BadImage:
                continue
            assert height * width <= limit
    assert time.monotonic() - started < 60


def test_every_format_has_a_decoder() -> None:
    """Every extension that `sniff` says has a decoder."""
    kinds = {"jpg", "png", "webp", "gif", "bmp", "dib", "tif", "ppm", "jp2", "j2k"}
    assert set(policy.DECODERS) == kinds
    assert kinds | {"avif", "heic"} <= set(EXTENSIONS)


def test_class_maps_are_the_numbers_of_palette_or_grey() -> None:
    """VOC's are pictures with a palette, Cityscapes' are grey; another kind of picture is no class map."""
    numbers = np.array([[0, 1, 2], [15, 20, 255]], np.uint8)
    grey = Image.fromarray(numbers)
    coloured = grey.copy()
    coloured.putpalette(bytes(range(255, -1, -1)) * 3)
    assert coloured.mode == "P"
    for image in (grey, coloured):
        assert np.array_equal(policy.class_map(as_array(encode(image, "PNG"))), numbers)
    for other, said in [(Image.new("RGB", (3, 2)), "its pixels are RGB"), (Image.new("I;16", (3, 2)), "I;16")]:
        with pytest.raises(BadImage, match=f"no class map: .*{said}"):
            policy.class_map(as_array(encode(other, "PNG")))
    with pytest.raises(BadImage, match="not an image"):
        policy.class_map(as_array(b"no picture"))
