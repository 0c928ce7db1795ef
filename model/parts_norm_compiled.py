"""Split batch norm in plain operations, for torch.compile, which fuses them with what stands before and after.

Statistics see the batch as [groups, n, C, ...]. All else is done on the batch as it is, each group's numbers spread
over its images, so that no layout changes. The gradient is written out: what autograd makes of `forward` goes over the
batch twice as often. Not compiled, either would be slow.
"""

import torch
from torch import Tensor


def _over_groups(x: Tensor, groups: int) -> tuple[Tensor, list[int]]:
    """[groups, n, C, ...], and the dimensions that a group's statistics go over."""
    return x.unflatten(0, (groups, -1)), [1, *range(3, x.dim() + 1)]


def _spread(numbers: Tensor, x: Tensor) -> Tensor:
    """[groups, C] to [N, C, 1, ...], each image with those of its group."""
    spread = numbers[:, None].expand(-1, x.shape[0] // numbers.shape[0], -1).flatten(0, 1)
    return spread.view(*spread.shape, *[1] * (x.dim() - 2))


def _channels(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (x.dim() - 2))


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, *,
    groups: int, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As parts_norm.forward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts, dims = _over_groups(wide, groups)
    var, mean = torch.var_mean(parts, dim=dims, correction=0)  # [groups, C]
    if running_mean is not None and running_var is not None:
        count = x.numel() // (groups * x.shape[1])
        running_mean.lerp_(mean.mean(dim=0), momentum)
        running_var.lerp_(var.mean(dim=0) * (count / (count - 1)), momentum)
    invstd = (var + eps).rsqrt()
    out = (wide - _spread(mean, x)) * _spread(invstd, x)
    if weight is not None and bias is not None:
        out = out * _channels(weight, x) + _channels(bias, x)
    return out.to(x.dtype), mean, invstd


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, *, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As parts_norm.backward."""
    groups, count = mean.shape[0], x.numel() // mean.numel()
    wide, away = gradient.to(mean.dtype), x.to(mean.dtype) - _spread(mean, x)
    parts, dims = _over_groups(wide, groups)
    total = parts.sum(dims)
    product = _over_groups(wide * away, groups)[0].sum(dims) * invstd
    of_x = (wide - _spread(total / count, x) - away * _spread(product * invstd / count, x)) * _spread(invstd, x)
    if weight is None:
        return of_x.to(x.dtype), None, None
    of_x = of_x * _channels(weight, x)
    return of_x.to(x.dtype), product.sum(0).to(weight.dtype), total.sum(0).to(weight.dtype)
