"""How large is this image, and will DALI decode it as Pillow would? Asked of the bytes before DALI sees them.

A decode error inside DALI costs the whole batch and can kill the process, so nothing unscreened reaches it:

1. The usual file (JPEG of one or three components, 8-bit PNG, plain WebP) is told from its markers alone, in a few
   microseconds, and goes to DALI as it is.
2. Whatever is unusual is decoded by `decode`, which is the judge of it: what that refuses is bad, the rest goes to DALI
   as a PPM file of its pixels: 16-bit, CMYK, GIF, animations, odd JPEGs, damaged ends.
"""

import re
import struct

import numpy as np

from pipeline.pixels import headers
from pipeline.pixels.decode import (
    MAX_PIXELS,
    BadImage,
    Remark,
    check_decodes,
    check_pixels,
    check_scans,
    ignore,
    open_image,
    png_chunks,
)

# In a PNG: EXIF as text, an orientation in XMP, anything compressed.
_TELLING = re.compile(rb"\A....(zTXt|iTXt[^\0]*\0[^\0]|tEXtexif\0|tEXtRaw profile)|tiff:", re.DOTALL)
_MARKER = struct.Struct(">HH").unpack_from  # and the length behind it
_FRAME = struct.Struct(">BHHB").unpack_from
_TABLES = frozenset((0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE))  # and comments: nothing in them matters here
_SAMPLINGS = frozenset((0x11, 0x12, 0x21, 0x22))
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*(\d)")


def inspect(encoded: np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """(height, width) after orientation if DALI decodes these bytes like Pillow; None if Pillow has to look at them.

    BadImage when they are certainly bad.
    """
    data = memoryview(encoded.data)
    if len(data) == 0:
        raise BadImage("empty file")
    try:
        if data[0] == 0xFF and data[1] == 0xD8:
            size = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            size = _png(data, max_pixels)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = _webp(data)
        else:
            return None
    except (IndexError, struct.error):
        return None  # cut short somewhere in its headers
    if size is not None:
        check_pixels(size[1], size[0], max_pixels)
        if size[0] < 1 or size[1] < 1:
            return None
    return size


def verify(encoded: np.ndarray, max_pixels: int = MAX_PIXELS, remark: Remark = ignore) -> None:
    """BadImage where training would leave the image out."""
    usual = inspect(encoded, max_pixels) is not None
    check_decodes(open_image(encoded, max_pixels), usual=usual, remark=remark)


def as_ppm(pixels: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A binary PPM file of pixels [H, W, 3] as uint8 [n], and H and W. Decoding it is a copy."""
    height, width, _ = pixels.shape
    header = b"P6\n%d %d\n255\n" % (width, height)
    encoded = np.empty(len(header) + pixels.size, np.uint8)
    encoded[: len(header)] = np.frombuffer(header, np.uint8)
    encoded[len(header) :] = pixels.reshape(-1)
    return encoded, height, width


def _jpeg(data: memoryview) -> tuple[int, int] | None:
    """Walks the markers from SOI to the first scan."""
    if data[-2] != 0xFF or data[-1] != 0xD9:
        return None  # cut short, or something behind the end of image
    position, height, width, orientation, exif, adobe, jfif = 2, 0, 0, 0, False, -1, False
    components, progressive = b"", False
    while True:
        marker, length = _MARKER(data, position)
        begin, end = position + 4, position + 2 + length
        if marker in _TABLES and length >= 2 and end <= len(data):
            position = end
            continue
        if marker == 0xFFFF:  # fill byte
            position += 1
            continue
        if marker < 0xFF00 or length < 2 or end > len(data):
            return None
        if marker == 0xFFDA:
            break
        if marker in (0xFFC0, 0xFFC1, 0xFFC2):
            depth, rows, columns, count = _FRAME(data, begin)
            if height or depth != 8 or length < 8 + 3 * count or count not in (1, 3):
                return None
            height, width, progressive = rows, columns, marker == 0xFFC2
            frame = bytes(data[begin + 6 : begin + 6 + 3 * count])
            components = frame[::3]
            if not _SAMPLINGS.issuperset(frame[1::3]):
                return None  # CMYK; subsampling that decoders disagree about
        elif marker == 0xFFE1:
            if data[begin : begin + 6] == b"Exif\0\0":
                if exif or height:
                    return None
                exif, orientation = True, _exif_orientation(bytes(data[begin + 6 : end]))
            else:
                match = _XMP_ORIENTATION.search(data[begin:end])
                if match and match[1] != b"1":  # Pillow obeys it, DALI does not
                    return None
        elif marker == 0xFFEE and data[begin : begin + 5] == b"Adobe":
            adobe = data[begin + 11] if end >= begin + 12 else -2
        elif marker == 0xFFE0 and data[begin : begin + 4] == b"JFIF":
            jfif = True
        elif not 0xFFE0 <= marker <= 0xFFEF:
            return None  # lossless, arithmetic, hierarchical, or not a marker that belongs here
        position = end
    if not 0 <= orientation <= 8 or not height:
        return None
    if len(components) == 3 and (adobe in (0, -2) or (adobe == -1 and not jfif and components == b"RGB")):
        return None  # RGB inside
    if progressive or data[begin] < len(components):  # else the first scan is the only one that is decoded
        check_scans(data, width, height)
    return (width, height) if orientation >= 5 else (height, width)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in IFD 0, 0 when there is none, -1 when the block is odd."""
    if len(tiff) < 8 or tiff[:4] not in (b"II*\0", b"MM\0*"):
        return -1
    order = "<" if tiff[:1] == b"I" else ">"
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    if offset + 2 > len(tiff):
        return -1
    (count,) = struct.unpack_from(order + "H", tiff, offset)
    if offset + 2 + 12 * count > len(tiff):
        return -1
    for at in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == 0x0112:
            return value if kind == 3 and values == 1 else -1
    return 0


def _png(data: memoryview, max_pixels: int) -> tuple[int, int] | None:
    """Walks the chunks to IEND and checks their CRCs."""
    if data[12:16] != b"IHDR":
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    check_pixels(width, height, max_pixels)
    plain, last, reach = depth == 8 and colour in (0, 2, 3, 4, 6) and not interlace, b"", 8
    for kind, begin, end, intact in png_chunks(data):
        if not intact or kind in (b"acTL", b"eXIf", b"tRNS"):
            plain = False
        elif kind in (b"iTXt", b"tEXt", b"zTXt") and (end - begin > 4096 or _TELLING.search(data[begin - 8 : end])):
            plain = False  # may hold an orientation, or more text than Pillow takes
        last, reach = kind, end + 4
    return (height, width) if plain and last == b"IEND" and reach == len(data) else None


def _webp(data: memoryview) -> tuple[int, int] | None:
    """The simple file formats, lossy and lossless; alpha, animations and metadata (VP8X) are Pillow's."""
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 != len(data) or data[12:16] == b"VP8X":
        return None
    width, height = headers.webp_size(data)
    return height, width
