"""Is this an image, and of what kind? Every image is decoded before it is packed."""

import io
from typing import NamedTuple

from PIL import Image

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "DIB": "bmp",
    "TIFF": "tif",
    "GIF": "gif",
    "PPM": "ppm",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}
Image.init()  # registers every format, so that some of them can be asked for by name
FORMATS = tuple(EXTENSIONS.keys() & Image.OPEN.keys())  # MPO comes as JPEG, AVIF is not in every Pillow


class Rejected(Exception):
    """Why an image is left out: a category to count by, and what exactly was wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Checked(NamedTuple):
    data: bytes
    extension: str
    height: int
    width: int


def verify(data: bytes, *, max_pixels: int) -> Checked:
    """Decodes `data`; raises Rejected when it is not an image, is damaged, or has more than `max_pixels`."""
    if not data:
        raise Rejected("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Rejected("not an image", f"begins with {data[:16]!r}") from None
    except Exception as error:  # Pillow's plug-ins raise nearly anything on hostile files
        raise Rejected("does not decode", f"{type(error).__name__}: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("too many pixels", f"{width} x {height} > {max_pixels}")
    try:
        image.load()
    except Exception as error:
        raise Rejected("does not decode", f"{type(error).__name__}: {error}") from None
    return Checked(data, EXTENSIONS[str(image.format)], height, width)
