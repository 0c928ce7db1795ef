"""Judges an encoder by fine-tuning: a classifier on it, all of whose layers are trained (MoCo, appendices A.6, A.7).

    accelerate launch -m transfer.finetune --config recipes/finetune/imagenet_r50.yaml --run runs/photos \
        --train shards/in1m/train --val shards/in1m/val

1. A new linear layer on the pooled features; SGD on random crops and flips, with a learning rate for the backbone and
   one for that layer.
2. `--fraction 0.01 0.1 1` trains from the same encoder on parts of the labels, the same images of each class for
   everybody.
3. Central crops of val: top-1 and top-5. The trained classifier is left as model.pth, under torchvision's names.

Running the same command again continues from the last checkpoint; SIGTERM and SIGINT save and end it.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.finetune()  # before the imports that take seconds

import copy
import functools
import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor, nn

from pipeline import files
from pipeline.command import cache_arguments, command
from pipeline.labelled import LabelledBatch, batches_per_epoch, train_batches, train_order
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from trainer.build import DTYPES
from trainer.schedule import learning_rate
from transfer import ledger
from transfer.arguments import encoder_arguments
from transfer.export_torchvision import write_state
from transfer.labels import check_classes, hits, labels_of, warn_of_overlap
from transfer.load import CentralCrops, LoadedEncoder, load_encoder, weights_hash
from transfer.subsets import share_of_each_class
from transfer.training import (
    Precision,
    Session,
    check_precision,
    continue_from,
    evaluations,
    folder_of,
    plain,
    session,
    shared,
    train,
)

MODEL = "model.pth"
SUBSET_SEED = 0  # one draw for everybody


@dataclass(frozen=True)
class FineTuning:
    """How a classifier is trained on an encoder."""

    lr: float = 0.03
    lr_head: float | None = None  # None: lr
    epochs: int = 100
    batch_size: int = 256  # over all ranks
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (30, 60, 90)
    decay: float = 0.1
    warmup_epochs: int = 0
    fraction: float = 1.0  # of the training images of each class
    precision: Precision = "fp32"
    seed: int = 0


class Classifier(nn.Module):
    """Images [n, 3, S, S] -> logits [n, C]. The new layer begins as that of main_lincls.py: weights N(0, 0.01)."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(features, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.backbone(images))
        return logits


def settings_of(loaded: LoadedEncoder, train: Source, val: Source, how: FineTuning) -> dict[str, Any]:
    """Everything that makes another experiment, in plain values."""
    about = {"protocol": "finetune", "encoder": weights_hash(loaded.encoder.backbone)}
    about |= {"train": train.fingerprint, "val": val.fingerprint}
    return plain(about | {"image_size": loaded.image_size, "mean_std": loaded.mean_std} | asdict(how))


def finetune(
    loaded: LoadedEncoder,
    train_source: Source,
    val: Source,
    at: Session,
    how: FineTuning,
    *,
    num_threads: int | None = None,
    evaluate_every: int = 0,
    log_every: int = 20,
    save_every: int = 1000,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Trains, judges and leaves `model.pth` in the session's folder. Returns {"top1", "top5", "epoch", "step",
    "images"}, None when it was told to stop before its end. All ranks call it. `loaded` stays as it is.

    evaluate_every: in epochs, 0: only at the end. Raises ValueError for sources without labels or with unlike classes,
    a batch that the ranks do not divide or that the fraction does not fill, and a folder of another experiment.
    """
    rank, world_size, device = at.ranks
    check_precision(how.precision, device)
    check_classes(train_source, val)
    labels = labels_of(train_source, "train", at.ranks, progress)
    largest = max(int(labels.max()), int(labels_of(val, "val", at.ranks, progress).max()))
    classes = max(len(train_source.classes), largest + 1)
    ids = None if how.fraction == 1 else share_of_each_class(labels, how.fraction, SUBSET_SEED)
    try:
        order = train_order(train_source, how.batch_size, how.seed, ids, rest=False)
    except ValueError as error:
        raise ValueError(f"--fraction {how.fraction:g}: {error}" if ids is not None else str(error)) from None
    order.draw(0, 0, rank, world_size)
    per_epoch = batches_per_epoch(order)
    if rank == 0:
        at.folder.mkdir(parents=True, exist_ok=True)

    settings = settings_of(loaded, train_source, val, how)
    state = continue_from(at.folder, settings, at.ranks, "fine-tuning")
    if state is None and shared((at.folder / MODEL).exists, at.ranks):
        raise ValueError(f"{at.folder / MODEL} is of no training that was here: take another --out, or move it away")
    torch.manual_seed(how.seed)
    net = Classifier(copy.deepcopy(loaded.encoder.backbone), loaded.encoder.features, classes).requires_grad_(True)
    net.to(device).to(memory_format=torch.channels_last).train()
    groups = [{"params": net.backbone.parameters()}, {"params": net.fc.parameters()}]
    optimizer = torch.optim.SGD(groups, how.lr, momentum=how.momentum, weight_decay=how.weight_decay)

    def rates(step: int) -> list[float]:
        rules: dict[str, Any] = {"schedule": how.schedule, "milestones": how.milestones, "decay": how.decay}
        rules |= {"steps_per_epoch": per_epoch, "epochs": how.epochs, "warmup_epochs": how.warmup_epochs}
        return [learning_rate(step, lr=lr, **rules) for lr in (how.lr, how.lr_head or how.lr)]

    def forward(model: nn.Module, batch: LabelledBatch) -> Tensor:
        logits = model(batch.images).float()  # [n, C]
        right = (logits.argmax(dim=1) == batch.labels).float().mean()
        return torch.stack([F.cross_entropy(logits, batch.labels), right])

    size, mean_std = loaded.image_size, loaded.mean_std
    crops = CentralCrops(
        size, mean_std, batch_size=max(1, how.batch_size // world_size), num_threads=num_threads, ranks=at.ranks
    )

    def evaluate(model: nn.Module) -> dict[str, float]:
        counts = torch.zeros(1, 3, dtype=torch.int64, device=device)
        for batch, _ in crops.batches(val):
            with torch.autocast(device.type, DTYPES[how.precision], enabled=how.precision != "fp32"):
                counts += hits(model(batch.images)[None], batch.labels)
        if world_size > 1:
            dist.all_reduce(counts)
        first, five, images = counts[0].tolist()
        return {"top1": first / images, "top5": five / images}

    batches: Any = train_batches(
        train_source, image_size=size, batch_size=how.batch_size, mean_std=mean_std, seed=how.seed,
        start=state["step"] if state else 0, rank=rank, world_size=world_size, device=str(device),
        num_threads=num_threads, ids=ids, rest=False,
    )  # fmt: skip
    with closing(batches):
        total = how.epochs * per_epoch
        watched: dict[str, Any] = {"log_every": log_every, "save_every": save_every}
        watched |= {"evaluate_every": evaluate_every * per_epoch, "judged_by": "top1"}
        step = train(
            at, net, optimizer, batches, forward, rates, evaluate, state=state, settings=settings, total=total,
            steps_per_epoch=per_epoch, batch_size=how.batch_size, fields=("loss", "accuracy"),
            precision=how.precision, **watched,
        )  # fmt: skip
    if step < total:
        return None
    if rank == 0:
        write_state(classifier_state(net), at.folder / MODEL, loaded)
    found = shared(lambda: evaluations(at.folder, "top1")[-1], at.ranks)
    images = train_source.samples if ids is None else len(ids)
    return {name: found[name] for name in ("top1", "top5", "epoch", "step")} | {"images": images}


def classifier_state(net: Classifier) -> dict[str, Tensor]:
    """Under torchvision's names: `torchvision.models.resnet50(num_classes=C).load_state_dict(state)`."""
    own = {name.removeprefix("backbone."): tensor for name, tensor in net.state_dict().items()}
    return {name: tensor.cpu().contiguous() for name, tensor in own.items()}


def how_to(args: Namespace) -> FineTuning:
    """From the flags, with fraction 1."""
    given: dict[str, Any] = {each.name: args[each.name] for each in fields(FineTuning) if each.name != "fraction"}
    return FineTuning(**given | {"milestones": tuple(args.milestones)})


def main(args: Namespace) -> None:
    started = time.monotonic()
    out = folder_of(args, "finetune", "log, checkpoint and model")
    fractions = sorted(set(map(float, args.fraction)))
    if len(fractions) > 1 and files.is_remote(out):
        raise ValueError(
            f"{len(fractions)} fractions and --out {out}, a URL: give one --fraction, and an --out for each"
        )
    how = how_to(args)
    watched = {name: args[name] for name in ("num_threads", "evaluate_every", "log_every", "save_every")}
    rows: list[dict[str, Any]] = []
    with session(out, hang_seconds=args.hang_seconds) as at:
        loaded = load_encoder(args.run, **encoder_arguments(args))
        source, val = (open_source(data, **cache_arguments(args)) for data in (args.train, args.val))
        if at.ranks.rank == 0:
            warn_of_overlap(source, val)
        for fraction in fractions:
            name = "" if len(fractions) == 1 else f"fraction_{fraction:g}/"
            here, this = replace(at, folder=at.folder / name), replace(how, fraction=fraction)
            found = finetune(loaded, source, val, here, this, **watched, progress=True)
            if found is None:  # told to stop
                break
            rows.append({"fraction": fraction} | found | {"model": files.join(out, name + MODEL)})
            if at.ranks.rank == 0:
                settings = settings_of(loaded, source, val, this)
                ledger.record(ledger.entry("finetune", settings, found, **ledger.judged(loaded)), args.run, out)
    if at.ranks.rank == 0:
        about = {"run": loaded.name, "from_step": loaded.step, "val": val.samples, "out": out}
        about["from"] = loaded.start
        result: dict[str, Any] = {"finished": len(rows) == len(fractions)}
        if rows:
            result = {"finetune": rows[-1]["top1"], **rows[-1], "rows": rows} | result
        print(json.dumps(result | about | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
