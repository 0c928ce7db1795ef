"""The parameters of every view: pure arithmetic from (seed, epoch, sample id, view), no pixels.

A view is one float32 row of `COLUMNS`; graph.py turns an image and a row into pixels. The generator is counter-based
(SplitMix64's finaliser over key and the draw's number): a row does not depend on the rank, the batch, or earlier draws.
A view recipe (view_recipe.py) says what is drawn.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.permutation import mix
from pipeline.pixels.view_recipe import (
    CIFAR,
    IMAGENET,
    RECIPES,
    AnyViews,
    MeanStd,
    Pair,
    Triple,
    ViewRecipe,
    view_recipe,
)

__all__ = ["CIFAR", "IMAGENET", "RECIPES", "MeanStd", "Triple", "ViewRecipe"]  # those that come from view_recipe
COLUMNS = (
    # The box of the image that is resized, in pixels. On the CPU nothing outside it is looked at; DALI's filter, on a
    # GPU, looks a little further.
    "top", "left", "height", "width",
    # The size that the box is resized to, and the place of the image_size x image_size window in it.
    "grid_height", "grid_width", "grid_top", "grid_left",
    "flip",  # 0 or 1
    # Greyscale before the jitter (v1) or after it; order: index into ORDERS, -1: no jitter; a hue of 0 changes nothing.
    "grey_before", "order", "brightness", "contrast", "saturation", "hue", "grey_after",
    "blur",  # sigma in pixels of the view, 0: none
    "solarise",  # levels from this one on are inverted, 0: none
)  # fmt: skip
TOP, LEFT, HEIGHT, WIDTH, GRID_HEIGHT, GRID_WIDTH, GRID_TOP, GRID_LEFT, FLIP = range(9)
GREY_BEFORE, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY_AFTER, BLUR, SOLARISE = range(9, 18)
# The orders of brightness (0), contrast (1), saturation (2) and hue (3).
ORDERS = tuple(itertools.permutations(range(4)))

RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop, width to height
ATTEMPTS = 10  # of RandomResizedCrop, before it takes the central crop

# The decision that each number of a view's stream makes. A number keeps its meaning: else a run that continues would
# see other views.
DRAWS = 40
AREA_DRAWS, RATIO_DRAWS = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
TOP_DRAW, LEFT_DRAW, FLIP_DRAW = 20, 21, 22
JITTER_DRAW, ORDER_DRAW, BRIGHTNESS_DRAW, CONTRAST_DRAW, SATURATION_DRAW, HUE_DRAW = range(30, 36)
GREY_DRAW, BLUR_DRAW, SIGMA_DRAW, SOLARISE_DRAW = range(36, 40)

Ints = NDArray[np.int64] | Sequence[int]
Views = NDArray[np.float32]


def mean_std(recipe: AnyViews) -> MeanStd:
    """Mean and standard deviation per channel, of pixels in [0, 1], by which the recipe normalises."""
    return view_recipe(recipe).mean_std


def sample_views(
    recipe: AnyViews,
    *,
    seed: int,
    epochs: Ints,
    sample_ids: Ints,
    view: int,
    heights: Ints,
    widths: Ints,
    image_size: int,
    crop_min: float | None = None,
) -> Views:
    """Parameters of view number `view` of n samples: float32 [n, len(COLUMNS)].

    heights and widths are those of the images in pixels, after EXIF orientation; crop_min is the smallest share of the
    image's area that a crop takes, the recipe's own when left out.
    """
    r = view_recipe(recipe, crop_min=crop_min)
    uniform = _uniforms(seed, epochs, sample_ids, view)
    rows = _resized_crops(uniform, heights, widths, image_size, r.crop_scale, r.crop_ratio, r.flip)
    jitter = uniform[:, JITTER_DRAW] < r.jitter
    rows[:, ORDER] = np.where(jitter, np.floor(uniform[:, ORDER_DRAW] * len(ORDERS)), -1)
    for column, draw, strength in (
        (BRIGHTNESS, BRIGHTNESS_DRAW, r.brightness),
        (CONTRAST, CONTRAST_DRAW, r.contrast),
        (SATURATION, SATURATION_DRAW, r.saturation),
    ):
        low, width = max(0.0, 1 - strength), min(2 * strength, 1 + strength)
        rows[:, column] = np.where(jitter, low + width * uniform[:, draw], 1)
    rows[:, HUE] = np.where(jitter, r.hue * (2 * uniform[:, HUE_DRAW] - 1), 0)
    rows[:, GREY_BEFORE if r.grey_first else GREY_AFTER] = uniform[:, GREY_DRAW] < r.grey
    low, high = r.blur_sigma
    rows[:, BLUR] = np.where(uniform[:, BLUR_DRAW] < r.blur, low + (high - low) * uniform[:, SIGMA_DRAW], 0)
    rows[:, SOLARISE] = np.where(uniform[:, SOLARISE_DRAW] < r.solarise, r.solarise_threshold, 0)
    return rows


def sample_crops(
    *,
    seed: int,
    epochs: Ints,
    sample_ids: Ints,
    view: int,
    heights: Ints,
    widths: Ints,
    image_size: int,
    crop_min: float,
) -> Views:
    """As `sample_views`, crop and flip alone: what a linear classifier is trained on."""
    return _resized_crops(_uniforms(seed, epochs, sample_ids, view), heights, widths, image_size, (crop_min, 1.0))


def center_crops(heights: Ints, widths: Ints, image_size: int, resize: int) -> Views:
    """The short side resized to `resize`, then the central square of `image_size`, rounded as torchvision: [n, P].

    Raises ValueError when `resize` is below `image_size`.
    """
    if resize < image_size:
        raise ValueError(f"resize {resize} is below image_size {image_size}: the crop would leave the image")
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    short = np.minimum(heights, widths)
    rows = _plain_rows(heights, widths)
    # torchvision: int(size * long / short), in floating point; the short side comes out as `resize` itself.
    rows[:, GRID_HEIGHT] = np.where(heights <= widths, resize, np.trunc(resize * heights / short))
    rows[:, GRID_WIDTH] = np.where(widths <= heights, resize, np.trunc(resize * widths / short))
    rows[:, GRID_TOP] = np.rint((rows[:, GRID_HEIGHT] - image_size) / 2)
    rows[:, GRID_LEFT] = np.rint((rows[:, GRID_WIDTH] - image_size) / 2)
    return rows


def describe(row: Views) -> str:
    """One view's parameters for people, a line for each thing that happens, in its order."""
    top, left, height, width = (int(v) for v in row[:4])
    lines = [f"crop {width}x{height} at {left},{top}" + (" flip" if row[FLIP] else "")]
    if row[GREY_BEFORE]:
        lines.append("grey")
    if row[ORDER] >= 0:
        parts = (f"b{row[BRIGHTNESS]:.2f}", f"c{row[CONTRAST]:.2f}", f"s{row[SATURATION]:.2f}", f"h{row[HUE]:+.2f}")
        lines.append(" ".join(parts[op] for op in ORDERS[int(row[ORDER])]))
    if row[GREY_AFTER]:
        lines.append("grey")
    last = [f"blur {row[BLUR]:.2f}"] if row[BLUR] else []
    last += [f"solarise {row[SOLARISE]:.0f}"] if row[SOLARISE] else []
    if last:
        lines.append(" ".join(last))
    return "\n".join(lines)


def _uniforms(seed: int, epochs: Ints, sample_ids: Ints, view: int) -> NDArray[np.float64]:
    """[n, DRAWS] uniform in [0, 1), a function of the key and the draw's number alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = np.full(len(sample_ids), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part in (np.asarray(epochs), np.asarray(sample_ids), np.full(len(sample_ids), view)):
        key = mix(key * golden + part.astype(np.int64).view(np.uint64) + golden)
    bits = mix(key[:, None] + np.arange(1, DRAWS + 1, dtype=np.uint64) * golden)
    return np.multiply(bits >> np.uint64(11), 2.0**-53, dtype=np.float64)


def _plain_rows(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Views:
    """Rows that take the whole image and change no colour; the grid is left to the caller."""
    rows = np.zeros((len(heights), len(COLUMNS)), np.float32)
    rows[:, HEIGHT], rows[:, WIDTH] = heights, widths
    rows[:, ORDER] = -1
    rows[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    return rows


def _resized_crops(
    uniform: NDArray[np.float64],
    heights: Ints,
    widths: Ints,
    image_size: int,
    scale: Pair,
    ratios: Pair = RATIO,
    flip: float = 0.5,
) -> Views:
    """torchvision's RandomResizedCrop.get_params, vectorised, and the flip."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    n = len(heights)
    # All ten attempts of all samples at once; each sample takes the first that fits.
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, AREA_DRAWS])
    log_low, log_high = np.log(ratios)
    ratio = np.exp(log_low + (log_high - log_low) * uniform[:, RATIO_DRAWS])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.argmax(1)
    crop_height, crop_width = height[np.arange(n), first], width[np.arange(n), first]
    top = np.floor(uniform[:, TOP_DRAW] * (heights - crop_height + 1))
    left = np.floor(uniform[:, LEFT_DRAW] * (widths - crop_width + 1))
    # None fits (tiny or very long images): the central crop nearest to the allowed ratios.
    failed = ~fits.any(1)
    low, high = widths < ratios[0] * heights, widths > ratios[1] * heights
    crop_height = np.where(failed, np.where(low, np.rint(widths / ratios[0]), heights), crop_height)
    crop_width = np.where(failed, np.where(high, np.rint(heights * ratios[1]), widths), crop_width)
    rows = _plain_rows(heights, widths)
    rows[:, TOP] = np.where(failed, (heights - crop_height) // 2, top)
    rows[:, LEFT] = np.where(failed, (widths - crop_width) // 2, left)
    rows[:, HEIGHT], rows[:, WIDTH] = crop_height, crop_width
    rows[:, GRID_HEIGHT] = rows[:, GRID_WIDTH] = image_size
    rows[:, FLIP] = uniform[:, FLIP_DRAW] < flip
    return rows
