"""One rank of test_sync_batchnorm: its part of a batch through synchronised batch norm, as moco_runs.py calls it."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.sync_batchnorm import precise_statistics, synchronise

PARTS = ((3, 5), (4, 4), (8, 0))  # images of each rank, one step after another


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.uniform_(-1, 1)
    return model.train()


def images(step: int) -> Tensor:
    return torch.randn(8, 3, 7, 6, generator=torch.Generator().manual_seed(step)) + 3


def loss(out: Tensor, share: float) -> Tensor:
    """Of this rank: with `share` ranks averaged it is a mean over the whole batch of 8."""
    return share * (out**2 * torch.linspace(-1, 1, out.shape[1:].numel()).view(out.shape[1:])).sum() / 8


def after_steps(model: nn.Module, parts: list[tuple[int, int]], share: float) -> dict[str, list[float]]:
    """All gradients of the steps, the outputs of the last one, and the statistics; then precise ones."""
    found = list[Tensor]()
    for step, (begin, end) in enumerate(parts):
        model.zero_grad()
        out = model(images(step)[begin:end])
        loss(out, share).backward()
        found += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    statistics = [b.float().flatten() for b in inner.buffers()]
    precise_statistics(inner, [(images(step)[begin:end],) for step, (begin, end) in enumerate(parts[:2], start=5)])
    precise = [b.float().flatten() for b in inner.buffers()]
    return {"gradients": torch.cat(found).tolist(), "statistics": torch.cat(statistics).tolist(),
            "precise": torch.cat(precise).tolist(), "outputs": out.flatten().tolist()}  # fmt: skip


def of_rank(rank: int) -> dict[str, list[float]]:
    """This rank's results, of two ranks."""
    parts = [(0, a) if rank == 0 else (a, a + b) for a, b in PARTS]
    return after_steps(DistributedDataParallel(synchronise(net())), parts, 2.0)
