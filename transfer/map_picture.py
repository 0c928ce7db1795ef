"""Pictures laid out where their features lie on a plane."""

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from transfer.embedding import Embedding, Floats
from transfer.gallery import INK, PAPER
from transfer.pictures import Pictures
from transfer.similar import principal_plane

MAP = "map.png"
CELLS_X, CELLS_Y, CELL = 32, 22, 46  # of the map, and a cell's side in pixels
TOP, FRAME = 34, 2  # pixels
MOST_CLASSES = 20  # that colours can tell apart


def one_of_each_cell(positions: Floats) -> dict[tuple[int, int], int]:
    """(column, row) of a cell -> the point nearest to its centre. positions [N, 2]; the outermost 0.5 % on each side
    lie in the outermost cells."""
    low, high = np.percentile(positions, [0.5, 99.5], axis=0)
    scaled = (positions - low) / np.maximum(high - low, 1e-12) * (CELLS_X, CELLS_Y)
    scaled[:, 1] = CELLS_Y - scaled[:, 1]  # up is up
    cells = np.clip(np.floor(scaled), 0, (CELLS_X - 1, CELLS_Y - 1)).astype(np.int64)
    from_centre = ((scaled - cells - 0.5) ** 2).sum(axis=1)
    order = np.lexsort((from_centre, cells[:, 1], cells[:, 0]))
    _, first = np.unique(cells[order], axis=0, return_index=True)
    return {(int(cells[i, 0]), int(cells[i, 1])): int(i) for i in order[first]}


def map_of(embedding: Embedding, pictures: Pictures) -> tuple[Image.Image, float]:
    """The map of a folder of features, and the share of the variance that its plane holds."""
    positions, shares = principal_plane(embedding.features)
    where = f"{len(positions):,} images of {embedding.folder} on their principal plane"
    title = f"{where} ({sum(shares):.0%} of the variance)"
    return draw_map(positions, pictures.of, embedding.labels, pictures.class_name, title), sum(shares)


def draw_map(
    positions: Floats,
    picture_of: Callable[[int], Image.Image],
    labels: NDArray[np.int64],
    name_of: Callable[[int], str],
    title: str,
) -> Image.Image:
    """A picture for each cell of the plane that has a point; frames and a legend for up to 20 classes. labels int64
    [N], -1 for none."""
    shown = one_of_each_cell(positions)
    classes = sorted({int(labels[i]) for i in shown.values()} - {-1})
    classes = classes if len(classes) <= MOST_CLASSES else []
    colours = {c: _colour(n, len(classes)) for n, c in enumerate(classes)}
    legend = 24 if classes else 0
    page = Image.new("RGB", (CELLS_X * CELL + 16, TOP + CELLS_Y * CELL + legend + 12), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((8, 10), title, fill=INK, font=ImageFont.load_default(size=13))
    side = CELL - 2 * FRAME - 2
    for (column, line), i in shown.items():
        x, y = 8 + column * CELL, TOP + line * CELL
        if (label := int(labels[i])) in colours:
            pen.rectangle((x, y, x + CELL - 3, y + CELL - 3), fill=colours[label])
        page.paste(ImageOps.fit(picture_of(i), (side, side)), (x + FRAME, y + FRAME))
    x = 8
    for c, colour in colours.items():
        text, y = name_of(c), TOP + CELLS_Y * CELL + 6
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=colour)
        pen.text((x + 15, y), text, fill=INK, font=ImageFont.load_default(size=11))
        x += 32 + int(pen.textlength(text, font=ImageFont.load_default(size=11)))
    return page


def _colour(number: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / max(1, count), 0.75, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
