"""A picture of some of the near-duplicates that were left out, beside the images that stay: a look at it shows whether
`--dedup_near` went too far."""

import contextlib
import io
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.packing.fetch import NO_HEADERS, Headers, fetch
from pipeline.packing.listing import Listing
from pipeline.packing.prepare import Rejected
from pipeline.pixels.decode import BadImage, picture
from pipeline.pixels.formats import Grey16

PAIRS, ACROSS = 24, 4
CELL, CAPTION, GAP = 128, 16, 12  # pixels


def pair_picture(
    listing: Listing,
    pairs: Sequence[tuple[int, int, int]],
    seed: int,
    headers: Headers = NO_HEADERS,
    grey16: Grey16 | None = None,
) -> bytes:
    """A PNG of up to 24 of the pairs (left out, stays, bits apart), the farthest apart first.

    On the left is what stays, on the right what is left out, after the number of bits. Black: not to be had.
    """
    chosen = random.Random(seed).sample(pairs, min(len(pairs), PAIRS))
    chosen.sort(key=lambda pair: (-pair[2], pair[0]))
    across = min(len(chosen), ACROSS)
    width = 2 * CELL + GAP
    sheet = Image.new("RGB", (across * width, -(-len(chosen) // across) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    font = caption_font()
    for cell, (left_out, stays, bits) in enumerate(chosen):
        x, y = cell % across * width, cell // across * (CELL + CAPTION)
        for side, number in enumerate((stays, left_out)):
            thumbnail = ImageOps.contain(_picture(listing, number, headers, grey16), (CELL - 4, CELL - 4))
            left = x + side * CELL + (CELL - thumbnail.width) // 2
            sheet.paste(thumbnail, (left, y + (CELL - thumbnail.height) // 2))
        for side, number in enumerate((stays, left_out)):
            said = fitted(f"{bits}: {listing[number].name}" if side else listing[number].name, font, CELL - 4)
            draw.text((x + side * CELL + CELL // 2, y + CELL), said, fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def caption_font() -> ImageFont.FreeTypeFont:
    import matplotlib  # a fifth of a second, in no hurry: Pillow's own font has ASCII alone, this one is a file there

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 11)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` in one line, cut where it is wider than `width` pixels."""
    text = " ".join(text.split())  # a name of two lines has no length
    if font.getlength(text) > width:
        text = next(cut for end in range(len(text), 0, -1) if font.getlength(cut := f"{text[:end]}…") <= width)
    return text


def _picture(listing: Listing, number: int, headers: Headers, grey16: Grey16 | None) -> Image.Image:
    with contextlib.suppress(BadImage, OSError, ValueError):  # the shards are done, whatever has become of the source
        (contents,) = fetch([listing[number]], headers)
        if not isinstance(contents, Rejected):
            return picture(np.frombuffer(contents[0], np.uint8), grey16=grey16, least_side=CELL)
    return Image.new("RGB", (CELL, CELL))
