"""From an encoded image to pixels. Every path of the product that looks at an image comes through here.

1. The first bytes choose the decoder (`formats`). No other is asked, so that no file can start a program (Ghostscript).
2. Sizes are checked before memory is asked for, those too that Pillow does not look at (`headers`).
3. Pixels are 8 bits a channel, in one band or three. Alpha is dropped before anything else, and the colour under it
   stays; of 16 bits of grey the high byte is taken, or the range that the manifest gives is scaled to 8; float and
   32-bit integers, which have no black and no white, are refused, and so are further bands that are no alpha and no
   CMYK (infrared): nothing says which three are to be shown.
4. The picture is set upright as its EXIF or XMP says, once.
"""

import contextlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.pixels import headers, libtiff
from pipeline.pixels.formats import Grey16, sniff

# 300 MB of RGB, make_shards' limit too. A larger picture takes more memory than two batches of usual ones, and may be a
# decompression bomb.
MAX_PIXELS = 100_000_000

# A progressive JPEG is gone over in whole for each of its scans, which take a few bytes in the file: 156 kB can ask for
# most of a minute. Ten scans are usual; with more than so many, all scans together may have so many pixels: about 2 s.
USUAL_SCANS, MAX_SCANNED = 100, 2_000_000_000

# Extension as `sniff` says it -> Pillow's class. Not `Image.open`: with it Pillow asks further decoders, looks for more
# images in a JPEG (MPO) and gives it up when those are damaged, and has a limit on pixels of its own.
DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "jpg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "dib": BmpImagePlugin.DibImageFile,
    "tif": TiffImagePlugin.TiffImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
    "jp2": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "j2k": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
ANNOUNCED = {  # sizes that Pillow would ask memory for before it could be asked for them
    "gif": headers.gif_size,
    "webp": headers.webp_size,
    "jp2": headers.jpeg2000_size,
    "j2k": headers.jpeg2000_size,
}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 0x0112, 0x0102, 0x0106, 0x0142, 0x0143  # tags
SAMPLES_PER_PIXEL, INK_SET, EXTRA_SAMPLES = 0x0115, 0x014C, 0x0152
RGB, CMYK = 2, 5  # values of PHOTOMETRIC
ALPHAS = (1, 2, 999)  # values of EXTRA_SAMPLES; the last is Corel Draw's
TURNS = {  # EXIF orientation -> the operation that sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCAN = re.compile(rb"\xff\xda")  # never within the pixels, where 0 follows 255
DARK = 1 << 14  # of 65,536: a 16-bit image that stays below it was scanned with 14 bits or fewer, and comes out dark

# Takes a remark on an image that is used all the same: its kind, to count by, and the details.
Remark = Callable[[str, str], None]

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors reach standard error, without a file name


class BadImage(ValueError):
    """Why these bytes cannot be used: `reason` is a kind to count by, `detail` says what exactly is wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def ignore(kind: str, detail: str) -> None:
    """The `Remark` of callers whom nothing but the pixels concerns."""


def decode(
    encoded: np.ndarray, max_pixels: int = MAX_PIXELS, remark: Remark = ignore, *, grey16: Grey16 | None = None
) -> np.ndarray:
    """The pixels of the first frame, upright: uint8 [H, W, 3]. BadImage when there is no using the image. grey16: black
    and white of grey with more than 8 bits, from the manifest of the images; None: those of the file's bits."""
    return np.asarray(picture(encoded, max_pixels, remark, grey16=grey16))


def picture(
    encoded: np.ndarray,
    max_pixels: int = MAX_PIXELS,
    remark: Remark = ignore,
    *,
    grey16: Grey16 | None = None,
    least_side: int = 0,
) -> Image.Image:
    """As `decode`, as an RGB image. With `least_side` a large JPEG comes smaller, its sides no less than that."""
    image = open_image(encoded, max_pixels)
    with refusing():
        if least_side and image.format == "JPEG":
            image.draft("RGB", (least_side, least_side))
        pixels = plain(image, remark, grey16)
        return upright(pixels if pixels.mode == "RGB" else pixels.convert("RGB"), orientation(image))


def class_map(encoded: np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers of a picture whose pixels are classes, not colours: those of a palette, or of 8-bit grey; uint8
    [H, W], not turned. BadImage for any other kind of picture."""
    image = open_image(encoded, max_pixels)
    if image.mode not in ("P", "L"):
        raise BadImage("no class map", f"its pixels are {image.mode}, not numbers of a palette or 8-bit grey")
    with refusing():
        image.load()
        return np.asarray(image)


def open_image(encoded: np.ndarray, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and its sizes checked; its pixels are decoded by `plain`.

    BadImage when it is of no format that is taken, too large, or made of bands or numbers that nobody can show.
    """
    data = encoded.data
    if len(data) == 0:
        raise BadImage("empty file")
    kind = sniff(data)
    if not kind:
        raise BadImage("not an image", f"begins with {bytes(data[:16])!r}")
    _settle_pillow(max_pixels)
    with refusing():
        if kind in ANNOUNCED:
            with contextlib.suppress(IndexError, struct.error):  # it ends too early, as its decoder will say
                check_pixels(*ANNOUNCED[kind](data), max_pixels)
        if kind == "png":
            for _ in png_chunks(data):  # Pillow itself does not look at the checksums of the pixels
                pass
        _check_bands(kind, data)
        image = _decoder(kind)(io.BytesIO(data))
        check_pixels(*image.size, max_pixels)
        if kind == "jpg":
            check_scans(data, *image.size)
        if kind == "tif":  # libtiff makes room for a whole tile, however small the image
            tags = image.tag_v2  # type: ignore[attr-defined]
            check_pixels(int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0)), max_pixels)
    # PNG (in older Pillows) and PPM mean 16 bits when they have whole numbers in mode I; the other formats do not.
    if image.mode == "F" or (image.mode == "I" and kind not in ("png", "ppm")):
        numbers = "float" if image.mode == "F" else "signed or 32-bit integer"
        raise BadImage(
            "no black and white",
            f"nothing says which of its {numbers} numbers is black and which is white: scale them to 8 or 16 bits "
            "first (ImageMagick: -auto-level -depth 16)",
        )
    return image


def plain(image: Image.Image, remark: Remark = ignore, grey16: Grey16 | None = None) -> Image.Image:
    """Decodes what `open_image` opened: mode L, RGB or CMYK, 8 bits, without alpha or palette; not turned yet, but for
    TIFF, which Pillow itself turns. May raise what Pillow raises: see `refusing`."""
    if image.format == "TIFF":
        with libtiff.complaints() as said:
            try:
                image.load()
            except OSError as error:  # "decoder error -2"
                raise OSError(f"libtiff: {said[0]}" if said else str(error)) from None
        if said:
            remark("libtiff complained", said[0])
    else:
        image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits(image, remark, grey16)
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode == "La":  # colour that was multiplied by its alpha
        image = image.convert("LA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def check_decodes(image: Image.Image, *, usual: bool, remark: Remark = ignore, grey16: Grey16 | None = None) -> None:
    """BadImage when what `open_image` opened cannot be decoded. `usual`: `screen.inspect` knows its size."""
    with refusing():
        if usual and image.format == "JPEG":
            # An eighth of the size, grey: all of the entropy coding is decoded, which is where damage shows; most of
            # the arithmetic, which cannot fail, is not done.
            image.draft("L", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
        else:
            plain(image, remark, grey16)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, by which the pixels of `plain` are to be turned. PNG and TIFF say it only when
    they are decoded."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return value if value in TURNS else 1
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def upright(pixels: Image.Image, orientation: int) -> Image.Image:
    """`pixels` turned and mirrored as an EXIF orientation asks."""
    return pixels.transpose(TURNS[orientation]) if orientation in TURNS else pixels


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """BadImage when a picture of this size has more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise BadImage("too many pixels", f"{width}x{height} is {height * width:,} pixels, the limit is {max_pixels:,}")


def check_scans(data: memoryview, width: int, height: int) -> None:
    """BadImage when decoding a JPEG of this size would take minutes, for the number of its scans."""
    scans = sum(1 for _ in _SCAN.finditer(data))
    if scans > USUAL_SCANS and scans * width * height > MAX_SCANNED:
        raise BadImage("too many scans", f"{scans:,} of {width}x{height} pixels, decoding would take minutes")


def png_chunks(data: memoryview) -> Iterator[tuple[bytes, int, int, bool]]:
    """Each whole chunk of a PNG up to IEND: its kind, where its contents begin and end, whether its checksum is right.

    BadImage when the checksum of a chunk is wrong without which there is no picture: libpng, which DALI and viewers
    use, refuses it.
    """
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return
        intact = zlib.crc32(data[position + 4 : end]) == struct.unpack_from(">I", data, end)[0]
        if not intact and kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise BadImage("does not decode", f"PNG chunk {kind.decode()} at byte {position:,} does not match its CRC")
        yield kind, position + 8, end, intact
        if kind == b"IEND":
            return
        position = end + 4


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """BadImage in place of whatever Pillow's decoders raise, which is nearly anything on hostile files."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        message = re.sub(r" <_io.BytesIO object at \w+>", "", " ".join(str(error).split()))
        raise BadImage("does not decode", f"{type(error).__name__}: {message}"[:200]) from None


def _decoder(kind: str) -> Callable[[io.BytesIO], Image.Image]:
    if kind == "avif":
        try:
            from PIL import AvifImagePlugin
        except ImportError:
            raise BadImage("no decoder installed", "AVIF takes Pillow 11.3 or newer: pip install -U pillow") from None
        return AvifImagePlugin.AvifImageFile
    if kind == "heic":
        try:
            import pillow_heif
        except ImportError:
            raise BadImage("no decoder installed", "HEIC and HEIF take pillow-heif: pip install -e '.[heif]'") from None
        return pillow_heif.HeifImageFile  # type: ignore[no-any-return]
    return DECODERS[kind]


def _check_bands(kind: str, data: memoryview) -> None:
    """BadImage for more than three bands that are neither alpha nor CMYK. Only TIFF and JPEG 2000 can have them."""
    bands = others = 0
    if kind == "tif":
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if data[2] == 43 or data[3] == 43 else 8))
        file.seek(tags.next)
        tags.load(file)
        bands, extra = int(tags.get(SAMPLES_PER_PIXEL, 1)), tags.get(EXTRA_SAMPLES)
        others = sum(value in ALPHAS for value in extra or ())
        if extra is None and bands == 4 and tags.get(PHOTOMETRIC) == RGB:
            others = 1  # not declared, and alpha for every reader
        others += tags.get(PHOTOMETRIC) == CMYK and tags.get(INK_SET, 1) == 1
    elif kind in ("jp2", "j2k"):
        with contextlib.suppress(IndexError, struct.error):  # it ends too early, as its decoder will say
            bands, others = headers.jpeg2000_bands(data)
    if bands - others > 3:
        raise BadImage(
            "more than three bands",
            f"{bands} bands, {others or 'none'} of them alpha or the black of CMYK: write the three that are to be "
            "seen into a file first (gdal_translate -b 1 -b 2 -b 3)",
        )


def _eight_bits(image: Image.Image, remark: Remark, grey16: Grey16 | None) -> Image.Image:
    """Grey of 16 bits, or 12 in a TIFF that says so, as mode L: `grey16` scaled to 0 to 255, or the high byte."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
    brightest = int(values.max())
    if grey16 is None and bits == 16 and 0 < brightest < DARK:
        remark(
            "dark 16-bit grey",
            f"values reach {brightest:,} of 65,535 and stay as they are; if black and white are other values, give "
            "make_shards --grey16_range LOW HIGH, or a card grey16_range",
        )
    low, high = grey16 or (0, (1 << bits) - 1)
    levels = ((np.arange(1 << 16) - low) * 256 // (high - low + 1)).clip(0, 255).astype(np.uint8)
    grey = np.empty(values.shape, np.uint8)
    for y in range(0, len(values), 256):  # looking up needs eight bytes for each pixel
        grey[y : y + 256] = levels[values[y : y + 256]]
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)  # 0: white is zero


def _settle_pillow(max_pixels: int) -> None:
    """Pillow's warnings are nobody's concern, and its own limit on pixels may not undercut ours."""
    # catch_warnings swaps the filters of the whole process, which is not safe in a thread; this touches Pillow's alone.
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
