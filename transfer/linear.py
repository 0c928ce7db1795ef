"""Judges an encoder by the linear protocol: a linear classifier on its frozen features (MoCo, section 4.1).

    accelerate launch -m transfer.linear --run runs/photos --train shards/in1m/train --val shards/in1m/val

1. The backbone stands still, in eval mode; its pooled features are taken as they are, not normalised.
2. Linear layers are trained on random crops and flips with SGD: momentum 0.9, no weight decay, 100 epochs, the learning
   rate times 0.1 after 60 % and after 80 % of them (the reference's main_lincls.py).
3. After each epoch they classify the central crops of val: top-1 and top-5.

The right learning rate follows the scale of the features, and the paper searched for its 30. So there is a layer for
each of a grid of rates, side by side on the same features, as the encoder's pass is what costs; the best one counts.
With `--lr 30` it is the published command. Running the same command again continues after the last finished epoch.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.linear()  # before the imports that take seconds

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from pipeline.command import cache_arguments, command
from pipeline.labelled import batches_per_epoch, train_batches
from pipeline.progress import Progress
from pipeline.reading.order import make_order
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from trainer.joining import Ranks, joined
from transfer import ledger
from transfer.arguments import encoder_arguments
from transfer.extraction import FeatureBatch, embedding_by, feature_batches
from transfer.labels import check_classes, hits, labels_of, warn_of_overlap
from transfer.load import CentralCrops, LoadedEncoder, load_encoder, weights_hash
from transfer.training import continue_from, folder_of, mirrored, plain, write_rows

DECAY_AFTER = (0.6, 0.8)  # of the epochs


class Heads(nn.Module):
    """A linear layer for each learning rate, as main_lincls.py begins them: weights N(0, 0.01), bias 0."""

    def __init__(self, count: int, features: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(count):  # one after another: a layer begins the same whatever stands beside it
            layer = nn.Linear(features, classes)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([layer(features) for layer in self.layers])  # [n, D] -> [L, n, C]


@dataclass(frozen=True)
class Protocol:
    """How the classifiers are trained: one for each of `lr`, side by side."""

    lr: list[float]
    epochs: int = 100
    batch_size: int = 256  # over all ranks
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0


def train_epoch(
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    embed: Callable[[Tensor], Tensor],
    batches: Any,
    steps: int,
    advance: Callable[[int], object],
) -> Tensor:
    """Returns the mean loss and training accuracy of each head, [L, 2], on the device."""
    seen: Any = 0.0
    images = 0
    for _ in range(steps):
        batch = next(batches)
        with torch.no_grad():
            features = embed(batch.images).float()  # [n, D]
        logits = heads(features)  # [L, n, C]
        truth = batch.labels.expand(len(logits), -1)  # [L, n]
        losses = F.cross_entropy(logits.movedim(2, 1), truth, reduction="none").mean(dim=1)  # [L]
        losses.sum().backward()  # each head gets its own loss's gradient alone
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (logits.argmax(dim=2) == truth).float().mean(dim=1)
        seen = seen + torch.stack([losses.detach(), accuracy], dim=1) * len(features)
        images += len(features)
        advance(len(features))
    return seen / images  # type: ignore[no-any-return]


@torch.no_grad()
def validate(heads: Heads, batches: Iterable[FeatureBatch], device: torch.device) -> Tensor:
    """Counts over this rank's part, int64 [L, 3]: right at once, among the first five, images."""
    counts = torch.zeros(len(heads.layers), 3, dtype=torch.int64, device=device)
    for batch in batches:
        counts += hits(heads(batch.features), batch.labels)  # [L, n, C]
    return counts


def settings_of(loaded: LoadedEncoder, train: Source, val: Source, protocol: Protocol) -> dict[str, Any]:
    """Everything that makes another experiment, in plain values."""
    about = {"encoder": weights_hash(loaded.encoder.backbone), "train": train.fingerprint, "val": val.fingerprint}
    return plain(about | {"image_size": loaded.image_size, "mean_std": loaded.mean_std} | asdict(protocol))


def best_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of the best classifier among the rows of an epoch."""
    best = max(rows, key=lambda row: row["top1"])
    return {name: best[name] for name in ("top1", "top5", "train_top1", "lr", "epoch")}


def linear(
    loaded: LoadedEncoder,
    train: Source,
    val: Source,
    out: Path,
    protocol: Protocol,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    num_threads: int | None = None,
    ranks: Ranks,
    progress: bool = False,
    after_epoch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Trains and judges. Returns a row for each lr after the last epoch: {"epoch", "lr", "loss", "train_top1", "top1",
    "top5", "seconds"}. All ranks call it; rank 0 calls `after_epoch` when an epoch is saved.

    OUT: metrics.jsonl with such rows of each epoch, and the newest epoch's checkpoint. Raises ValueError for sources
    without labels or with unlike classes, a batch that the ranks do not divide, an OUT that holds another experiment.
    """
    rank, world_size, device = ranks
    lrs, epochs, batch_size, seed = protocol.lr, protocol.epochs, protocol.batch_size, protocol.seed
    check_classes(train, val)
    order = make_order(train, batch_size, seed)
    order.draw(0, 0, rank, world_size)  # ValueError, before anything long, when the ranks do not divide the batch
    steps = batches_per_epoch(order)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)  # not found to be impossible after an epoch
    largest = max(
        int(labels_of(source, name, ranks, progress).max()) for source, name in ((train, "train"), (val, "val"))
    )
    classes = max(len(train.classes), largest + 1)
    encoder = loaded.encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    embed = embedding_by(encoder.backbone, device, precision)
    torch.manual_seed(seed)
    heads = Heads(len(lrs), encoder.features, classes).to(device)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(heads.layers, lrs)]
    optimizer = torch.optim.SGD(groups, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    settings = settings_of(loaded, train, val, protocol)
    rows, begun = list[dict[str, Any]](), 0
    metrics = out / "metrics.jsonl"
    unsaid = {"mean_std": settings["mean_std"]}
    if (state := continue_from(out, settings, ranks, "linear classifier", unsaid=unsaid)) is not None:
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        rows, begun = state["rows"], state["epoch"]
        if rank == 0:  # a kill may have come between the checkpoint and this
            write_rows(metrics, rows)
    model = DistributedDataParallel(heads) if world_size > 1 else heads
    common: dict[str, Any] = {
        "image_size": loaded.image_size, "mean_std": loaded.mean_std, "rank": rank, "world_size": world_size,
        "device": str(device), "num_threads": num_threads,
    }  # fmt: skip
    crops = CentralCrops(
        loaded.image_size, loaded.mean_std, batch_size=max(1, batch_size // world_size), num_threads=num_threads,
        ranks=ranks,
    )  # fmt: skip
    batches = train_batches(train, batch_size=batch_size, seed=seed, start=begun * steps, **common)
    for epoch in range(begun, epochs):
        began = time.monotonic()
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr * decay(epoch, epochs)
        label = f"epoch {epoch + 1}/{epochs}" if progress and rank == 0 else ""
        with Progress(label, train.samples) as shown:
            fitted = train_epoch(model, optimizer, embed, batches, steps, lambda n: shown.advance(n * world_size))
        counts = validate(heads, feature_batches(embed, val, crops), device)
        if world_size > 1:
            dist.all_reduce(fitted)
            dist.all_reduce(counts)
        seconds = time.monotonic() - began
        for lr, (loss, accuracy), (first, five, images) in zip(lrs, (fitted / world_size).tolist(), counts.tolist()):
            row = {"epoch": epoch + 1, "lr": lr, "loss": loss if math.isfinite(loss) else None, "train_top1": accuracy}
            rows.append(row | {"top1": first / images, "top5": five / images, "seconds": round(seconds, 2)})
        if rank == 0:
            newest = rows[-len(lrs) :]
            state = {"settings": settings, "epoch": epoch + 1, "rows": rows}
            state |= {"heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(out, state, step=epoch + 1, keep=1)
            write_rows(metrics, rows)
            after_epoch()
            if progress:
                said = ", ".join(f"{row['top1']:.1%} at {row['lr']:g}" for row in newest)
                print(f"epoch {epoch + 1}/{epochs}  top-1 {said}", file=sys.stderr, flush=True)
    batches.close()  # type: ignore[attr-defined]
    return rows[-len(lrs) :]


def decay(epoch: int, epochs: int) -> float:
    """The factor on the learning rate in this epoch, counted from 0."""
    return 0.1 ** sum(epoch >= share * epochs for share in DECAY_AFTER)


def main(args: Namespace) -> None:
    started = time.monotonic()
    out = folder_of(args, "linear")
    loaded = load_encoder(args.run, **encoder_arguments(args))
    train, val = (open_source(data, **cache_arguments(args)) for data in (args.train, args.val))
    lrs = [float(lr) for lr in (args.lr if isinstance(args.lr, list) else [args.lr])]
    protocol = Protocol(lrs, args.epochs, args.batch_size, args.momentum, args.weight_decay, args.seed)
    how = {"precision": args.precision, "num_threads": args.num_threads, "progress": True}
    with joined() as ranks, mirrored(out, ranks.rank) as (folder, upload):
        if ranks.rank == 0:
            warn_of_overlap(train, val)
        rows = linear(loaded, train, val, folder, protocol, ranks=ranks, after_epoch=upload, **how)
    if ranks.rank == 0:
        best = best_figures(rows)
        if len(lrs) > 2 and best["lr"] in (min(lrs), max(lrs)):
            print(f"warning: the best rate, {best['lr']:g}, is at the end of the grid: look beyond it", file=sys.stderr)
        about = {"train": train.samples, "val": val.samples, "run": loaded.name, "step": loaded.step}
        about["features"] = "untrained backbone" if args.untrained else "backbone"
        settings = settings_of(loaded, train, val, protocol) | {"precision": args.precision}
        ledger.record(ledger.entry("linear", settings, best, **ledger.judged(loaded)), args.run, out)
        result = {"linear": best["top1"], **{n: best[n] for n in ("top5", "train_top1", "lr", "epoch")}, **about}
        print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
