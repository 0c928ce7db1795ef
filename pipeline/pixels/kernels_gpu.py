"""The colours of a batch of views on the GPU: what kernels_cpu.py does after the crop, in four Triton kernels.

DALI decodes, crops, resizes and mirrors on the GPU (graph.py); here follow, for all views of a batch at once: the grey
mean that contrast needs, the colour ops in their order, the blur across, the blur down with solarising and the
normalisation. The arithmetic is that of kernels_cpu.py, rounding by rounding, but for the blur: three boxes in one sum
of 13 taps each way, rounded once. Views without a blur leave the third kernel at once. Nothing is copied to the host,
nothing waits.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's functions take and give tensors and pointers of its own language, which have no types in Python's.

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pipeline.pixels import views

BLOCK = 1024
TAPS = 13  # three boxes of up to five taps: sigma up to 2.4, the most that a view recipe may have
# The columns' numbers and the orders, as Triton wants its constants.
GREY_BEFORE, ORDER, GREY_AFTER = (
    tl.constexpr(views.GREY_BEFORE),
    tl.constexpr(views.ORDER),
    tl.constexpr(views.GREY_AFTER),
)
BRIGHTNESS, CONTRAST = tl.constexpr(views.BRIGHTNESS), tl.constexpr(views.CONTRAST)
SATURATION, HUE = tl.constexpr(views.SATURATION), tl.constexpr(views.HUE)
BLUR, SOLARISE = tl.constexpr(views.BLUR), tl.constexpr(views.SOLARISE)
WEIGHTS = tl.constexpr(len(views.COLUMNS))  # where a row's blur weights begin
COLUMNS = tl.constexpr(len(views.COLUMNS) + TAPS)


@triton.jit
def luma(r, g, b):
    """ITU-R 601-2 luma in Pillow's fixed point, of whole numbers in float32, as such a number."""
    fixed = r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471 + 0x8000
    return (fixed >> 16).to(tl.float32)


@triton.jit
def blend(low, value, factor):
    return tl.floor(tl.minimum(tl.maximum(low + factor * (value - low), 0.0), 255.0))


@triton.jit
def channel(top, s, sector, offset):
    """top minus a trapezium of the hue: HSV to one channel of RGB."""
    turn = sector + offset
    turn = tl.where(turn >= 6.0, turn - 6.0, turn)
    fall = tl.minimum(tl.maximum(tl.minimum(turn, 4.0 - turn), 0.0), 1.0)
    return tl.floor(top * (1.0 - s * fall) + 0.5)


@triton.jit
def turn_hue(r, g, b, hue):
    """By `hue` of a full turn, in 8-bit HSV."""
    shift = (hue * 255).to(tl.int32)
    shift = tl.where(shift < 0, shift + 256, shift).to(tl.float32)
    top, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    chroma = top - low
    safe = tl.maximum(chroma, 1.0)
    rc, gc, bc = tl.div_rn(top - r, safe), tl.div_rn(top - g, safe), tl.div_rn(top - b, safe)
    h = tl.where(r == top, bc - gc, tl.where(g == top, 2.0 + rc - bc, 4.0 + gc - rc))
    h = tl.div_rn(h, tl.full(h.shape, 6.0, tl.float32))
    h = tl.where(h < 0, h + 1.0, h)
    h = tl.floor(h * 255.0) + shift
    h = tl.where(h > 255.0, h - 256.0, h)
    full = tl.full(h.shape, 255.0, tl.float32)
    s = tl.div_rn(tl.floor(tl.div_rn(chroma, tl.maximum(top, 1.0)) * 255.0), full)
    sector = tl.div_rn(h * 6.0, full)
    sector = tl.where(sector >= 6.0, sector - 6.0, sector)
    return channel(top, s, sector, 5.0), channel(top, s, sector, 3.0), channel(top, s, sector, 1.0)


@triton.jit
def colour(r, g, b, row, orders, mean, until_contrast: tl.constexpr):
    """The colour ops of the view `row` on whole numbers in float32; with until_contrast, those before the contrast."""
    if tl.load(row + GREY_BEFORE) > 0:
        value = luma(r, g, b)
        r, g, b = value, value, value
    order = tl.load(row + ORDER).to(tl.int32)
    if order >= 0:
        going = True
        for k in tl.static_range(4):
            op = tl.load(orders + order * 4 + k)
            if until_contrast:
                going = going & (op != 1)
            if going:
                if op == 0:
                    factor = tl.load(row + BRIGHTNESS)
                    r, g, b = blend(0.0, r, factor), blend(0.0, g, factor), blend(0.0, b, factor)
                elif op == 1:
                    factor = tl.load(row + CONTRAST)
                    r, g, b = blend(mean, r, factor), blend(mean, g, factor), blend(mean, b, factor)
                elif op == 2:
                    factor = tl.load(row + SATURATION)
                    value = luma(r, g, b)
                    r, g, b = blend(value, r, factor), blend(value, g, factor), blend(value, b, factor)
                else:
                    hue = tl.load(row + HUE)
                    if hue != 0:
                        r, g, b = turn_hue(r, g, b, hue)
    if not until_contrast:  # noqa: SIM102 (a constant of the compiler and a value of the device)
        if tl.load(row + GREY_AFTER) > 0:
            value = luma(r, g, b)
            r, g, b = value, value, value
    return r, g, b


@triton.jit
def sum_kernel(pixels, rows, orders, sums, count, block: tl.constexpr):
    """Adds each view's luma, as it is when its contrast comes, to sums int32 [n]."""
    view = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    row = rows + view * COLUMNS
    if tl.load(row + ORDER) >= 0:
        mask = at < count
        source = pixels + view.to(tl.int64) * count * 3 + at * 3
        r = tl.load(source, mask, 0).to(tl.float32)
        g = tl.load(source + 1, mask, 0).to(tl.float32)
        b = tl.load(source + 2, mask, 0).to(tl.float32)
        r, g, b = colour(r, g, b, row, orders, 0.0, True)
        value = tl.where(mask, luma(r, g, b), 0.0).to(tl.int32)
        tl.atomic_add(sums + view, tl.sum(value, 0))


@triton.jit
def colour_kernel(pixels, rows, orders, sums, count, block: tl.constexpr):
    """The colour ops, in place on uint8 [n, count, 3]."""
    view = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    row = rows + view * COLUMNS
    mask = at < count
    source = pixels + view.to(tl.int64) * count * 3 + at * 3
    r = tl.load(source, mask, 0).to(tl.float32)
    g = tl.load(source + 1, mask, 0).to(tl.float32)
    b = tl.load(source + 2, mask, 0).to(tl.float32)
    mean = tl.floor(tl.load(sums + view).to(tl.float32) / count + 0.5)
    r, g, b = colour(r, g, b, row, orders, mean, False)
    tl.store(source, r.to(tl.uint8), mask)
    tl.store(source + 1, g.to(tl.uint8), mask)
    tl.store(source + 2, b.to(tl.uint8), mask)


@triton.jit
def blur_kernel(pixels, rows, blurred, size, taps: tl.constexpr, block: tl.constexpr):
    """Blurs across, the views that are to be blurred: uint8 to float32, both [n, size, size, 3]."""
    view, y = tl.program_id(0), tl.program_id(1)
    row = rows + view * COLUMNS
    if tl.load(row + BLUR) > 0:
        i = tl.arange(0, block)
        mask = i < size * 3
        line = (view.to(tl.int64) * size + y) * size * 3
        total = tl.zeros([block], tl.float32)
        for k in tl.static_range(taps):
            x = tl.minimum(tl.maximum(i // 3 + (k - taps // 2), 0), size - 1)
            value = tl.load(pixels + line + x * 3 + i % 3, mask, 0).to(tl.float32)
            total += tl.load(row + WEIGHTS + k) * value
        tl.store(blurred + line + i, total, mask)


@triton.jit
def finish_kernel(pixels, rows, blurred, scale, base, out, size, taps: tl.constexpr, block: tl.constexpr):
    """Blurs down the views that are to be blurred, solarises and normalises: to out [n, size, size, 3] in its dtype."""
    view, y = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, block)
    mask = i < size * 3
    image = view.to(tl.int64) * size * size * 3
    row = rows + view * COLUMNS
    value = tl.zeros([block], tl.float32)
    if tl.load(row + BLUR) > 0:
        for k in tl.static_range(taps):
            source = tl.minimum(tl.maximum(y + (k - taps // 2), 0), size - 1)
            line = tl.load(blurred + image + source * size * 3 + i, mask, 0)
            value += tl.load(row + WEIGHTS + k) * line
        value = tl.floor(value + 0.5)
    else:
        value = tl.load(pixels + image + y * size * 3 + i, mask, 0).to(tl.float32)
    threshold = tl.load(row + SOLARISE)
    if threshold > 0:
        value = tl.where(value >= threshold, 255.0 - value, value)
    value = value * tl.load(scale + i % 3) - tl.load(base + i % 3)
    tl.store(out + image + y * size * 3 + i, value.to(out.dtype.element_ty), mask)


def with_blur_weights(rows: views.Views) -> views.Views:
    """The parameters of n views, each followed by the 13 taps of its blur: [n, P] to [n, P + 13].

    Three boxes of fractional radius, one after the other, as one filter.
    """
    sigma = rows[:, views.BLUR]
    variance = sigma * sigma / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    next_one = whole + 1
    part = (2 * whole + 1) * (whole * next_one - 3 * variance) / (6 * (variance - next_one * next_one))
    inner = 1 / (2 * (whole + part) + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    distance = np.abs(np.arange(-2, 3))
    box = np.where(distance <= whole[:, None], inner[:, None], np.float32(0))
    box = np.where(distance == next_one[:, None], outer[:, None], box)  # [n, 5]
    # Convolutions of filters so short are sums of shifted products.
    taps = box
    for _ in range(2):
        width = taps.shape[1]
        wider = np.zeros((len(rows), width + 4), np.float32)
        for k in range(5):
            wider[:, k : k + width] += box[:, k, None] * taps
        taps = wider
    return np.concatenate([rows, taps], axis=1)


class Finish:
    """Colours, blurs and normalises uint8 views; one per pipeline, for its constants on the device."""

    def __init__(self, mean: views.Triple, std: views.Triple, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype = dtype
        self.scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
        self.base = torch.tensor([m / s for m, s in zip(mean, std)], dtype=torch.float32, device=device)
        self.orders = torch.tensor(np.array(views.ORDERS, np.int32), device=device)

    def __call__(self, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """pixels uint8 [n, S, S, 3], overwritten, and rows float32 [n, P + 13] to [n, 3, S, S], channels-last."""
        n, size = len(pixels), pixels.shape[1]
        sums = torch.zeros(n, dtype=torch.int32, device=pixels.device)
        blurred = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        out = torch.empty(pixels.shape, dtype=self.dtype, device=pixels.device)
        blocks, line = (n, triton.cdiv(size * size, BLOCK)), triton.next_power_of_2(size * 3)
        # Without fused multiply-adds: every op is rounded, and a byte is cut off after it, as on the CPU.
        exact: dict[str, Any] = {"enable_fp_fusion": False}
        sum_kernel[blocks](pixels, rows, self.orders, sums, size * size, BLOCK, **exact)
        colour_kernel[blocks](pixels, rows, self.orders, sums, size * size, BLOCK, **exact)
        blur_kernel[(n, size)](pixels, rows, blurred, size, TAPS, line, **exact)
        finish_kernel[(n, size)](pixels, rows, blurred, self.scale, self.base, out, size, TAPS, line, **exact)
        return out.permute(0, 3, 1, 2)
