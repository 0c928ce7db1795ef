"""One view of one image on the CPU: crop, resize, colour, blur, flip and normalise, fused in a function that numba compiles once and caches.

Pixels are those of torchvision's functional ops on PIL images (Pillow's C code), whose roundings are kept: every op ends in uint8.
Planar scratch images keep the inner loops contiguous, so that LLVM vectorises them; nothing in them branches on a pixel.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.views import (
    BLUR, BRIGHTNESS, CONTRAST, FLIP, GREY_AFTER, GREY_BEFORE, GRID_HEIGHT, GRID_LEFT, GRID_TOP, GRID_WIDTH,
    HEIGHT, HUE, LEFT, ORDER, ORDERS, SATURATION, TOP, WIDTH,
)  # fmt: skip

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
ORDER_TABLE = np.array(ORDERS, np.int64)


@njit(cache=True)
def triangle_weights(size: int, grid: int, start: int, count: int) -> tuple[NDArray[np.int64], Floats]:
    """Antialiased bilinear weights from `size` pixels to the outputs [start, start + count) of a grid: first input pixel
    [count], weights [count, taps], all rows of equal length (Pillow, Resample.c)."""
    scale = size / grid
    support = max(scale, 1.0)
    taps = min(int(math.ceil(support)) * 2 + 1, size)
    first = np.empty(count, np.int64)
    weights = np.zeros((count, taps), np.float32)
    for i in range(count):
        center = (start + i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), size)
        total = 0.0
        for x in range(low, high):
            total += max(1.0 - abs((x - center + 0.5) / support), 0.0)
        # Rows are as long as the longest: a row at the end starts earlier and has zeros in front.
        begin = min(low, size - taps)
        first[i] = begin
        for x in range(low, high):
            weights[i, x - begin] = max(1.0 - abs((x - center + 0.5) / support), 0.0) / total
    return first, weights


@njit(cache=True)
def resize(image: Bytes, row: Floats, size: int) -> Bytes:
    """The view's window of the resized box: uint8 planes [3, size, size]; horizontally first, rounded between, as Pillow does."""
    top, left = int(row[TOP]), int(row[LEFT])
    first_x, weights_x = triangle_weights(int(row[WIDTH]), int(row[GRID_WIDTH]), int(row[GRID_LEFT]), size)
    first_y, weights_y = triangle_weights(int(row[HEIGHT]), int(row[GRID_HEIGHT]), int(row[GRID_TOP]), size)
    taps_x, taps_y = weights_x.shape[1], weights_y.shape[1]
    start = first_y[0]
    rows = first_y[size - 1] + taps_y - start
    narrow = np.empty((3, rows, size), np.uint8)
    for y in range(rows):
        line = image[top + start + y]
        for x in range(size):
            r = g = b = np.float32(0.5)
            for k in range(taps_x):
                w = weights_x[x, k]
                at = left + first_x[x] + k
                r += w * line[at, 0]
                g += w * line[at, 1]
                b += w * line[at, 2]
            narrow[0, y, x] = np.uint8(r)
            narrow[1, y, x] = np.uint8(g)
            narrow[2, y, x] = np.uint8(b)
    out = np.empty((3, size, size), np.uint8)
    total = np.empty(size, np.float32)
    for c in range(3):
        for y in range(size):
            total[:] = np.float32(0.5)
            for k in range(taps_y):
                w = weights_y[y, k]
                line = narrow[c, first_y[y] - start + k]
                for x in range(size):
                    total[x] += w * np.float32(line[x])
            for x in range(size):
                out[c, y, x] = np.uint8(total[x])
    return out


@njit(cache=True)
def luma(r: int, g: int, b: int) -> int:
    """ITU-R 601-2 luma of a pixel, in Pillow's fixed point."""
    return np.int32(np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16


@njit(cache=True)
def blend(low: float, value: float, factor: float) -> int:
    """Pillow's Image.blend of one byte: towards `low` or away from it, clamped, truncated."""
    mixed = np.float32(low) + np.float32(factor) * (np.float32(value) - np.float32(low))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@njit(cache=True)
def grey(planes: Bytes) -> None:
    for i in range(planes.shape[1]):
        planes[0, i] = planes[1, i] = planes[2, i] = luma(planes[0, i], planes[1, i], planes[2, i])


@njit(cache=True)
def brighten(planes: Bytes, factor: float) -> None:
    for c in range(3):
        for i in range(planes.shape[1]):
            planes[c, i] = blend(0, planes[c, i], factor)


@njit(cache=True)
def contrast(planes: Bytes, factor: float) -> None:
    """About the image's own grey mean, rounded (ImageEnhance.Contrast)."""
    total = 0
    for i in range(planes.shape[1]):
        total += luma(planes[0, i], planes[1, i], planes[2, i])
    mean = int(total / planes.shape[1] + 0.5)
    for c in range(3):
        for i in range(planes.shape[1]):
            planes[c, i] = blend(mean, planes[c, i], factor)


@njit(cache=True)
def saturate(planes: Bytes, factor: float) -> None:
    for i in range(planes.shape[1]):
        value = luma(planes[0, i], planes[1, i], planes[2, i])
        planes[0, i] = blend(value, planes[0, i], factor)
        planes[1, i] = blend(value, planes[1, i], factor)
        planes[2, i] = blend(value, planes[2, i], factor)


@njit(cache=True)
def turn_hue(planes: Bytes, hue: float) -> None:
    """By `hue` of a full turn, in 8-bit HSV (torchvision's adjust_hue on PIL images; Pillow, Convert.c)."""
    shift = np.float32(int(np.float64(hue) * 255) % 256)
    zero, one, six = np.float32(0), np.float32(1), np.float32(6)
    full = np.float32(255)
    for i in range(planes.shape[1]):
        r, g, b = np.float32(planes[0, i]), np.float32(planes[1, i]), np.float32(planes[2, i])
        top, bottom = max(r, max(g, b)), min(r, min(g, b))
        chroma = top - bottom
        safe = max(chroma, one)
        rc, gc, bc = (top - r) / safe, (top - g) / safe, (top - b) / safe
        h = bc - gc if r == top else (np.float32(2) + rc - bc if g == top else np.float32(4) + gc - rc)
        h = h / six
        h = h + one if h < zero else h
        h = np.float32(math.floor(h * full))
        s = np.float32(math.floor(chroma / max(top, one) * full))
        h += shift
        h = h - np.float32(256) if h > full else h
        sector = h * six / full
        index = np.float32(math.floor(sector))
        f = sector - index
        s = s / full
        half = np.float32(0.5)
        p = np.float32(math.floor(top * (one - s) + half))
        q = np.float32(math.floor(top * (one - s * f) + half))
        t = np.float32(math.floor(top * (one - s * (one - f)) + half))
        index = zero if index == six else index
        two, three, four = np.float32(2), np.float32(3), np.float32(4)
        red = top if (index == zero or index == np.float32(5)) else (q if index == one else (t if index == four else p))
        green = top if (index == one or index == two) else (t if index == zero else (q if index == three else p))
        blue = (
            top if (index == three or index == four) else (t if index == two else (q if index == np.float32(5) else p))
        )
        planes[0, i], planes[1, i], planes[2, i] = np.uint8(red), np.uint8(green), np.uint8(blue)


@njit(cache=True)
def box_blur(source: Bytes, target: Bytes, total: NDArray[np.uint32], radius: float) -> None:
    """One pass down the columns of source [rows, columns] with a box of fractional radius, edges repeated (Pillow, BoxBlur.c)."""
    rows, columns = source.shape
    whole = int(radius)
    inner = np.uint32((1 << 24) / (np.float32(radius) * np.float32(2) + np.float32(1)))
    outer = np.uint32(((1 << 24) - (whole * 2 + 1) * np.int64(inner)) // 2)
    for y in range(rows):
        line = source[y]
        for x in range(columns):
            total[x] = line[x]
        for d in range(1, whole + 1):
            above, below = source[max(y - d, 0)], source[min(y + d, rows - 1)]
            for x in range(columns):
                total[x] += np.uint32(above[x]) + np.uint32(below[x])
        above, below = source[max(y - whole - 1, 0)], source[min(y + whole + 1, rows - 1)]
        out = target[y]
        for x in range(columns):
            far = np.uint32(np.uint32(above[x]) + np.uint32(below[x]))
            out[x] = np.uint32(np.uint32(total[x] * inner) + np.uint32(far * outer) + np.uint32(1 << 23)) >> 24


@njit(cache=True)
def blur(planes: Bytes, sigma: float, size: int) -> Bytes:
    """ImageFilter.GaussianBlur: three box blurs each way (Gwosdek et al. 2011)."""
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = math.sqrt(12.0 * variance + 1.0)
    whole = math.floor((length - 1.0) / 2.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = np.float32(whole + part)
    total = np.empty(size, np.uint32)
    one, two = np.empty((size, size), np.uint8), np.empty((size, size), np.uint8)
    for c in range(3):
        plane = planes[c].reshape(size, size)
        one[:] = plane.T
        box_blur(one, two, total, radius)
        box_blur(two, one, total, radius)
        box_blur(one, two, total, radius)
        plane[:] = two.T
        box_blur(plane, two, total, radius)
        box_blur(two, one, total, radius)
        box_blur(one, plane, total, radius)
    return planes


@njit(cache=True, nogil=True)
def render(
    out: Floats, image: Bytes, row: Floats, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """Writes the view `row` (views.COLUMNS) of image uint8 [H, W, 3] to out float32 [S, S, 3], normalised."""
    size = out.shape[0]
    planes = resize(image, row, size).reshape(3, size * size)
    if row[GREY_BEFORE] > 0:
        grey(planes)
    if row[ORDER] >= 0:
        for op in ORDER_TABLE[int(row[ORDER])]:
            if op == 0:
                brighten(planes, row[BRIGHTNESS])
            elif op == 1:
                contrast(planes, row[CONTRAST])
            elif op == 2:
                saturate(planes, row[SATURATION])
            else:
                turn_hue(planes, row[HUE])
    if row[GREY_AFTER] > 0:
        grey(planes)
    if row[BLUR] > 0:
        blur(planes, row[BLUR], size)
    scale_r, scale_g, scale_b = (
        np.float32(1 / (255 * std[0])), np.float32(1 / (255 * std[1])), np.float32(1 / (255 * std[2])),
    )  # fmt: skip
    base_r, base_g, base_b = np.float32(mean[0] / std[0]), np.float32(mean[1] / std[1]), np.float32(mean[2] / std[2])
    for y in range(size):
        line = out[y]
        red, green, blue = planes[0, y * size :], planes[1, y * size :], planes[2, y * size :]
        if row[FLIP] > 0:
            for x in range(size):
                line[x, 0] = np.float32(red[size - 1 - x]) * scale_r - base_r
                line[x, 1] = np.float32(green[size - 1 - x]) * scale_g - base_g
                line[x, 2] = np.float32(blue[size - 1 - x]) * scale_b - base_b
        else:
            for x in range(size):
                line[x, 0] = np.float32(red[x]) * scale_r - base_r
                line[x, 1] = np.float32(green[x]) * scale_g - base_g
                line[x, 2] = np.float32(blue[x]) * scale_b - base_b
