"""Split batch norm on a GPU, forwards and backwards, in three Triton kernels each whatever the number of groups.

The rows of a group are the pixels of its images, [groups, rows, C] in channels-last memory. Forwards: mean and variance
of chunks of rows; those of the groups from them, and the running statistics; the output. Backwards likewise: the two
sums of chunks; those of the groups, and the gradients of weight and bias; the gradient of the input. All arithmetic is
fp32, whatever the input. How rows fall into chunks follows from the shape alone and no kernel adds atomically, so the
same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's functions take and give tensors and pointers of its own language, which have no types in Python's.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, BLOCK = 32, 64  # rows and channels that a program holds at a time: 128 bytes of a row in 16 bits
REPEAT = 4  # tiles of rows that a program of the elementwise kernels goes through
NARROW = 16  # channels of a program that puts chunks together: few, for there are few chunks
CHUNKS = 64  # of a group at most: enough programs to fill a GPU, few enough to be put together by one
SHORTEST = 256  # rows of a chunk: below that, putting chunks together would cost as much as they do
COUNTS = ["chunks", "groups", "blocks"]  # not worth a compilation for 1, one for multiples of 16 and one for others
FUSION = {"enable_fp_fusion": True}  # Triton 3.9 warns when it is left unset


@triton.jit
def moments_kernel(x, means, squares, rows, channels, chunk, tile: tl.constexpr, block: tl.constexpr):
    """Mean, and sum of squares about it, of each chunk of rows: [groups, rows, C] to [groups, chunks, C].

    Welford's update in every place of the tile by itself, then one merge of the places: nothing cancels.
    """
    at = tl.program_id(0) * block + tl.arange(0, block)
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, rows)
    x += tl.program_id(2).to(tl.int64) * rows * channels
    place = tl.arange(0, tile)
    mean = tl.zeros([tile, block], tl.float32)
    square = tl.zeros([tile, block], tl.float32)
    count = 0.0
    for start in range(first, end, tile):
        row = start + place
        mask = (row < end)[:, None] & (at < channels)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels + at[None, :], mask, 0).to(tl.float32)
        count += 1.0
        away = tl.where(mask, value - mean, 0.0)
        mean += away * (1.0 / count)
        square += away * (value - mean)
    share = ((end - first - place + tile - 1) // tile).to(tl.float32)[:, None] / (end - first)  # of a place, in rows
    middle = tl.sum(mean * share, 0)
    away = mean - middle[None, :]
    square = tl.sum(square + away * away * share * (end - first), 0)
    out = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + at
    tl.store(means + out, middle, at < channels)
    tl.store(squares + out, square, at < channels)


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    means, squares, mean, invstd, running_mean, running_var, rows, channels, chunk, chunks, groups, momentum, eps,
    most: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Those of each group, [groups, C], from its chunks'; the running ones move to their mean over the groups."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    mask = at < channels
    part = tl.arange(0, most)
    within = (part < chunks)[:, None] & mask[None, :]
    count = tl.maximum(tl.minimum(rows - part * chunk, chunk), 0).to(tl.float32)[:, None]
    total_mean = tl.zeros([block], tl.float32)
    total_var = tl.zeros([block], tl.float32)
    for group in range(groups):
        place = (group * chunks + part)[:, None] * channels + at[None, :]
        middle = tl.load(means + place, within, 0)
        whole = tl.sum(middle * count, 0) / rows
        away = middle - whole[None, :]
        square = tl.sum(tl.load(squares + place, within, 0) + away * away * count, 0)
        tl.store(mean + group * channels + at, whole, mask)
        tl.store(invstd + group * channels + at, 1.0 / tl.sqrt(square / rows + eps), mask)
        total_mean += whole
        total_var += square / (rows - 1)
    old = tl.load(running_mean + at, mask, 0).to(tl.float32)
    tl.store(running_mean + at, old + momentum * (total_mean / groups - old), mask)
    old = tl.load(running_var + at, mask, 0).to(tl.float32)
    tl.store(running_var + at, old + momentum * (total_var / groups - old), mask)


@triton.jit(do_not_specialize=COUNTS)
def normalise_kernel(
    x, out, mean, invstd, weight, bias, rows, channels, blocks,
    tile: tl.constexpr, block: tl.constexpr, repeat: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) % blocks * block + tl.arange(0, block)
    own = tl.program_id(1) * channels + at
    mask = at < channels
    middle = tl.load(mean + own, mask, 0)[None, :]
    scale = (tl.load(invstd + own, mask, 0) * tl.load(weight + at, mask, 0).to(tl.float32))[None, :]
    shift = tl.load(bias + at, mask, 0).to(tl.float32)[None, :]
    first = tl.program_id(0) // blocks * (tile * repeat)
    begin = tl.program_id(1).to(tl.int64) * rows * channels
    for k in tl.static_range(repeat):
        row = first + k * tile + tl.arange(0, tile)
        within = (row < rows)[:, None] & mask[None, :]
        place = begin + row.to(tl.int64)[:, None] * channels + at[None, :]
        value = tl.load(x + place, within, 0).to(tl.float32)
        tl.store(out + place, ((value - middle) * scale + shift).to(out.dtype.element_ty), within)


@triton.jit
def sums_kernel(x, gradient, mean, sums, products, rows, channels, chunk, tile: tl.constexpr, block: tl.constexpr):
    """The sum of the gradient, and of its product with x - mean, of each chunk of rows: to [groups, chunks, C]."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, rows)
    begin = tl.program_id(2).to(tl.int64) * rows * channels
    middle = tl.load(mean + tl.program_id(2) * channels + at, at < channels, 0)[None, :]
    total = tl.zeros([tile, block], tl.float32)
    product = tl.zeros([tile, block], tl.float32)
    for start in range(first, end, tile):
        row = start + tl.arange(0, tile)
        mask = (row < end)[:, None] & (at < channels)[None, :]
        place = begin + row.to(tl.int64)[:, None] * channels + at[None, :]
        value = tl.load(gradient + place, mask, 0).to(tl.float32)
        total += value
        product += value * (tl.load(x + place, mask, 0).to(tl.float32) - middle)
    out = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + at
    tl.store(sums + out, tl.sum(total, 0), at < channels)
    tl.store(products + out, tl.sum(product, 0), at < channels)


@triton.jit(do_not_specialize=COUNTS)
def gradients_kernel(
    sums, products, invstd, level, slope, weight_gradient, bias_gradient, rows, channels, chunks, groups,
    most: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias; a level and a slope along x, [groups, C], which gradient_kernel takes off."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    mask = at < channels
    part = tl.arange(0, most)
    within = (part < chunks)[:, None] & mask[None, :]
    of_weight = tl.zeros([block], tl.float32)
    of_bias = tl.zeros([block], tl.float32)
    for group in range(groups):
        place = (group * chunks + part)[:, None] * channels + at[None, :]
        own = group * channels + at
        total = tl.sum(tl.load(sums + place, within, 0), 0)
        inverse = tl.load(invstd + own, mask, 0)
        product = tl.sum(tl.load(products + place, within, 0), 0) * inverse
        tl.store(level + own, total / rows, mask)
        tl.store(slope + own, product * inverse / rows, mask)
        of_bias += total
        of_weight += product
    tl.store(weight_gradient + at, of_weight.to(weight_gradient.dtype.element_ty), mask)
    tl.store(bias_gradient + at, of_bias.to(bias_gradient.dtype.element_ty), mask)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    x, gradient, out, mean, invstd, weight, level, slope, rows, channels, blocks,
    tile: tl.constexpr, block: tl.constexpr, repeat: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) % blocks * block + tl.arange(0, block)
    own = tl.program_id(1) * channels + at
    mask = at < channels
    middle = tl.load(mean + own, mask, 0)[None, :]
    scale = (tl.load(invstd + own, mask, 0) * tl.load(weight + at, mask, 0).to(tl.float32))[None, :]
    flat = tl.load(level + own, mask, 0)[None, :]
    steep = tl.load(slope + own, mask, 0)[None, :]
    first = tl.program_id(0) // blocks * (tile * repeat)
    begin = tl.program_id(1).to(tl.int64) * rows * channels
    for k in tl.static_range(repeat):
        row = first + k * tile + tl.arange(0, tile)
        within = (row < rows)[:, None] & mask[None, :]
        place = begin + row.to(tl.int64)[:, None] * channels + at[None, :]
        away = tl.load(x + place, within, 0).to(tl.float32) - middle
        value = (tl.load(gradient + place, within, 0).to(tl.float32) - flat - away * steep) * scale
        tl.store(out + place, value.to(out.dtype.element_ty), within)


class Plan(NamedTuple):
    """How the rows of a batch and its channels fall to programs."""

    groups: int
    rows: int  # of a group
    channels: int
    chunk: int  # rows: a whole number of tiles
    chunks: int  # of a group, none of them empty
    block: int  # channels of a program
    blocks: int

    @property
    def by_chunk(self) -> tuple[int, int, int]:
        return self.blocks, self.chunks, self.groups

    @property
    def elementwise(self) -> tuple[int, int]:
        return self.blocks * triton.cdiv(self.rows, TILE * REPEAT), self.groups


def plan(x: Tensor, groups: int) -> Plan:
    channels = x.shape[1]
    rows = x.numel() // (groups * channels)
    chunk = max(TILE * triton.cdiv(triton.cdiv(rows, CHUNKS), TILE), SHORTEST)
    block = min(BLOCK, triton.next_power_of_2(channels))
    return Plan(groups, rows, channels, chunk, triton.cdiv(rows, chunk), block, triton.cdiv(channels, block))


def fits(x: Tensor) -> bool:
    """Whether the channels of a row lie side by side, [N, C] or channels-last, in a dtype that fp32 holds."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and (last or (x.dim() == 2 and x.is_contiguous()))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    groups: int, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, like x, and mean and inverse deviation of each group, fp32 [groups, C]. Moves the running ones."""
    p = plan(x, groups)
    out = torch.empty_like(x)
    means, squares = torch.empty((2, groups, p.chunks, p.channels), dtype=torch.float32, device=x.device)
    mean, invstd = torch.empty((2, groups, p.channels), dtype=torch.float32, device=x.device)
    moments_kernel[p.by_chunk](x, means, squares, p.rows, p.channels, p.chunk, TILE, p.block, **FUSION)
    statistics_kernel[(triton.cdiv(p.channels, NARROW),)](
        means, squares, mean, invstd, running_mean, running_var, p.rows, p.channels, p.chunk, p.chunks, groups,
        momentum, eps, CHUNKS, NARROW, **FUSION,
    )  # fmt: skip
    normalise_kernel[p.elementwise](
        x, out, mean, invstd, weight, bias, p.rows, p.channels, p.blocks, TILE, p.block, REPEAT, **FUSION
    )
    return out, mean, invstd


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    groups = mean.shape[0]
    p = plan(x, groups)
    if gradient.stride() != x.stride():
        gradient = torch.empty_like(x).copy_(gradient)
    out = torch.empty_like(x)
    sums, products = torch.empty((2, groups, p.chunks, p.channels), dtype=torch.float32, device=x.device)
    level, slope = torch.empty((2, groups, p.channels), dtype=torch.float32, device=x.device)
    of_weight, of_bias = torch.empty((2, p.channels), dtype=weight.dtype, device=x.device)
    sums_kernel[p.by_chunk](x, gradient, mean, sums, products, p.rows, p.channels, p.chunk, TILE, p.block, **FUSION)
    gradients_kernel[(triton.cdiv(p.channels, NARROW),)](
        sums, products, invstd, level, slope, of_weight, of_bias, p.rows, p.channels, p.chunks, groups,
        CHUNKS, NARROW, **FUSION,
    )  # fmt: skip
    gradient_kernel[p.elementwise](
        x, gradient, out, mean, invstd, weight, level, slope, p.rows, p.channels, p.blocks, TILE, p.block, REPEAT,
        **FUSION,
    )  # fmt: skip
    return out, of_weight, of_bias
