"""Batch norm whose statistics are those of all ranks' batches together, as the paper's detectors have it (section 4.2).

torch's own SyncBatchNorm takes CUDA tensors alone, and the reference trains its detectors with a plain one too
(Detectron2's naiveSyncBN). This one gathers each rank's mean, variance and count, which works under gloo and NCCL.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.batchnorm import constructor_arguments
from model.ranks import GatherWithGradient, rank_and_world


class SyncedBatchNorm(_BatchNorm):
    """A BatchNorm2d over the batches of all ranks, whose sizes may differ; on one rank it is that BatchNorm2d.

    The state dict is that of BatchNorm2d. All ranks go through it in training alike, or the others hang.
    """

    def __init__(self, original: _BatchNorm) -> None:
        super().__init__(**constructor_arguments(original))
        self.load_state_dict(original.state_dict())
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or rank_and_world()[1] == 1:
            return super().forward(input)
        x = input.float()  # [n, C, ...]; statistics are fp32 whatever the precision
        others, channels = [0, *range(2, x.dim())], x.shape[1]
        count = x.numel() // channels
        mean = x.sum(others) / max(count, 1)  # not x.mean(), which is NaN for a rank without any
        middle = mean.view(-1, *[1] * (x.dim() - 2))
        var = (x - middle).square().sum(others) / max(count, 1)
        own = torch.cat([mean, var, mean.new_full((1,), count)])
        table = GatherWithGradient.apply(own[None], None)  # [ranks, 2 * C + 1]
        means, variances, counts = table.split([channels, channels, 1], dim=1)
        total = counts.sum().clamp(min=1)
        share = counts / total
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        self._follow(mean.detach(), var.detach() * total / (total - 1).clamp(min=1))
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (x * scale.view(middle.shape) + shift.view(middle.shape)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics as BatchNorm2d does; momentum None: to their mean over all batches so far."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs [N, C, ...], got {tuple(input.shape)}")


def synchronise(module: nn.Module) -> nn.Module:
    """The module with each batch norm in it replaced in place; a batch norm by itself comes back replaced."""
    if isinstance(module, _BatchNorm):
        return SyncedBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child))
    return module


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
    """Replaces the running statistics of the model's batch norms by their mean over `batches` (the arguments of its
    forward pass in training), as Detectron2's PRECISE_BN does before an evaluation: the running ones are those of
    weights that have changed since. Leaves the model's mode as it was, and its weights.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for arguments in batches:
        model(*arguments)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.train(training)
