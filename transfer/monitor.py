"""kNN accuracy and RankMe in the middle of a training, which goes on as if nobody had looked."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from pipeline.reading.order import spread
from pipeline.sources.manifest import Source
from recipe import Recipe
from trainer.joining import Ranks
from trainer.resume import undisturbed
from trainer.run_views import run_views
from transfer.effective_rank import SecondMoment
from transfer.extraction import feature_batches
from transfer.knn import evaluate
from transfer.labels import warn_of_overlap
from transfer.load import CentralCrops

RANKED_IMAGES, RANKED_RANGES = 4096, 16  # of the training source, where there is no knn_data


def build_monitor(
    r: Recipe, sources: dict[str, Source], rank: int, ranks: int
) -> Callable[[nn.Module, torch.device, AbstractContextManager[Any]], dict[str, float]]:
    """A function (net, device, autocast) -> {"knn": accuracy on knn_data, "rankme": of its features}, the same on all
    ranks; without knn_data RankMe of 4,096 training images alone. ValueError for a knn_data without labels.
    """
    bank, val = sources[r.knn_train or r.data] if r.knn_data else None, sources[r.knn_data or r.data]
    if bank is not None and not bank.classes:
        raise ValueError(f"{r.knn_train or r.data} has no classes to vote with; give a labelled source as --knn_train")
    if bank is not None and not val.classes:
        raise ValueError(f"knn_data {r.knn_data} has no classes; give shards that were made from class folders")
    if bank is not None and rank == 0:
        warn_of_overlap(bank, val)
    crops = CentralCrops(r.image_size, run_views(r)[0].mean_std, num_threads=r.num_threads or None)
    if bank is None:
        crops = replace(crops, max_bad_fraction=1.0)  # whether too many are bad, the training judges

    def measured(net: nn.Module, device: torch.device, autocast: AbstractContextManager[Any]) -> dict[str, float]:
        # A copy with rank 0's batch-norm statistics, which are the ones in the checkpoint: each rank has its own, and
        # the one that trains is not touched.
        judged = copy.deepcopy(net)
        if ranks > 1:
            for buffer in judged.buffers():
                dist.broadcast(buffer, src=0)
        with autocast:
            return measure(judged, bank, val, replace(crops, ranks=Ranks(rank, ranks, device)), features=r.knn_features)

    return measured


def measure(
    encoder: nn.Module,
    train: Source | None,
    val: Source,
    crops: CentralCrops,
    *,
    k: int = 200,
    features: Literal["backbone", "head"] = "backbone",
) -> dict[str, float]:
    """{"knn", "rankme"} in the middle of training, which it leaves as it found it; without `train` RankMe alone, of
    images from all over val."""
    with undisturbed(encoder):
        embed = encoder if features == "head" else encoder.get_submodule("backbone")
        if train is not None:
            found = evaluate(embed, train, val, crops, k=k)
            return {"knn": found["knn"], "rankme": found["rankme"]}
        moment = SecondMoment()
        for batch in feature_batches(embed, val, crops, ranges=spread_ranges(val.samples, crops.ranks)):
            moment.add(batch.features)
        return {"rankme": moment.rankme(dist.group.WORLD if crops.ranks.world_size > 1 else None)}


def spread_ranges(samples: int, ranks: Ranks) -> list[range]:
    """This rank's part of 4,096 ids from all over a source, in 16 runs of neighbours, which are cheap to read; of all
    ids where there are fewer."""
    return spread(samples, RANKED_IMAGES, RANKED_RANGES, ranks.rank, ranks.world_size)
