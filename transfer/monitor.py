"""kNN accuracy in the middle of a training, which goes on as if nobody had looked."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.pixels.views import mean_std
from pipeline.sources.manifest import Source
from recipe import Recipe
from trainer.joining import Ranks
from transfer.knn import evaluate, warn_of_overlap
from transfer.load import CentralCrops


def build_monitor(
    r: Recipe, sources: dict[str, Source], rank: int, ranks: int
) -> Callable[[nn.Module, torch.device, AbstractContextManager[Any]], float]:
    """A function (net, device, autocast) -> kNN accuracy on knn_data, the same on all ranks. ValueError without
    labels.
    """
    bank, val = sources[r.knn_train or r.data], sources[r.knn_data]
    if not bank.classes:
        raise ValueError(f"{r.knn_train or r.data} has no classes to vote with; give a labelled source as --knn_train")
    if not val.classes:
        raise ValueError(f"knn_data {r.knn_data} has no classes; give shards that were made from class folders")
    if rank == 0:
        warn_of_overlap(bank, val)
    crops = CentralCrops(r.image_size, mean_std(r.views), num_threads=r.num_threads or None)

    def accuracy(net: nn.Module, device: torch.device, autocast: AbstractContextManager[Any]) -> float:
        # A copy with rank 0's batch-norm statistics, which are the ones in the checkpoint: each rank has its own, and
        # the one that trains is not touched.
        judged = copy.deepcopy(net)
        if ranks > 1:
            for buffer in judged.buffers():
                dist.broadcast(buffer, src=0)
        with autocast:
            return knn_accuracy(
                judged,
                bank,
                val,
                replace(crops, ranks=Ranks(rank, ranks, device)),
                features=r.knn_features,
            )

    return accuracy


@contextmanager
def undisturbed(encoder: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's training flag and every random generator are exactly as they were."""
    training = [(module, module.training) for module in encoder.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator is what must not move
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        encoder.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def knn_accuracy(
    encoder: nn.Module,
    train: Source,
    val: Source,
    crops: CentralCrops,
    *,
    k: int = 200,
    features: Literal["backbone", "head"] = "backbone",
) -> float:
    """kNN accuracy in the middle of training, which it leaves as it found it."""
    with undisturbed(encoder):
        embed = encoder if features == "head" else encoder.get_submodule("backbone")
        return float(evaluate(embed, train, val, crops, k=k)["knn"])
