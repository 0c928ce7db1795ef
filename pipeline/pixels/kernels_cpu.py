"""One view of one image on the CPU: crop, resize, colour, blur, flip and normalise in one function, compiled by numba.

Pixels are those of torchvision's functional ops on PIL images: the integer weights, truncations and 8-bit HSV of
Pillow's C code are kept. Every inner loop runs over contiguous memory without a branch, so that LLVM vectorises it; the
horizontal filter works on transposed bytes for that reason.
"""

import functools
import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numpy.typing import NDArray
from nvidia.dali.plugin.numba import address_as_void_pointer  # type: ignore[attr-defined]

from pipeline.pixels import views

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Number = float | np.number[Any]
Int32s = NDArray[np.int32]
ORDERS = np.array(views.ORDERS, np.int64)
# numba's cache looks at this file alone: the columns it was compiled for stand here, a test compares.
COLUMNS = (
    "top", "left", "height", "width", "grid_height", "grid_width", "grid_top", "grid_left", "flip",
    "grey_before", "order", "brightness", "contrast", "saturation", "hue", "grey_after", "blur",
    "solarise",
)  # fmt: skip
WEIGHT_BITS = 22  # Pillow's fixed point
BLOCK = 256  # rows of a crop that are resized at a time: they stay in the cache, and memory is bounded


@njit(cache=True)
def triangle_weights(size: int, grid: int, start: int, count: int) -> tuple[NDArray[np.int64], Int32s]:
    """Antialiased bilinear weights of `size` pixels for outputs [start, start + count) of `grid` (Pillow: Resample.c).

    Returns the first pixel int64 [count] and the weights int32 [count, taps], of equal length, the unused ones 0.
    """
    scale = size / grid
    support = max(scale, 1.0)
    first = np.empty(count, np.int64)
    taps = 1
    for i in range(count):
        center = (start + i + 0.5) * scale
        taps = max(taps, min(int(center + support + 0.5), size) - max(int(center - support + 0.5), 0))
    taps = min(taps + taps % 2, size)
    weights = np.zeros((count, taps), np.int32)
    for i in range(count):
        center = (start + i + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), size)
        total = 0.0
        for x in range(low, high):
            total += max(1.0 - abs((x - center + 0.5) * (1.0 / support)), 0.0)
        # A row at the end starts earlier, so that all taps lie inside.
        first[i] = min(low, size - taps)
        for x in range(low, high):
            weight = max(1.0 - abs((x - center + 0.5) * (1.0 / support)), 0.0) / total
            weights[i, x - first[i]] = int(weight * (1 << WEIGHT_BITS) + 0.5)
    return first, weights


@njit(cache=True)
def to_byte(total: Number) -> Any:
    """A fixed-point sum as a byte. int32 must be said at every step: numba's sums are int64, which vectorise badly."""
    value = np.int32(total) >> WEIGHT_BITS
    return np.uint8(value if value < 255 else 255)


@njit(cache=True)
def weigh(source: Bytes, start: int, step: int, weights: Int32s, out: Bytes, total: Int32s) -> None:
    """out[i] = the weighted sum of source[start + i], source[start + step + i], ..., rounded and clamped."""
    n, taps = len(out), len(weights)
    half = np.int32(1 << (WEIGHT_BITS - 1))
    a, u = source[start : start + n], weights[0]
    if taps == 1:
        for i in range(n):
            out[i] = a[i]
        return
    b, v = source[start + step : start + step + n], weights[1]
    if taps == 2:
        for i in range(n):
            out[i] = to_byte(half + np.int32(a[i]) * u + np.int32(b[i]) * v)
        return
    for k in range(2, taps, 2):
        start += 2 * step
        c, w = source[start : start + n], weights[k]
        d, z = c, np.int32(0)
        if k + 1 < taps:
            d, z = source[start + step : start + step + n], weights[k + 1]
        if taps <= 4:
            for i in range(n):
                near = np.int32(half + np.int32(a[i]) * u + np.int32(b[i]) * v)
                out[i] = to_byte(near + np.int32(c[i]) * w + np.int32(d[i]) * z)
        elif k == 2:
            for i in range(n):
                near = np.int32(half + np.int32(a[i]) * u + np.int32(b[i]) * v)
                total[i] = np.int32(near + np.int32(c[i]) * w + np.int32(d[i]) * z)
        else:
            for i in range(n):
                total[i] = np.int32(total[i] + np.int32(c[i]) * w + np.int32(d[i]) * z)
    if taps > 4:
        for i in range(n):
            out[i] = to_byte(total[i])


@njit(cache=True)
def transpose(source: Bytes, target: Bytes) -> None:
    """source [8 * m, 8 * n] to target [8 * n, 8 * m], 8 x 8 bytes at a time in words (Warren, Hacker's Delight 7-3)."""
    rows, columns = source.shape[0] // 8, source.shape[1] // 8
    words, out = source.view(np.uint64), target.view(np.uint64)
    low32, low16, low8 = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    s32, s16, s8 = np.uint64(32), np.uint64(16), np.uint64(8)
    for j in range(rows):
        y = 8 * j
        for i in range(columns):
            a, b, c, d = words[y, i], words[y + 1, i], words[y + 2, i], words[y + 3, i]
            e, f, g, h = words[y + 4, i], words[y + 5, i], words[y + 6, i], words[y + 7, i]
            a, e = (a & low32) | (e << s32), (a >> s32) | (e & ~low32)
            b, f = (b & low32) | (f << s32), (b >> s32) | (f & ~low32)
            c, g = (c & low32) | (g << s32), (c >> s32) | (g & ~low32)
            d, h = (d & low32) | (h << s32), (d >> s32) | (h & ~low32)
            a, c = (a & low16) | ((c & low16) << s16), ((a >> s16) & low16) | (c & ~low16)
            b, d = (b & low16) | ((d & low16) << s16), ((b >> s16) & low16) | (d & ~low16)
            e, g = (e & low16) | ((g & low16) << s16), ((e >> s16) & low16) | (g & ~low16)
            f, h = (f & low16) | ((h & low16) << s16), ((f >> s16) & low16) | (h & ~low16)
            x = 8 * i
            out[x, j] = (a & low8) | ((b & low8) << s8)
            out[x + 1, j] = ((a >> s8) & low8) | (b & ~low8)
            out[x + 2, j] = (c & low8) | ((d & low8) << s8)
            out[x + 3, j] = ((c >> s8) & low8) | (d & ~low8)
            out[x + 4, j] = (e & low8) | ((f & low8) << s8)
            out[x + 5, j] = ((e >> s8) & low8) | (f & ~low8)
            out[x + 6, j] = (g & low8) | ((h & low8) << s8)
            out[x + 7, j] = ((g >> s8) & low8) | (h & ~low8)


@njit(cache=True)
def resize(image: Bytes, row: Floats, size: int) -> Bytes:
    """The view's window of its resized box, uint8 [3, size, size]: across, rounded, then down, in Pillow's order."""
    # Clamped: memory outside the image must not be read, whatever the sizes that the row was drawn for.
    top, left = min(int(row[views.TOP]), image.shape[0] - 1), min(int(row[views.LEFT]), image.shape[1] - 1)
    height, width = min(int(row[views.HEIGHT]), image.shape[0] - top), min(int(row[views.WIDTH]), image.shape[1] - left)
    first_x, weights_x = triangle_weights(width, int(row[views.GRID_WIDTH]), int(row[views.GRID_LEFT]), size)
    first_y, weights_y = triangle_weights(height, int(row[views.GRID_HEIGHT]), int(row[views.GRID_TOP]), size)
    top, rows = top + first_y[0], first_y[size - 1] + weights_y.shape[1] - first_y[0]
    left, columns = left + first_x[0], first_x[size - 1] + weights_x.shape[1] - first_x[0]
    columns8, size8 = (3 * columns + 7) // 8 * 8, (3 * size + 7) // 8 * 8

    pixels = image.reshape(-1)
    box = np.empty((BLOCK, columns8), np.uint8)
    standing = np.empty(columns8 * BLOCK, np.uint8)  # a line per column of the box, red, green and blue by turns
    narrow = np.empty(size8 * BLOCK, np.uint8)  # the same of the view: all red lines, all green ones, all blue ones
    lying = np.empty(((rows + 7) // 8 * 8, size8), np.uint8)
    line, total = np.empty(3 * max(BLOCK, size), np.uint8), np.empty(3 * max(BLOCK, size), np.int32)
    for y0 in range(0, rows, BLOCK):
        n = min(rows - y0, BLOCK)
        n8 = (n + 7) // 8 * 8
        for y in range(n):
            start = 3 * ((top + y0 + y) * image.shape[1] + left)
            copy(pixels[start : start + 3 * columns], box[y])
        transpose(box[:n8], standing[: columns8 * n8].reshape(columns8, n8))
        for x in range(size):
            weigh(standing, 3 * n8 * (first_x[x] - first_x[0]), 3 * n8, weights_x[x], line[: 3 * n8], total)
            for c in range(3):
                copy(line[c * n8 : (c + 1) * n8], narrow[(c * size + x) * n8 :])
        transpose(narrow[: size8 * n8].reshape(size8, n8), lying[y0 : y0 + n8])
    planes = np.empty((3, size, size), np.uint8)
    for y in range(size):
        weigh(lying.reshape(-1), size8 * (first_y[y] - first_y[0]), size8, weights_y[y], line[: 3 * size], total)
        for c in range(3):
            copy(line[c * size : (c + 1) * size], planes[c, y])
    return planes


@njit(cache=True)
def copy(source: Bytes, target: Bytes) -> None:
    """target[: len(source)] = source, ten times as fast as numba's slice assignment: LLVM makes a memcpy of it."""
    for i in range(len(source)):
        target[i] = source[i]


@njit(cache=True)
def luma(r: Number, g: Number, b: Number) -> Any:
    """ITU-R 601-2 luma of a pixel, in Pillow's fixed point."""
    return np.int32(np.int32(np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16)


@njit(cache=True)
def blend(low: Number, value: Number, factor: Number) -> Any:
    """Pillow's Image.blend of one byte: towards `low` or away from it, clamped and truncated."""
    mixed = np.float32(low) + np.float32(factor) * (np.float32(value) - np.float32(low))
    mixed = mixed if mixed > np.float32(0) else np.float32(0)
    return np.uint8(mixed if mixed < np.float32(255) else np.float32(255))


@njit(cache=True)
def grey(planes: Bytes) -> None:
    r, g, b = planes
    for i in range(len(r)):
        r[i] = g[i] = b[i] = luma(r[i], g[i], b[i])


@njit(cache=True)
def brighten(planes: Bytes, factor: float) -> None:
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = blend(0, plane[i], factor)


@njit(cache=True)
def contrast(planes: Bytes, factor: float) -> None:
    """About the image's own grey mean, rounded (ImageEnhance.Contrast)."""
    r, g, b = planes
    total = 0
    for i in range(len(r)):
        total += luma(r[i], g[i], b[i])
    mean = int(total / len(r) + 0.5)
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = blend(mean, plane[i], factor)


@njit(cache=True)
def saturate(planes: Bytes, factor: float) -> None:
    r, g, b = planes
    for i in range(len(r)):
        value = luma(r[i], g[i], b[i])
        r[i], g[i], b[i] = blend(value, r[i], factor), blend(value, g[i], factor), blend(value, b[i], factor)


@njit(cache=True)
def turn_hue(planes: Bytes, hue: float) -> None:
    """By `hue` of a full turn, in 8-bit HSV (torchvision's adjust_hue on PIL images; Pillow, Convert.c)."""
    shift = np.float32(int(np.float64(hue) * 255) % 256)
    zero, half, one, two, six = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2), np.float32(6)
    full = np.float32(255)
    reds, greens, blues = planes
    for i in range(len(reds)):
        r, g, b = np.float32(reds[i]), np.float32(greens[i]), np.float32(blues[i])
        top = r if r > g else g
        top = top if top > b else b
        low = r if r < g else g
        low = low if low < b else b
        chroma = top - low
        safe = chroma if chroma > one else one
        rc, gc, bc = (top - r) / safe, (top - g) / safe, (top - b) / safe
        h = two + rc - bc if g == top else np.float32(4) + gc - rc
        h = bc - gc if r == top else h
        h = h / six
        h = h + one if h < zero else h
        h = np.floor(h * full) + shift
        h = h - np.float32(256) if h > full else h
        s = np.floor(chroma / (top if top > one else one) * full) / full
        # Back: each channel is top minus a trapezium of the hue (as colorsys, without its cases).
        sector = h * six / full
        sector = sector - six if sector >= six else sector
        for channel in range(3):
            turn = sector + (np.float32(5), np.float32(3), one)[channel]
            turn = turn - six if turn >= six else turn
            fall = turn if turn < np.float32(4) - turn else np.float32(4) - turn
            fall = fall if fall < one else one
            fall = fall if fall > zero else zero
            value = np.uint8(np.floor(top * (one - s * fall) + half))
            if channel == 0:
                reds[i] = value
            elif channel == 1:
                greens[i] = value
            else:
                blues[i] = value


@njit(cache=True)
def box_blur(source: Bytes, out: Bytes, step: int, whole: int, inner: np.uint32, outer: np.uint32) -> None:
    """A box blur along flat memory, neighbours `step` apart: `whole` on either side count in full, the next in part."""
    n = len(source) - 2 * (whole + 1) * step
    half = np.uint32(1 << 23)
    out = out[(whole + 1) * step :]
    a, b, c, e = source, source[step:], source[2 * step :], source[-n:]
    if whole == 0:
        for i in range(n):
            far = np.uint32(np.uint32(a[i]) + np.uint32(c[i]))
            out[i] = np.uint32(np.uint32(np.uint32(b[i]) * inner) + np.uint32(far * outer) + half) >> 24
    elif whole == 1:
        d = source[3 * step :]
        for i in range(n):
            near = np.uint32(np.uint32(b[i]) + np.uint32(c[i]) + np.uint32(d[i]))
            far = np.uint32(np.uint32(a[i]) + np.uint32(e[i]))
            out[i] = np.uint32(np.uint32(near * inner) + np.uint32(far * outer) + half) >> 24
    else:  # a sigma above 2.4, which no recipe has
        for i in range(n):
            near = np.uint32(0)
            for k in range(1, 2 * whole + 2):
                near = np.uint32(near + np.uint32(source[i + k * step]))
            far = np.uint32(np.uint32(a[i]) + np.uint32(e[i]))
            out[i] = np.uint32(np.uint32(near * inner) + np.uint32(far * outer) + half) >> 24


@njit(cache=True)
def blur(planes: Bytes, sigma: float) -> None:
    """ImageFilter.GaussianBlur: three fractional box blurs each way (Gwosdek et al. 2011; Pillow, BoxBlur.c)."""
    size = planes.shape[1]
    # In single precision throughout, as there: the weights' last bits decide how ties are rounded.
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = np.float32(sigma) * np.float32(sigma) / three
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = int((length - one) / two)
    low, high = np.float32(whole), np.float32(whole + 1)
    part = (two * low + one) * (low * high - three * variance) / (six * (variance - high * high))
    inner = np.uint32(np.float32(1 << 24) / ((low + part) * two + one))
    outer = np.uint32(((1 << 24) - (whole * 2 + 1) * np.int64(inner)) // 2)
    # Edges repeat: they are written into a margin after every pass.
    reach = whole + 1
    end = reach + size
    a = np.zeros((size + 2 * reach, size + 2 * reach), np.uint8)
    b = np.zeros_like(a)
    for c in range(3):
        for y in range(size):
            copy(planes[c, y], a[reach + y, reach:])
        for _ in range(3):
            for y in range(reach, end):
                for i in range(reach):
                    a[y, i], a[y, end + i] = a[y, reach], a[y, end - 1]
            box_blur(a.reshape(-1), b.reshape(-1), 1, whole, inner, outer)
            a, b = b, a
        for _ in range(3):
            for y in range(reach):
                copy(a[reach], a[y])
                copy(a[end - 1], a[end + y])
            box_blur(a.reshape(-1), b.reshape(-1), len(a), whole, inner, outer)
            a, b = b, a
        for y in range(size):
            copy(a[reach + y, reach:end], planes[c, y])


@njit(cache=True)
def solarise(planes: Bytes, threshold: Number) -> None:
    """Levels from `threshold` on are inverted (ImageOps.solarize)."""
    least = np.uint8(threshold)
    for plane in planes:
        for i in range(len(plane)):
            plane[i] = np.uint8(255) - plane[i] if plane[i] >= least else plane[i]


@njit(cache=True)
def normalise(out: Floats, planes: Bytes, flip: bool, norm: Floats) -> None:
    """planes uint8 [3, S, S], mirrored or not, to out float32 [S, S, 3]: (pixel / 255 - mean) / std."""
    size = len(out)
    step = -1 if flip else 1
    scale, base = np.float32(1) / (np.float32(255) * norm[1]), norm[0] / norm[1]
    scale_r, scale_g, scale_b = scale
    base_r, base_g, base_b = base
    for y in range(size):
        line, r, g, b = out[y], planes[0, y][::step], planes[1, y][::step], planes[2, y][::step]
        for x in range(size):
            line[x, 0] = np.float32(r[x]) * scale_r - base_r
            line[x, 1] = np.float32(g[x]) * scale_g - base_g
            line[x, 2] = np.float32(b[x]) * scale_b - base_b


@njit(cache=True, nogil=True)
def render(out: Floats, image: Bytes, row: Floats, norm: Floats) -> None:
    """The view `row` (views.COLUMNS) of image uint8 [H, W, 3] to out float32 [S, S, 3]; norm: mean and std [2, 3]."""
    size = out.shape[0]
    planes = resize(image, row, size).reshape(3, size * size)
    if row[views.GREY_BEFORE] > 0:
        grey(planes)
    if row[views.ORDER] >= 0:
        for op in ORDERS[int(row[views.ORDER])]:
            if op == 0:
                brighten(planes, row[views.BRIGHTNESS])
            elif op == 1:
                contrast(planes, row[views.CONTRAST])
            elif op == 2:
                saturate(planes, row[views.SATURATION])
            elif row[views.HUE] != 0:  # through HSV and back colours change, so no shift is no op, as in ColorJitter
                turn_hue(planes, row[views.HUE])
    if row[views.GREY_AFTER] > 0:
        grey(planes)
    if row[views.BLUR] > 0:
        blur(planes.reshape(3, size, size), row[views.BLUR])
    if row[views.SOLARISE] > 0:
        solarise(planes, row[views.SOLARISE])
    normalise(out, planes.reshape(3, size, size), row[views.FLIP] > 0, norm)


# What DALI's numba operator calls, once per sample, in its own threads: addresses of arrays of the outputs' and inputs'
# data, shapes and numbers of dimensions, and their count. DALI's Python side would make such a function of `render`
# too, but compile it anew in every process and for every view, 8 s each; this one comes from numba's cache on disk.
@cfunc(types.void(*3 * [types.uint64], types.int32, *3 * [types.uint64], types.int32), nopython=True, cache=True)
def render_sample(outs, out_shapes, out_ndims, num_outs, ins, in_shapes, in_ndims, num_ins):  # type: ignore[no-untyped-def]
    out_data = carray(address_as_void_pointer(outs), 1, np.int64)
    in_data = carray(address_as_void_pointer(ins), 3, np.int64)
    out_shape_addresses = carray(address_as_void_pointer(out_shapes), 1, np.int64)
    in_shape_addresses = carray(address_as_void_pointer(in_shapes), 3, np.int64)
    out_shape = carray(address_as_void_pointer(out_shape_addresses[0]), 3, np.int64)
    in_shape = carray(address_as_void_pointer(in_shape_addresses[0]), 3, np.int64)
    out = carray(address_as_void_pointer(out_data[0]), (out_shape[0], out_shape[1], 3), np.float32)
    image = carray(address_as_void_pointer(in_data[0]), (in_shape[0], in_shape[1], 3), np.uint8)
    row = carray(address_as_void_pointer(in_data[1]), len(views.COLUMNS), np.float32)
    norm = carray(address_as_void_pointer(in_data[2]), (2, 3), np.float32)
    render(out, image, row, norm)


@functools.cache
def shape_setter(image_size: int) -> Any:
    """What DALI's numba operator calls once a batch to learn the outputs' shapes: [image_size, image_size, 3] each."""

    @cfunc(
        types.void(*2 * [types.uint64], types.int32, *2 * [types.uint64], *2 * [types.int32]), nopython=True, cache=True
    )
    def set_shapes(out_shapes, out_ndims, num_outs, in_shapes, in_ndims, num_ins, samples):  # type: ignore[no-untyped-def]
        addresses = carray(address_as_void_pointer(out_shapes), samples, np.int64)
        for i in range(samples):
            shape = carray(address_as_void_pointer(addresses[i]), 3, np.int64)
            shape[0], shape[1], shape[2] = image_size, image_size, 3

    return set_shapes
