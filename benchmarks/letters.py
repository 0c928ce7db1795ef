"""Writes pages strewn with one letter each as an image folder: data for the demo that no download is needed for.

python benchmarks/letters.py DESTINATION   ->  DESTINATION/{train,val}/{A..Z}/*.png   (2,808 + 936 grey images)

A page shows one letter in one font, again and again, each time at another place, size and angle; the letter is its
class. Two pages of a letter hardly share a pixel, so pixels do not tell the classes apart; but every crop of a page
shows its letter, which is all that MoCo's two views have to agree about. The fonts come with matplotlib.
"""

import string
import sys
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10"),
)
PAGES = 12  # of each letter in each font, every fourth for val
SIDE = 48  # of a page
GLYPH_SIDE, GLYPH_HEIGHT = 40, 22  # a letter in the middle of a square, before it is turned and resized
CELL = 20  # pixels from one letter to the next, before it is moved
MOVED = 3.0  # pixels at most, across and down
HEIGHTS = (14.0, 22.0)  # of a letter, pixels
TURNED = 25.0  # degrees at most, to either side


def draw_glyph(letter: str, font: str) -> Image.Image:
    """The letter in white on black, grey [GLYPH_SIDE, GLYPH_SIDE]."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf"
    type_face = ImageFont.truetype(path, 28)  # whose capitals are about GLYPH_HEIGHT pixels high
    left, top, right, bottom = type_face.getbbox(letter)
    glyph = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
    corner = ((GLYPH_SIDE - left - right) / 2, (GLYPH_SIDE - top - bottom) / 2)
    ImageDraw.Draw(glyph).text(corner, letter, 255, type_face)
    return glyph


def draw_page(glyph: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The glyph all over a page, uint8 [SIDE, SIDE]: the nodes of a grid, from a random corner, moved a little."""
    page = np.zeros((SIDE, SIDE), np.uint8)
    corner = rng.uniform(-CELL / 2, CELL / 2, 2)
    middle = GLYPH_SIDE / 2
    for node in np.ndindex(SIDE // CELL + 2, SIDE // CELL + 2):
        y, x = corner + np.multiply(node, CELL) + rng.uniform(-MOVED, MOVED, 2)
        angle = np.deg2rad(rng.uniform(-TURNED, TURNED))
        scale = GLYPH_HEIGHT / rng.uniform(*HEIGHTS)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        # Where in the glyph each pixel of the page comes from.
        matrix = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        drawn = glyph.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        page = np.maximum(page, np.asarray(drawn))
    return page


def main(destination: Path) -> None:
    rng = np.random.default_rng(0)
    for letter in string.ascii_uppercase:
        for font in FONTS:
            glyph = draw_glyph(letter, font)
            for i in range(PAGES):
                folder = destination / ("val" if i % 4 == 3 else "train") / letter
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw_page(glyph, rng)).save(folder / f"{font}-{i:02d}.png")
    print(f"{len(string.ascii_uppercase) * len(FONTS) * PAGES:,} pages written to {destination}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DESTINATION")
    main(Path(sys.argv[1]))
