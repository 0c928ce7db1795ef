"""Is this an image, and fit for packing? Every image is decoded; with `short_side` or `convert` it is encoded again.

What Pillow decodes is accepted: the loader decodes the same way where DALI could not.
"""

import functools
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image, ImageCms

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
FORMATS = tuple(name for name in EXTENSIONS if name in Image.OPEN)  # MPO comes as JPEG, AVIF is not in every Pillow
KEPT = ("png", "webp")  # formats that a shrunken image is written in again unless `convert`; the others become PNG
ORIENTATION = 0x0112
TURNS = {  # EXIF orientation -> the operation that sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)


class Rejected(Exception):
    """Why an image is left out: a category to count by, and what exactly was wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Options:
    """What is done to an image, and which are left out. Sides in pixels."""

    no_verify: bool = False
    max_pixels: int = 100_000_000
    min_side: int = 0
    short_side: int = 0  # larger images are shrunk to it; 0: none
    quality: int = 90  # of JPEG and WebP that are written anew
    convert: bool = False  # other formats to JPEG


def prepare(data: bytes, name: str, options: Options) -> tuple[bytes, str]:
    """The bytes to pack and their extension: `data` itself unless it is to be shrunk or converted.

    Raises Rejected when it is not an image, is damaged, too large or too small. An image that has to be encoded again
    comes out upright, in sRGB, without metadata.
    """
    if not data:
        raise Rejected("empty file")
    if options.no_verify and not (options.min_side or options.short_side or options.convert):
        return data, sniff(data) or name.rpartition(".")[2].lower()
    image = _open(data)
    extension = EXTENSIONS[str(image.format)]
    width, height = image.size
    if width * height > options.max_pixels:
        raise Rejected("too many pixels", f"{width} x {height} > {options.max_pixels}")
    if min(width, height) < options.min_side:
        raise Rejected("side too small", f"{width} x {height} < {options.min_side}")
    shrink = 0 < options.short_side < min(width, height)
    try:
        if shrink or (options.convert and extension != "jpg"):
            return _encode_again(data, image, extension, options)
        if not options.no_verify:
            if extension == "jpg":
                # An eighth of the size, grey: all of the entropy coding is decoded, which is where damage shows; most
                # of the arithmetic, which cannot fail, is not done.
                image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError, KeyError, IndexError, ArithmeticError) as error:
        raise Rejected("does not decode", f"{type(error).__name__}: {error}") from None
    return data, extension


def sniff(data: bytes) -> str:
    """The extension by the first bytes, "" when they are not known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] == b"ftypavif":
        return "avif"
    return next((extension for magic, extension in MAGIC if data.startswith(magic)), "")


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if sniff(data):
            raise Rejected("does not decode", "a form of its format that libjpeg, libpng, … do not read") from None
        raise Rejected("not an image", f"begins with {data[:16]!r}") from None
    except Exception as error:  # Pillow's plug-ins raise nearly anything on hostile files
        raise Rejected("does not decode", f"{type(error).__name__}: {error}") from None


def _encode_again(data: bytes, image: Image.Image, extension: str, options: Options) -> tuple[bytes, str]:
    width, height = image.size
    scale = min(options.short_side / min(width, height), 1.0) if options.short_side else 1.0
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    kind = "jpg" if options.convert or extension == "jpg" else extension if extension in KEPT else "png"
    with warnings.catch_warnings(action="ignore"):  # damaged metadata are no reason to lose the image
        orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info or extension != "jpg" else 1
    profile = _profile(image.info.get("icc_profile"), image.mode)

    small = _shrink_jpeg(data, image, size) if extension == "jpg" and image.mode == "RGB" else None
    if small is not None and profile is None and orientation not in TURNS:
        return bytes(simplejpeg.encode_jpeg(small, quality=options.quality, colorsubsampling="420")), "jpg"
    if small is not None:
        image = Image.fromarray(small)
    else:
        image = _plain_mode(image)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    if profile is not None:
        image = ImageCms.applyTransform(image, profile) or image
    if kind == "jpg" and image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return _save(image, kind, options.quality), kind


def _shrink_jpeg(data: bytes, image: Image.Image, size: tuple[int, int]) -> np.ndarray | None:
    """RGB uint8 [H, W, 3] of `size` (width, height) from a JPEG in RGB: the way of nearly all photographs.

    None when libjpeg has warnings: then Pillow decides. Where the DCT can give half of the size or less, and still no
    less than `size`, it is decoded at that.
    """
    import torch  # here: only those who shrink images pay for it

    torch.set_num_threads(1)  # the processes are what runs in parallel
    try:
        # The DCT's other fractions, 7/8 … 5/8, have no vector code in libjpeg-turbo: decoding all of it is faster.
        factor = 2 if image.size[0] >= 2 * size[0] and image.size[1] >= 2 * size[1] else 1
        least = (size[1], size[0]) if factor == 2 else (0, 0)
        array = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=factor)
    except ValueError:
        return None
    # In this order of operations the strides say channels last, and resizing takes its fast vector path.
    pixels = torch.from_numpy(array)[None].permute(0, 3, 1, 2)  # uint8 [1, 3, H, W]
    pixels = torch.nn.functional.interpolate(pixels, (size[1], size[0]), mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _plain_mode(image: Image.Image) -> Image.Image:
    """8 bits a channel, without a palette."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("1", "I", "F"):
        return image.convert("L")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image.convert("RGB")
    return image


@functools.lru_cache(64)
def _profile(icc: bytes | None, mode: str) -> Any:
    """The transform from an embedded colour profile to sRGB; None when there is no use for one."""
    if not icc or mode not in ("RGB", "RGBA", "CMYK"):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        out = "RGB" if mode == "CMYK" else mode
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, out)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile is no reason to lose the image
        return None


def _save(image: Image.Image, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    match kind:
        case "jpg":
            (image.convert("RGB") if image.mode == "CMYK" else image).save(buffer, "JPEG", quality=quality)
        case "webp":
            image.save(buffer, "WEBP", quality=quality)
        case _:
            image.save(buffer, "PNG")
    return buffer.getvalue()
