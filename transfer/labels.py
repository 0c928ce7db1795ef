"""Labels of two sources: whether they go together, all of them at once, and how often a classifier meets them."""

import sys

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.labelled import read_labels
from pipeline.progress import Progress
from pipeline.sources.manifest import Source, shared_samples
from trainer.joining import Ranks


def check_classes(train: Source, val: Source) -> None:
    """Raises ValueError when the two name their classes differently."""
    if train.classes and val.classes and tuple(train.classes) != tuple(val.classes):
        raise ValueError(
            f"the two sources do not have the same classes: {len(train.classes)} ({', '.join(train.classes[:3])}, ...) "
            f"and {len(val.classes)} ({', '.join(val.classes[:3])}, ...); make both from folders of the same names"
        )


def warn_of_overlap(train: Source, val: Source) -> None:
    """Says it when images are judged that kNN also looks among, or a classifier learns from: the figure is too high."""
    if shared := shared_samples(train, val):
        print(
            f"warning: {shared:,} of the {val.samples:,} images that are judged are in the train source too, where kNN "
            "finds each of them itself: the accuracy is too high; judge with a source of other images",
            file=sys.stderr,
        )


def labels_of(source: Source, name: str, ranks: Ranks, progress: bool) -> NDArray[np.int64]:
    """The label of every image by its id, int64 [N], on all ranks. Raises ValueError, on all of them, when an image has
    none. name: "train" and the like, for people."""
    parts = [np.empty(0, np.int64)]
    with Progress(f"{name} labels" if progress and ranks.rank == 0 else "", source.samples, unit="labels") as shown:
        for labels in read_labels(source, rank=ranks.rank, world_size=ranks.world_size):
            parts.append(labels)
            shown.advance(len(labels) * ranks.world_size)
    found = torch.from_numpy(np.concatenate(parts))
    if ranks.world_size > 1:
        everyone = dist.group.WORLD
        assert everyone is not None
        found = torch.cat(gather_rows(found, ranks.device, everyone))
    if int(found.min()) < 0:
        raise ValueError(
            f"not every image of the {name} source has a label; make the shards from class folders, or name a labelled "
            "source"
        )
    return found.numpy()


def gather_rows(x: Tensor, device: str | torch.device, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's x, of any number of rows each, on the CPU; through `device`, where the group's back-end works."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=device), group=group)
    lengths = [int(c) for c in counts]
    padded = torch.zeros((max(lengths), *x.shape[1:]), dtype=x.dtype, device=device)
    padded[: len(x)] = x.to(device)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return [part[:n].cpu() for part, n in zip(parts, lengths)]


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 [L, 3] for logits [L, n, C] and labels int64 [n]: right at once, among the first five, images."""
    best = logits.topk(min(5, logits.shape[2]), dim=2).indices  # [L, n, 5]
    right = best == labels[:, None]
    seen = torch.full((len(logits),), len(labels), device=logits.device)
    return torch.stack([right[:, :, 0].sum(dim=1), right.sum(dim=(1, 2)), seen], dim=1)
