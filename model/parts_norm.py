"""Batch norm with statistics of its own for each part of a batch, forwards and backwards, written into one output.

`PartsNorm` has three ways to compute it, whose `forward` and `backward` take the same arguments: the library's batch
norm part by part, here, on any device; Triton kernels for all parts at once on a GPU (parts_norm_gpu.py); and plain
operations under torch.compile (parts_norm_compiled.py).
"""

import sys
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import parts_norm_compiled


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, *,
    groups: int, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, like x, and mean and inverse deviation of each part, [groups, C]. Moves the running statistics."""
    # The library keeps them in the parameters' dtype on a CPU, and in no less than fp32 on a GPU.
    own_dtype = next((t.dtype for t in (weight, running_mean) if t is not None), x.dtype)
    kept = own_dtype if x.is_cpu else torch.promote_types(x.dtype, torch.float32)
    out, (mean, invstd) = torch.empty_like(x), x.new_empty((2, groups, x.shape[1]), dtype=kept)
    share = momentum / groups
    places = zip(x.chunk(groups), out.chunk(groups), mean.unbind(), invstd.unbind())
    for i, (part, *place) in enumerate(places):
        # Chosen so that after all parts: running = (1 - momentum) * running + momentum * mean over parts.
        own = share / (1 - (groups - 1 - i) * share)
        torch.native_batch_norm(part, weight, bias, running_mean, running_var, True, own, eps, out=place)
    return out, mean, invstd


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, *, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias."""
    groups, affine = mean.shape[0], weight is not None
    parts = zip(gradient.chunk(groups), x.chunk(groups), mean.unbind(), invstd.unbind())
    found = [
        torch.ops.aten.native_batch_norm_backward.default(
            rows, part, weight, None, None, middle, inverse, True, eps, [True, affine, affine]
        )
        for rows, part, middle, inverse in parts
    ]
    of_x, of_weight, of_bias = zip(*found)  # that operator takes no place to write to
    if not affine:
        return torch.cat(of_x), None, None
    return torch.cat(of_x), torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0)


def way(x: Tensor, weight: Tensor | None, running_mean: Tensor | None) -> ModuleType:
    """The module whose `forward` and `backward` compute it."""
    if torch.compiler.is_compiling():
        return parts_norm_compiled
    if x.is_cuda and weight is not None and running_mean is not None:
        from model import parts_norm_gpu  # Triton is not installed everywhere

        if parts_norm_gpu.fits(x):
            return parts_norm_gpu
    return sys.modules[__name__]


class PartsNorm(torch.autograd.Function):
    """`PartsNorm.apply(x, weight, bias, running_mean, running_var, groups, momentum, eps)`: the output.

    x is [N, C, ...] in `groups` equal, contiguous parts. Kept for the gradient: x, each part's mean and its deviation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, groups: int, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.way, ctx.eps = way(x, weight, running_mean), eps
        out, mean, invstd = ctx.way.forward(
            x, weight, bias, running_mean, running_var, groups=groups, momentum=momentum, eps=eps
        )
        ctx.save_for_backward(x, weight, mean, invstd)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.way.backward(gradient, *ctx.saved_tensors, eps=ctx.eps)
        return *found, None, None, None, None, None
