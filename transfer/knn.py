"""Judges an encoder by weighted k-nearest-neighbour classification: no training, no hyper-parameters to search.

    python -m transfer.knn --run runs/photos --train shards/in1m/train --val shards/in1m/val

1. Every image, resized and centre-cropped, goes through the query encoder in eval mode once; features are normalised.
2. Each test feature finds its k most similar training features, chunk by chunk: 1.28M x 50k needs hardly more memory
   than the features themselves.
3. They vote for their class with weight exp(similarity / temperature) (Wu et al. 2018, section 3.4; k 200 and
   temperature 0.1 as in the reference's CIFAR-10 demo).

Under torchrun or `accelerate launch` the ranks share all three: each keeps its own part of the training features, finds
the nearest among them, and the ranks' candidates are merged.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.knn()  # before the imports that take seconds

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor

from pipeline.command import cache_arguments, command
from pipeline.progress import Progress
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from trainer.joining import joined
from transfer import ledger
from transfer.arguments import encoder_arguments
from transfer.effective_rank import SecondMoment
from transfer.extraction import embedding_by, feature_batches
from transfer.labels import check_classes, gather_rows, warn_of_overlap
from transfer.load import CentralCrops, LoadedEncoder, default_resize, load_encoder, weights_hash
from transfer.training import plain

TRAIN_CHUNK = 32_768  # similarities of 1024 x 32768 in fp32 are 134 MB
TEST_CHUNK = 1_024
PIXELS_SIDE = 32  # raw pixels of larger images are averaged down to this, else 1.28M of them would be 770 GB


def extract(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    crops: CentralCrops,
    *,
    limit: int | None = None,
    seen: Callable[[Tensor], None] = lambda features: None,
    progress: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of `source` as L2-normalised features fp32 [n, D], labels int64 [n] and sample ids int64 [n],
    on the CPU.

    A label is -1 where there is none. embed: images fp32 [b, 3, S, S] on the ranks' device -> [b, D]. limit: only the
    first so many. seen: gets the features of each batch before they are normalised, [b, D] on the device.
    progress: what rank 0's progress bar is called; empty for none.
    """
    rank, world_size, _ = crops.ranks
    capacity = -(-source.samples // world_size)  # filled in place: a list and torch.cat would need the memory twice
    capacity = capacity if limit is None else min(capacity, limit)
    features: Tensor | None = None
    labels = torch.empty(capacity, dtype=torch.int64)
    sample_ids = torch.empty(capacity, dtype=torch.int64)
    n = 0
    with Progress(progress if rank == 0 else "", capacity) as shown:
        for batch in feature_batches(embed, source, crops):
            seen(batch.features[: capacity - n])
            y = F.normalize(batch.features, dim=1)[: capacity - n]  # [b, D]
            if features is None:
                features = torch.empty(capacity, y.shape[1])
            m = n + len(y)
            features[n:m], labels[n:m], sample_ids[n:m] = y.cpu(), batch.labels[: len(y)], batch.sample_ids[: len(y)]
            n = m
            shown.advance(len(y))
            if n == capacity and limit is not None:
                break
    if features is None:
        raise ValueError(f"rank {rank} of {world_size} got no image of {source.samples}; use fewer ranks")
    return features[:n], labels[:n], sample_ids[:n]


def nearest(train: Tensor, test: Tensor, k: int, *, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """The k largest inner products of each row of test [M, D] with the rows of train [N, D]: (similarities fp32,
    indices int64), both [M, k], descending.

    Training chunks in the outer loop: a set larger than the GPU's memory crosses the bus once. Missing ones (k > N)
    are -inf, index 0.
    """
    similarities = torch.full((len(test), k), -torch.inf)
    indices = torch.zeros((len(test), k), dtype=torch.int64)
    for i in range(0, len(train), TRAIN_CHUNK):
        part = train[i : i + TRAIN_CHUNK].to(device).T  # [D, n]
        for j in range(0, len(test), TEST_CHUNK):
            rows = slice(j, j + TEST_CHUNK)
            with torch.autocast(part.device.type, enabled=False):  # the monitor may run inside train.py's
                products = test[rows].to(device) @ part
            top, where = products.topk(min(k, part.shape[1]), dim=1)
            candidates = torch.cat([similarities[rows].to(device), top], dim=1)
            positions = torch.cat([indices[rows].to(device), where + i], dim=1)
            best, order = candidates.topk(k, dim=1)
            similarities[rows] = best.cpu()
            indices[rows] = positions.gather(1, order).cpu()
    return similarities, indices


def vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Predicted class int64 [M] from neighbours' similarities and labels [M, k]: each votes with exp(similarity /
    temperature)."""
    # Relative to the nearest one, which changes no comparison and cannot overflow at low temperatures.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = torch.zeros(len(labels), classes, dtype=weights.dtype).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)


def classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    *,
    classes: int,
    device: str | torch.device = "cpu",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Predicted class int64 [M] for test_features [M, D] by weighted kNN among train_features [N, D] with
    train_labels int64 [N].

    With a process group, the training arguments are this rank's part and the test features all of them; every rank
    gets all predictions.
    k is not to exceed the number of training features over all ranks.
    """
    similarities, indices = nearest(train_features, test_features, k, device=device)
    labels = train_labels[indices]
    if group is None or group.size() == 1:
        return vote(similarities, labels, classes, temperature)
    predictions = []
    for j in range(0, len(test_features), TEST_CHUNK):  # in slices: all candidates of 64 ranks at once would be 8 GB
        rows = slice(j, j + TEST_CHUNK)
        candidates = torch.cat(gather_rows(similarities[rows], device, group), dim=1)  # [m, W*k]
        theirs = torch.cat(gather_rows(labels[rows], device, group), dim=1)
        best, order = candidates.topk(k, dim=1)
        predictions.append(vote(best, theirs.gather(1, order), classes, temperature))
    return torch.cat(predictions)


def evaluate(
    embed: Callable[[Tensor], Tensor],
    train: Source,
    val: Source,
    crops: CentralCrops,
    *,
    k: int = 200,
    temperature: float = 0.1,
    progress: bool = False,
) -> dict[str, Any]:
    """Weighted-kNN accuracy of `embed` on val with train as memory: {"knn", "rankme" (of val), "k", "train",
    "val", "classes"}; all ranks call it, all get the same.

    Raises ValueError when a source has no labels, or when the two name their classes differently.
    """
    check_classes(train, val)

    rank, world_size, device = crops.ranks
    moment = SecondMoment()
    train_features, train_labels, _ = extract(embed, train, crops, progress="train features" if progress else "")
    test_features, test_labels, _ = extract(
        embed, val, crops, seen=moment.add, progress="val features" if progress else ""
    )
    group = dist.group.WORLD if world_size > 1 else None
    total = len(train_labels)
    largest = int(max(train_labels.max(), test_labels.max()))
    missing = [int((train_labels < 0).sum()), int((test_labels < 0).sum())]
    if group is not None:
        facts = gather_rows(torch.tensor([[total, largest, *missing]]), device, group)
        together = torch.cat(facts)
        total, largest = int(together[:, 0].sum()), int(together[:, 1].max())
        missing = [
            int(n) for n in together[:, 2:].sum(0)
        ]  # checked after the gather: every rank has to raise, or the others hang
    for name, source, n in (("train", train, missing[0]), ("val", val, missing[1])):
        if n:
            raise ValueError(
                f"{n} of {source.samples} images of the {name} source have no label, kNN needs one for each; "
                "make the shards from class folders, or name a labelled source"
            )
    if group is not None:
        test_features = torch.cat(gather_rows(test_features, device, group))
        test_labels = torch.cat(gather_rows(test_labels, device, group))
    if k > total and progress and rank == 0:
        print(f"k {k} is more than the {total} training images: using k {total}", file=sys.stderr)
    k = min(k, total)
    predictions = classify(
        train_features, train_labels, test_features, k, temperature, classes=largest + 1, device=device, group=group
    )
    accuracy = float((predictions == test_labels).double().mean())
    found = {"knn": accuracy, "rankme": moment.rankme(group)}
    return found | {"k": k, "train": total, "val": len(test_labels), "classes": largest + 1}


def raw_pixels(images: Tensor) -> Tensor:
    """Raw pixels as features [b, 3*s*s], s at most 32: what kNN does without any encoder."""
    side = min(PIXELS_SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def settings_of(
    loaded: LoadedEncoder,
    train: Source,
    val: Source,
    crops: CentralCrops,
    features: Literal["backbone", "head", "pixels"],
    k: int,
    temperature: float,
    precision: str,
) -> dict[str, Any]:
    """Everything that makes another judgement, for the ledger."""
    encoder = "pixels" if features == "pixels" else weights_hash(loaded.part(features))
    about: dict[str, Any] = {"encoder": encoder, "train": train.fingerprint, "val": val.fingerprint}
    about |= {"features": features, "k": k, "temperature": temperature, "precision": precision}
    resize = default_resize(crops.image_size) if crops.resize is None else crops.resize
    return plain(about | {"image_size": crops.image_size, "resize": resize, "mean_std": crops.mean_std})


def main(args: Namespace) -> None:
    started = time.monotonic()
    about_encoder = encoder_arguments(args)
    if args.pixels and Path(args.run).is_dir():
        about_encoder["untrained"] = True  # only its recipe matters: no checkpoint has to be there
    loaded = load_encoder(args.run, **about_encoder)
    with joined() as ranks:
        module = loaded.part(args.features).to(ranks.device).to(memory_format=torch.channels_last)
        embed = raw_pixels if args.pixels else embedding_by(module, ranks.device, args.precision)
        train, val = (open_source(data, **cache_arguments(args)) for data in (args.train, args.val))
        if ranks.rank == 0:
            warn_of_overlap(train, val)
        crops = CentralCrops(
            loaded.image_size, loaded.mean_std, args.resize, args.batch_size, num_threads=args.num_threads, ranks=ranks
        )
        result = evaluate(embed, train, val, crops, k=args.k, temperature=args.temperature, progress=True)
    if ranks.rank == 0:
        part: Any = "pixels" if args.pixels else args.features
        settings = settings_of(loaded, train, val, crops, part, args.k, args.temperature, args.precision)
        about = ledger.judged(loaded) | ({"start": "pixels", "step": 0} if args.pixels else {})
        figures = {"knn": result["knn"], "rankme": result["rankme"]}
        ledger.record(ledger.entry("knn", settings, figures, **about), args.run, args.output)
        judged = "pixels" if args.pixels else f"untrained {args.features}" if args.untrained else args.features
        about = {"features": judged, "temperature": args.temperature, "run": loaded.name, "step": loaded.step}
        print(json.dumps(result | about | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
