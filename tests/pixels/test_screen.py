"""Screening: what goes to DALI decodes like Pillow and has the size told; what cannot be decoded is named bad."""

import contextlib
import csv
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageOps

from pipeline.pixels.decode import MAX_PIXELS, BadImage, decode
from pipeline.pixels.screen import as_ppm, inspect


@pipeline_def(num_threads=1, device_id=None, prefetch_queue_depth=1)
def decoding() -> object:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


def dali_decode(encoded: list[np.ndarray]) -> list[np.ndarray]:
    pipeline = decoding(batch_size=len(encoded))
    pipeline.feed_input("encoded", encoded)
    (images,) = pipeline.run()
    return [np.array(images.at(i)) for i in range(len(encoded))]


def pillow_decode(content: bytes) -> np.ndarray:
    """The reference, without a look at what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I;16"):  # `convert` makes white of all above 255
        return np.repeat(np.asarray(image)[..., None] // 257, 3, axis=2).astype(np.uint8)
    return np.asarray(image.convert("RGB"))


def screen(encoded: np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int, int]:
    """What DALI is given for these bytes, and the image's height and width: as the reader does it."""
    size = inspect(encoded, max_pixels)
    return (encoded, *size) if size else as_ppm(decode(encoded, max_pixels))


def as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def picture(height: int = 40, width: int = 60, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (5, 5, 4 if mode in ("RGBA", "LA") else 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.slow
def test_troublesome_files(troublesome: list[Path]) -> None:
    """All of them: those that Pillow can decode come out of DALI with Pillow's pixels, the others are bad."""
    with (troublesome[0].parent.parent / "MANIFEST.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    verdicts = {row["file"]: row["Pillow open+convert('RGB')"] for row in rows}
    good: list[tuple[str, np.ndarray, np.ndarray]] = []
    bad = set()
    for path in troublesome:
        name = f"{path.parent.name}/{path.name}"
        content = path.read_bytes()
        try:
            encoded, height, width = screen(as_array(content))
        except BadImage as error:
            assert str(error)
            bad.add(name)
            continue
        reference = pillow_decode(content)
        assert (height, width) == reference.shape[:2], name
        good.append((name, encoded, reference))
    assert bad == {name for name, verdict in verdicts.items() if verdict != "ok"}
    for (name, _, reference), decoded in zip(good, dali_decode([encoded for _, encoded, _ in good])):
        assert decoded.shape == reference.shape, name
        assert np.abs(decoded.astype(int) - reference).mean() <= 2, name


VARIANTS: dict[str, bytes] = {
    "jpeg": encode(picture(), "JPEG"),
    "jpeg 4:4:4": encode(picture(), "JPEG", subsampling=0),
    "jpeg 4:2:2": encode(picture(), "JPEG", subsampling=1),
    "jpeg progressive": encode(picture(), "JPEG", progressive=True),
    "jpeg restart": encode(picture(), "JPEG", restart_marker_rows=1),
    "jpeg grey": encode(picture(mode="L"), "JPEG"),
    "jpeg cmyk": encode(picture(mode="CMYK"), "JPEG"),
    "jpeg rgb": encode(picture(), "JPEG", keep_rgb=True),
    "jpeg behind the end": encode(picture(), "JPEG") + b"\0" * 7,
    "png": encode(picture(), "PNG"),
    "png grey": encode(picture(mode="L"), "PNG"),
    "png grey alpha": encode(picture(mode="LA"), "PNG"),
    "png alpha": encode(picture(mode="RGBA"), "PNG"),
    "png palette": encode(picture(mode="P"), "PNG"),
    "png bilevel": encode(picture(mode="1"), "PNG"),
    "png 16 bit": encode(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    "png transparent colour": encode(picture(), "PNG", transparency=(1, 2, 3)),
    "webp": encode(picture(), "WEBP"),
    "webp lossless": encode(picture(), "WEBP", lossless=True),
    "webp alpha": encode(picture(mode="RGBA"), "WEBP"),
    "bmp": encode(picture(), "BMP"),
    "bmp palette": encode(picture(mode="P"), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "tiff lzw": encode(picture(), "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encode(picture(mode="CMYK"), "TIFF"),
    "gif": encode(picture(mode="P"), "GIF"),
    "gif animated": encode(picture(mode="P"), "GIF", save_all=True, append_images=[picture(mode="P").rotate(9)]),
    "ppm": encode(picture(), "PPM"),
    "pgm": encode(picture(mode="L"), "PPM"),
    "jpeg 2000": encode(picture(), "JPEG2000"),
}
# These must not take the slow way: they are what data sets are made of.
USUAL = ("jpeg", "jpeg 4:4:4", "jpeg 4:2:2", "jpeg progressive", "jpeg restart", "jpeg grey", "png", "png grey",
         "png alpha", "png palette", "webp", "webp lossless")  # fmt: skip


def test_formats_decode_like_pillow() -> None:
    screened = {name: screen(as_array(content)) for name, content in VARIANTS.items()}
    decoded = dali_decode([encoded for encoded, _, _ in screened.values()])
    for (name, (_, height, width)), pixels in zip(screened.items(), decoded):
        reference = pillow_decode(VARIANTS[name])
        assert pixels.shape == reference.shape == (height, width, 3), name
        assert np.abs(pixels.astype(int) - reference).mean() <= 2, name
    for name in USUAL:
        assert inspect(as_array(VARIANTS[name])) == (40, 60), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(), kind, exif=exif)
    encoded, height, width = screen(as_array(content))
    reference = pillow_decode(content)
    assert (height, width) == reference.shape[:2] == ((60, 40) if 5 <= orientation <= 8 else (40, 60))
    assert np.abs(dali_decode([encoded])[0].astype(int) - reference).mean() <= 2


def jpeg_with(segment: bytes, marker: int = 0xE1) -> bytes:
    content = encode(picture(), "JPEG")
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + content[2:]


def test_odd_exif_is_pillow_s_affair() -> None:
    """Where decoders may disagree about the orientation Pillow's opinion counts, pixels and size alike."""
    for order in "<>":
        mark = b"II*\0" if order == "<" else b"MM\0*"
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
        long_entry = struct.pack(order + "HHII", 0x0112, 4, 1, 6)
        plain = mark + struct.pack(order + "IH", 8, 1) + entry + bytes(4)
        variants = {
            "usual": plain,
            "long": mark + struct.pack(order + "IH", 8, 1) + long_entry + bytes(4),
            "cut": mark + struct.pack(order + "IH", 8, 9) + entry,
            "far": mark + struct.pack(order + "IH", 80_000, 1) + entry,
            "empty": b"",
            "bigtiff": mark[:2] + b"+\0" + plain[4:],
        }
        for name, tiff in variants.items():
            content = jpeg_with(b"Exif\0\0" + tiff)
            encoded, height, width = screen(as_array(content))
            reference = pillow_decode(content)
            assert (height, width) == reference.shape[:2], (name, order)
            assert np.abs(dali_decode([encoded])[0].astype(int) - reference).mean() <= 2, (name, order)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    assert screen(as_array(jpeg_with(xmp)))[1:] == pillow_decode(jpeg_with(xmp)).shape[:2]


def test_cut_anywhere_a_file_is_bad_or_decodes_like_pillow() -> None:
    """No length of a file makes the header walk fail, and no cut JPEG, PNG or WebP passes as whole."""
    for name in ("jpeg", "jpeg progressive", "png", "png palette", "webp", "webp lossless"):
        content = VARIANTS[name]
        assert inspect(as_array(content)) is not None
        for length in range(0, len(content), 7):
            with contextlib.suppress(BadImage):
                assert inspect(as_array(content[:length])) is None, (name, length)


def test_random_damage_never_escapes() -> None:
    """Whatever bytes come, the answer is a picture with a size or BadImage, no other exception."""
    rng = np.random.default_rng(0)
    for content in VARIANTS.values():
        for _ in range(12):
            damaged = np.frombuffer(content, np.uint8).copy()
            at = rng.integers(0, min(len(damaged), 700), 4)
            damaged[at] = rng.integers(0, 256, 4)
            try:
                encoded, height, width = screen(damaged, max_pixels=1 << 20)
            except BadImage:
                continue
            assert 0 < height * width <= 1 << 20 and encoded.dtype == np.uint8


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_cost_nothing() -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(BadImage, match="50000x50000 is 2,500,000,000 pixels, the limit is 100,000,000"):
        screen(as_array(png + png_chunk(b"IEND", b"")))
    jpeg = bytearray(VARIANTS["jpeg"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(BadImage, match="400,000,000 pixels"):
        screen(as_array(bytes(jpeg)))
    for name in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        with pytest.raises(BadImage, match="60x40 is 2,400 pixels, the limit is 2,399"):
            screen(as_array(VARIANTS[name]), max_pixels=2399)
    assert MAX_PIXELS == 100_000_000


def test_programs_are_not_images() -> None:
    """PostScript is run by whoever opens it."""
    for kind in ("EPS", "PDF"):
        with pytest.raises(BadImage, match="not an image: begins with"):
            screen(as_array(encode(picture(), kind)))


def test_damaged_png_is_bad() -> None:
    png = bytearray(VARIANTS["png"])
    png[png.index(b"IDAT") + 30] ^= 1
    with pytest.raises(BadImage, match=r"IDAT at byte .* does not match its CRC"):
        screen(as_array(bytes(png)))


def test_ppm_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    encoded, height, width = as_ppm(pixels)
    assert (height, width) == (3, 5)
    assert np.array_equal(dali_decode([encoded])[0], pixels)
    assert np.array_equal(decode(encoded), pixels)


def test_pillow_s_warnings_stay_inside(recwarn: pytest.WarningsRecorder) -> None:
    palette = picture(mode="P")
    assert screen(as_array(encode(palette, "PNG", transparency=b"\0" * 200)))[1:] == (40, 60)
    assert not recwarn
