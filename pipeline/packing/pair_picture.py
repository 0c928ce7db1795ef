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
    """A PNG of up to 24 of the pairs (left out, stays, bits apart), the farthest apart first. Black: not to be had."""
    import matplotlib  # for its font: Pillow's own has ASCII alone

    chosen = random.Random(seed).sample(pairs, min(len(pairs), PAIRS))
    chosen.sort(key=lambda pair: (-pair[2], pair[0]))
    across = min(len(chosen), ACROSS)
    width = 2 * CELL + GAP
    sheet = Image.new("RGB", (across * width, -(-len(chosen) // across) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 11)
    for cell, (left_out, stays, bits) in enumerate(chosen):
        x, y = cell % across * width, cell // across * (CELL + CAPTION)
        for side, number in enumerate((stays, left_out)):
            thumbnail = ImageOps.contain(_picture(listing, number, headers, grey16), (CELL - 4, CELL - 4))
            left = x + side * CELL + (CELL - thumbnail.width) // 2
            sheet.paste(thumbnail, (left, y + (CELL - thumbnail.height) // 2))
        said = f"{bits} bits: {stays:,} stays, {left_out:,} is left out"
        draw.text((x + CELL, y + CELL), said, fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _picture(listing: Listing, number: int, headers: Headers, grey16: Grey16 | None) -> Image.Image:
    with contextlib.suppress(BadImage, OSError, ValueError):  # the shards are done, whatever has become of the source
        (contents,) = fetch([listing[number]], headers)
        if not isinstance(contents, Rejected):
            return picture(np.frombuffer(contents[0], np.uint8), grey16=grey16, least_side=CELL)
    return Image.new("RGB", (CELL, CELL))
