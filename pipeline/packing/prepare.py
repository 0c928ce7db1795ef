"""Is this an image, and fit for packing? Every image is decoded; with `short_side` or `convert` it is encoded again.

Packing accepts the images that training accepts, and an image that is encoded again keeps the pixels that it would see.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from pipeline.pixels.decode import (
    MAX_PIXELS,
    BadImage,
    Remark,
    check_decodes,
    ignore,
    open_image,
    orientation,
    plain,
    refusing,
    upright,
)
from pipeline.pixels.formats import Grey16, sniff
from pipeline.pixels.screen import inspect

KEPT = ("png", "webp")  # formats that a shrunken image is written in again unless `convert`; the others become PNG
LARGEST_PROFILE = 16_384  # bytes; a camera's or a screen's has 500 to 10,000
SAVED_AS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Rejected(Exception):
    """Why an image is left out: a category to count by, and what exactly was wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Options:
    """How images are changed, and which are left out. Sides in pixels."""

    no_verify: bool = False
    max_pixels: int = MAX_PIXELS
    min_side: int = 0
    short_side: int = 0  # larger images are shrunk to it; 0: none
    quality: int = 90  # of JPEG and WebP that are written anew
    convert: bool = False  # other formats to JPEG
    grey16_range: Grey16 | None = None  # black and white of grey of more than 8 bits; None: the file's


def prepare(data: bytes, name: str, options: Options, remark: Remark = ignore) -> tuple[bytes, str]:
    """The bytes to pack and their extension: `data` itself unless it is to be shrunk or converted.

    Raises Rejected when it is not an image, is damaged, too large or too small. Without verification only damage is
    let through: a list may name any file, and a few bytes may announce gigabytes of pixels, as their header tells. An
    image that has to be encoded again comes out upright, without metadata but its colour profile: training looks at
    the numbers alone, so these stay.
    """
    extension = sniff(data)
    encoded = np.frombuffer(data, np.uint8)
    only_header = options.no_verify and not (options.min_side or options.short_side or options.convert)
    try:
        # `inspect` reads every byte of a PNG, for its checksums: that is verification.
        usual = (extension == "jpg" or not options.no_verify) and inspect(encoded, options.max_pixels) is not None
        if only_header and usual:
            return data, extension
        image = open_image(encoded, options.max_pixels)
        width, height = image.size
        if min(width, height) < options.min_side:
            raise Rejected("side too small", f"{width} x {height} < {options.min_side}")
        if 0 < options.short_side < min(width, height) or (options.convert and extension != "jpg"):
            return _encode_again(data, image, extension, usual, options, remark)
        if not options.no_verify:
            check_decodes(image, usual=usual, remark=remark, grey16=options.grey16_range)
    except BadImage as error:
        if not (only_header and error.reason == "does not decode"):
            raise Rejected(error.reason, error.detail) from None
    return data, extension


def _encode_again(
    data: bytes, image: Image.Image, extension: str, usual: bool, options: Options, remark: Remark
) -> tuple[bytes, str]:
    kind = "jpg" if options.convert or extension == "jpg" else extension if extension in KEPT else "png"
    with refusing():
        small = _shrink_jpeg(data, image, options) if usual and extension == "jpg" and image.mode == "RGB" else None
        pixels = plain(image, remark, options.grey16_range) if small is None else Image.fromarray(small)
        turn = orientation(image)
        profile = b"" if image.mode == "CMYK" else _profile(image.info.get("icc_profile"))
        if small is not None and not profile and turn == 1:
            import simplejpeg  # type: ignore[import-untyped]

            return bytes(simplejpeg.encode_jpeg(small, quality=options.quality, colorsubsampling="420")), "jpg"
        if small is None and (size := _shrunken(pixels.size, options)) != pixels.size:
            pixels = pixels.resize(size, Image.Resampling.BICUBIC)
        pixels = upright(pixels.convert("RGB") if pixels.mode == "CMYK" else pixels, turn)
    buffer = io.BytesIO()
    try:
        pixels.save(buffer, SAVED_AS[kind], quality=options.quality, icc_profile=profile)
    except (OSError, ValueError) as error:
        raise Rejected(f"does not fit a {SAVED_AS[kind]} file", f"{pixels.width}x{pixels.height}: {error}") from None
    return buffer.getvalue(), kind


def _shrunken(size: tuple[int, int], options: Options) -> tuple[int, int]:
    """Width and height for an image of `size` (width, height)."""
    width, height = size
    scale = min(options.short_side / min(width, height), 1.0) if options.short_side else 1.0
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _shrink_jpeg(data: bytes, image: Image.Image, options: Options) -> np.ndarray | None:
    """RGB uint8 [H, W, 3], shrunk, from a JPEG in RGB that is not decoded yet: the way of nearly all photographs.

    None when libjpeg has warnings: then Pillow decides. Where the DCT can give half of the size or less, and still no
    less than is asked for, it is decoded at that.
    """
    import simplejpeg  # here, as torch: only those who shrink images pay for them
    import torch

    torch.set_num_threads(1)  # the processes are what runs in parallel
    size = _shrunken(image.size, options)
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


@functools.lru_cache(64)
def _profile(icc: bytes | None) -> bytes:
    """The colour profile when a viewer needs it; empty when the numbers are sRGB as they are, when it is broken, and
    when it is one of the large ones for printing."""
    if not icc or len(icc) > LARGEST_PROFILE:
        return b""
    try:
        description = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc)))
    except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile is no reason to lose the image
        return b""
    return b"" if "srgb" in description.lower() else icc
