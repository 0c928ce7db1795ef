"""Images whose right pixels are known, in the forms that users' files come in, and files that must be refused."""

import binascii
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

UNDO = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Pillow's transposition that sets it upright


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quadrants(height: int = 60, width: int = 90) -> Image.Image:
    """Every turn and mirror of it looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 90
    pixels[: height // 2, : width // 2] = (230, 20, 20)
    pixels[height // 2 :, width // 2 :] = (20, 20, 230)
    return Image.fromarray(pixels)


def png_with_text(image: Image.Image, key: str, text: str, *, packed: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text, zip=packed)
    return encode(image, "PNG", pnginfo=info)


def png_with_xmp(image: Image.Image, xmp: str, *, packed: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=packed)
    return encode(image, "PNG", pnginfo=info)


def turned(orientation: int) -> dict[str, bytes]:
    """The same picture in every format that can say how it lies."""
    image, exif = quadrants(), Image.Exif()
    exif[0x0112] = orientation
    raw = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    digits = binascii.hexlify(raw).decode()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    profile = f"\nexif\n{len(raw):8d}\n{lines}\n"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><y tiff:Orientation="{orientation}"/></x:xmpmeta>'
    segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode()
    jpeg = encode(image, "JPEG", quality=95, subsampling=0)
    return {
        "tiff.tif": encode(image, "TIFF", exif=exif),
        "tiff_lzw.tif": encode(image, "TIFF", exif=exif, compression="tiff_lzw"),
        "jpeg.jpg": encode(image, "JPEG", quality=95, subsampling=0, exif=exif),
        "jpeg_xmp.jpg": jpeg[:2] + struct.pack(">HH", 0xFFE1, len(segment) + 2) + segment + jpeg[2:],
        "webp.webp": encode(image, "WEBP", lossless=True, exif=exif),
        "png.png": encode(image, "PNG", exif=exif),
        "png_profile.png": png_with_text(image, "Raw profile type exif", profile, packed=False),
        "png_packed_profile.png": png_with_text(image, "Raw profile type exif", profile, packed=True),
        "png_xmp.png": png_with_xmp(image, xmp, packed=False),
        "png_packed_xmp.png": png_with_xmp(image, xmp, packed=True),
    }


def transparent() -> dict[str, bytes]:
    """A black cross on white, where the white, and in half of them the black too, is wholly transparent."""
    grey = Image.new("L", (80, 80), 255)
    pen = ImageDraw.Draw(grey)
    pen.line((20, 20, 60, 60), 0, 12)
    pen.line((20, 60, 60, 20), 0, 12)
    ink = grey.point(lambda value: 255 - value)
    clear = Image.new("L", grey.size, 0)
    files = {}
    for name, alpha in (("clear", ink), ("void", clear)):
        rgba, la = Image.merge("RGBA", [grey, grey, grey, alpha]), Image.merge("LA", [grey, alpha])
        files |= {
            f"{name}_rgba.png": encode(rgba, "PNG"),
            f"{name}_la.png": encode(la, "PNG"),
            f"{name}_rgba.webp": encode(rgba, "WEBP", lossless=True, exact=True),
            f"{name}_rgba.tif": encode(rgba, "TIFF"),
            f"{name}_animated.png": encode(rgba, "PNG", save_all=True, append_images=[rgba.rotate(90)]),
        }
    palette = grey.convert("P")
    palette.putpalette([level for i in range(256) for level in (i, i, i)])
    files["palette.png"] = encode(palette, "PNG", transparency=255)
    files["palette.gif"] = encode(palette, "GIF", transparency=255)
    files["colour.png"] = encode(grey.convert("RGB"), "PNG", transparency=(255, 255, 255))
    return files


def tiff(values: np.ndarray, bits: int, *, order: str = "<", photometric: int = 1, tile: int = 0) -> bytes:
    """A grey TIFF without compression, as scanners write them: `values` [H, W] of 12 (packed) or 16 bits."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1}
    tags |= {322: tile, 323: tile, 324: 0, 325: len(data)} if tile else {273: 0, 278: height, 279: len(data)}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[324 if tile else 273] = start
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag, value in sorted(tags.items()):
        content += struct.pack(order + "HHII", tag, 4, 1, value)
    return content + bytes(4) + data


def grey_ramp(white: int) -> np.ndarray:
    """0 on the left to `white` on the right: uint16 [60, 120]."""
    return np.linspace(0, white, 120)[None].repeat(60, 0).astype(np.uint16)


def sixteen_bits() -> dict[str, bytes]:
    """A ramp from black to white."""
    ramp = grey_ramp(65535)
    image = Image.fromarray(ramp)
    return {
        "grey16.png": encode(image, "PNG"),
        "grey16.tif": encode(image, "TIFF"),
        "grey16_lzw.tif": encode(image, "TIFF", compression="tiff_lzw"),
        "grey16_big_endian.tif": tiff(ramp, 16, order=">"),
        "grey16_white_is_zero.tif": tiff(65535 - ramp, 16, photometric=0),
        "grey16.pgm": b"P5\n120 60\n65535\n" + ramp.astype(">u2").tobytes(),
        "grey16.jp2": encode(image, "JPEG2000"),
        "grey12.tif": tiff(ramp >> 4, 12),
    }


def dark_scans() -> dict[str, bytes]:
    """The same ramp in 12 bits, in files that say 16."""
    ramp = grey_ramp(4095)
    return {"dark.png": encode(Image.fromarray(ramp), "PNG"), "dark.tif": encode(Image.fromarray(ramp), "TIFF")}


def bands(number: int, *, photometric: int = 2, extra: tuple[int, ...] = ()) -> bytes:
    """The quadrants as a TIFF of so many bands, those behind the third like the first. extra: what the tag says of the
    further ones: 0 nothing, 1 and 2 alpha."""
    pixels = np.asarray(quadrants())
    data = np.concatenate([pixels, pixels[..., :1].repeat(number - 3, 2)], 2).tobytes()
    height, width, _ = pixels.shape
    # Values of more than four bytes lie between the tags and the pixels.
    tags: list[tuple[int, tuple[int, ...]]] = [(256, (width,)), (257, (height,)), (258, (8,) * number), (259, (1,))]
    tags += [(262, (photometric,)), (273, (0,)), (277, (number,)), (278, (height,)), (279, (len(data),))]
    tags += [(338, extra)] if extra else []
    begin = 8 + 2 + 12 * len(tags) + 4
    behind, entries = b"", b""
    for tag, values in tags:
        if tag in (273, 279):  # 32 bits
            where = begin + sum(2 * len(v) for _, v in tags if len(v) > 2)
            entries += struct.pack("<HHII", tag, 4, 1, where if tag == 273 else len(data))
            continue
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) <= 4:
            entries += struct.pack("<HHI4s", tag, 3, len(values), packed)
        else:
            entries += struct.pack("<HHII", tag, 3, len(values), begin + len(behind))
            behind += packed
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + behind + data


def too_many_bands() -> dict[str, bytes]:
    """Infrared and the like, as satellites and microscopes have it."""
    with_alpha = encode(quadrants().convert("RGBA"), "JPEG2000")
    assert b"cdef" in with_alpha
    return {
        "infrared.tif": bands(4, extra=(0,)),
        "infrared_and_alpha.tif": bands(5, extra=(2, 0)),
        "four_greys.tif": bands(4, photometric=1, extra=(0, 0, 0)),
        "eight.tif": bands(8, photometric=1, extra=(0,) * 7),
        "infrared.jp2": with_alpha.replace(b"cdef", b"free"),
    }


def other_forms() -> dict[str, bytes]:
    """The quadrants in every format and mode that is taken."""
    image = quadrants()
    return {
        "plain.jpg": encode(image, "JPEG", quality=95, subsampling=0),
        "two_pictures.mpo": encode(
            image, "MPO", quality=95, subsampling=0, save_all=True, append_images=[image.rotate(180)]
        ),
        "plain.png": encode(image, "PNG"),
        "animated.apng": encode(image, "PNG", save_all=True, append_images=[image.rotate(180)]),
        "plain.webp": encode(image, "WEBP", lossless=True),
        "animated.webp": encode(image, "WEBP", lossless=True, save_all=True, append_images=[image.rotate(180)]),
        "plain.bmp": encode(image, "BMP"),
        "palette.bmp": encode(image.quantize(8), "BMP"),
        "plain.dib": encode(image, "DIB"),
        "plain.ppm": encode(image, "PPM"),
        "palette.gif": encode(image.quantize(8), "GIF"),
        "animated.gif": encode(image.quantize(8), "GIF", save_all=True, append_images=[image.rotate(180).quantize(8)]),
        "plain.jp2": encode(image, "JPEG2000"),
        "codestream.j2k": encode(image, "JPEG2000", no_jp2=True),
        "alpha.tif": bands(4, extra=(2,)),
        "undeclared_alpha.tif": bands(4),
        "alpha.jp2": encode(image.convert("RGBA"), "JPEG2000"),
        "alpha.j2k": encode(image.convert("RGBA"), "JPEG2000", no_jp2=True),
        "cmyk.tif": encode(image.convert("CMYK"), "TIFF"),
        "cmyk.jp2": encode(image.convert("CMYK"), "JPEG2000"),
    }


def known_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name -> its bytes, and what a viewer shows: uint8 [H, W, 3]."""
    known = {}
    for orientation, turn in UNDO.items():
        shown = np.asarray(quadrants().transpose(Image.Transpose(turn)))
        known |= {f"turned_{orientation}_{name}": (data, shown) for name, data in turned(orientation).items()}
    cross = Image.new("L", (80, 80), 255)
    pen = ImageDraw.Draw(cross)
    pen.line((20, 20, 60, 60), 0, 12)
    pen.line((20, 60, 60, 20), 0, 12)
    known |= {name: (data, np.asarray(cross.convert("RGB"))) for name, data in transparent().items()}
    # Grey of 16 bits is shown by its high byte, [60, 120] -> [60, 120, 3].
    ramp, dark = (
        ((values >> 8).astype(np.uint8)[..., None]).repeat(3, 2) for values in (grey_ramp(65535), grey_ramp(4095))
    )
    known |= {name: (data, ramp) for name, data in sixteen_bits().items()}
    known |= {name: (data, dark) for name, data in dark_scans().items()}
    return known | {f"form_{name}": (data, np.asarray(quadrants())) for name, data in other_forms().items()}


# --- files that must be refused --------------------------------------------------------------------------------------


def gif_bomb(side: int, *, screen: int = 1) -> bytes:
    """A few bytes that announce a frame of side x side pixels and ask for them to be cleared."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 1, 0) + bytes([0, 0, 0, 255, 255, 255])
    control = b"\x21\xf9\x04" + bytes([2 << 2, 0, 0, 0]) + b"\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00"
    return head + control + frame + control + frame + b";"


def webp_bomb(side: int) -> bytes:
    """An animation with a small frame on a canvas of side x side."""
    small = encode(Image.new("RGBA", (8, 8)), "WEBP", lossless=True)[12:]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    frame = bytes(6) + three(7) + three(7) + three(10) + b"\0" + small
    body = b"WEBP" + chunk(b"VP8X", bytes([2, 0, 0, 0]) + three(side - 1) * 2) + chunk(b"ANIM", bytes(6))
    body += chunk(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg2000_bomb(side: int, **options: Any) -> bytes:
    """A codestream of side x side; around it, where there is one, a header that says 8 x 8."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG2000", **options))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    struct.pack_into(">8I", data, at, side, side, 0, 0, side, side, 0, 0)
    return bytes(data)


def png_bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def jpeg_bomb(side: int) -> bytes:
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG", progressive=True))
    struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, side, side)
    return bytes(data)


def bitmap_bomb(side: int, kind: str) -> bytes:
    data = bytearray(encode(Image.new("P", (8, 8)), kind))
    struct.pack_into("<II", data, 18 if kind == "BMP" else 4, side, side)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes."""
    return {
        "frame.gif": gif_bomb(60_000),
        "screen.gif": gif_bomb(8, screen=60_000),
        "canvas.webp": webp_bomb(30_000),
        "codestream.jp2": jpeg2000_bomb(40_000),
        "codestream.j2k": jpeg2000_bomb(40_000, no_jp2=True),
        "header.png": png_bomb(50_000),
        "header.jpg": jpeg_bomb(60_000),
        "header.bmp": bitmap_bomb(40_000, "BMP"),
        "header.dib": bitmap_bomb(40_000, "DIB"),
        "header.ppm": b"P6 40000 40000 255\n" + bytes(100),
        "plain.ppm": b"P3 40000 40000 255\n1 2 3",
        "header.tif": tiff(np.zeros((1, 1), np.uint16), 16).replace(
            struct.pack("<HHII", 256, 4, 1, 1), struct.pack("<HHII", 256, 4, 1, 400_000_000)
        ),
        "tile.tif": tiff(np.zeros((8, 8), np.uint16), 16, tile=40_000),
    }


def without_black_and_white() -> dict[str, bytes]:
    """Numbers that no one can tell the brightness of."""
    ramp = np.linspace(0, 1, 120, dtype=np.float32)[None].repeat(60, 0)
    signed = tiff((ramp * 30_000).astype(np.uint16), 16)
    at = struct.unpack_from("<H", signed, 8)[0]
    assert at == 9  # the tag that follows says that the numbers have a sign
    entries = signed[10 : 10 + 12 * at] + struct.pack("<HHII", 339, 3, 1, 2)
    data = signed[10 + 12 * at + 4 :]
    signed = signed[:8] + struct.pack("<H", at + 1) + entries + bytes(4) + data
    signed = signed.replace(struct.pack("<HHII", 273, 4, 1, 122), struct.pack("<HHII", 273, 4, 1, 134))
    return {
        "float.tif": encode(Image.fromarray(ramp), "TIFF"),
        "int32.tif": encode(Image.fromarray((ramp * 100_000).astype(np.int32)), "TIFF"),
        "int16.tif": signed,
        "float.ppm": b"Pf\n120 60\n-1.0\n" + ramp.tobytes(),
    }


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n64 64 moveto showpage\n%%EOF\n"


def not_images() -> dict[str, bytes]:
    """Files with the name of an image and another content."""
    return {
        "postscript.jpg": POSTSCRIPT,
        "pdf.png": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "text.bmp": b"BMW, Audi and others: a list of cars, as it happens, in a text of some length.",
        "passwd.jpg": b"root:x:0:0:root:/root:/bin/bash\n",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "photoshop.tif": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(400),
        "icon.png": encode(quadrants(32, 32), "ICO"),
        "targa.bmp": encode(quadrants(), "TGA"),
    }
