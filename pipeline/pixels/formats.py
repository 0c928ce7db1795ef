"""Which files count as images: the one list of names, and the one look at first bytes; and what a manifest or card may
say of them."""

import re
from typing import Any

# Best first: where a sample has several images, the one whose extension stands earliest here is read.
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff"),
    *("ppm", "pgm", "pnm", "gif", "avif", "jp2"),
    *("apng", "mpo", "j2k", "dib", "pbm", "heic", "heif"),
)

Grey16 = tuple[int, int]  # the values of 16-bit grey that are black and white

_BITMAP_HEADERS = {size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_MAGIC = re.compile(
    rb"(?P<jpg>\xff\xd8\xff)"
    rb"|(?P<png>\x89PNG\r\n\x1a\n)"
    rb"|(?P<webp>RIFF.{4}WEBPVP8)"
    rb"|(?P<gif>GIF8[79]a)"
    rb"|(?P<tif>II\*\0|MM\0\*|II\0\*|MM\*\0|II\+\0|MM\0\+)"  # two of them written by mistake, and BigTIFF
    rb"|(?P<ppm>P[1-6f]\s)"
    rb"|(?P<jp2>\0\0\0\x0cjP  \r\n\x87\n)"
    rb"|(?P<j2k>\xff\x4f\xff\x51)",
    re.DOTALL,
)


def sniff(data: bytes | memoryview) -> str:
    """The extension that fits a file's first bytes, one of `EXTENSIONS`; "" when it does not begin as an image does."""
    head = bytes(data[:64])
    if match := _MAGIC.match(head):
        return str(match.lastgroup)
    if head[4:8] == b"ftyp":
        size = int.from_bytes(head[:4], "big")
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, 64), 4))}
        return "avif" if brands & {b"avif", b"avis"} else "heic" if brands & _HEIF_BRANDS else ""
    if head[:2] == b"BM" and head[14:18] in _BITMAP_HEADERS:
        return "bmp"
    return "dib" if head[:4] in _BITMAP_HEADERS else ""


def grey16_range(value: Any, where: str) -> Grey16 | None:
    """Black and white of 16-bit grey, as flag, manifest and card give them; None for none. ValueError that names
    `where` they stand."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(number) is not int for number in value):
        raise ValueError(f"{where} {str(value)[:40]}: it must be two whole numbers, black and white, such as 0 4095")
    low, high = value
    if not 0 <= low < high <= 65535:
        raise ValueError(f"{where} {low} {high}: from 0 to 65535, the first below the second")
    return low, high
