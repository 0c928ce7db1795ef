"""Fine-tunes an encoder as an FCN, and judges both by mean IoU (MoCo, section 4.2.3 and appendix A.5).

    torchrun --nproc_per_node 8 -m -- transfer.segment --config recipes/segmentation/voc.yaml --run runs/photos \\
        --data VOCdevkit

1. conv5 with dilation 2 instead of its stride, two new 3x3 convolutions of 256 with batch norm, dilation 6, and a 1x1
   convolution; total stride 16. All of it is trained, batch norm with the statistics of all ranks.
2. Images are scaled at random by 0.5 to 2, cropped and mirrored; they are judged whole, at their own size.

The same command continues where it was stopped. OUT holds metrics.jsonl, curves.png, the newest checkpoint, and
segmentation.png, predictions beside the truth.
"""

from transfer import dense_arguments

if __name__ == "__main__":
    ARGUMENTS = dense_arguments.segment()  # before the imports that take seconds

import contextlib
import copy
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN
from torchvision.ops.misc import Conv2dNormActivation
from torchvision.utils import draw_segmentation_masks

from model.encoders import Encoder
from model.sync_batchnorm import synchronise
from pipeline.command import command
from pipeline.pixels.views import MeanStd
from pipeline.progress import Progress
from trainer.build import DTYPES
from transfer import ledger
from transfer.class_maps import IGNORED, ClassMaps, Labelled, augmented, load_labelled, open_class_maps, shrunk
from transfer.dense_training import (
    Schedule,
    folder_after_recipe,
    load_start,
    refuse_foreign_picture,
    schedule_of,
    settings_of,
    share_of,
    training_arguments,
)
from transfer.detection_picture import COLOURS, ROWS, save_rows
from transfer.detectors import dilate, resnet_of, width_of
from transfer.image_batches import loaded_ahead, slots
from transfer.load import LoadedEncoder
from transfer.training import Session, continue_from, evaluations, session, shared, train

PICTURE = "segmentation.png"


@dataclass(frozen=True)
class Protocol:
    """How an FCN is built and trained."""

    schedule: Schedule = field(default_factory=lambda: Schedule(30000, lr=0.003, decay_at=(0.7, 0.9), warmup=0))
    crop: int = 513
    short_side: int | None = None
    head_dilation: int = 6


class Batch(NamedTuple):
    images: Tensor  # fp32 [n, 3, crop, crop], normalised
    classes: Tensor  # int64 [n, crop, crop]


def build_fcn(encoder: Encoder, classes: int, *, head_dilation: int = 6) -> FCN:
    """images fp32 [N, 3, H, W], normalised -> {"out": [N, classes, H, W]}; changes the encoder's backbone. In training
    mode, its batch norms synchronised. ValueError for an encoder that is no ResNet."""
    net = resnet_of(encoder)
    dilate(net.layer4)
    head = nn.Sequential(
        Conv2dNormActivation(width_of(net.layer4), 256, 3, dilation=head_dilation),
        Conv2dNormActivation(256, 256, 3, dilation=head_dilation),
        nn.Conv2d(256, classes, 1),
    )
    return cast(FCN, synchronise(FCN(IntermediateLayerGetter(net, {"layer4": "out"}), head)).train())


def segment(
    loaded: LoadedEncoder,
    train_data: ClassMaps,
    val_data: ClassMaps,
    at: Session,
    protocol: Protocol,
    *,
    num_threads: int = 4,
    **how: Any,
) -> tuple[int, dict[str, float]]:
    """Trains and judges; all ranks call it. Returns the step that it came to, less than `iterations` when told to stop,
    and {"mIoU", "pixel_accuracy"} of the last evaluation, in percent.

    how: `precision`, `evaluate_every`, `save_every`, `log_every` of `transfer.training.train`. Errors as `detect`.
    """
    if train_data.classes != val_data.classes:
        raise ValueError(f"{train_data.name} and {val_data.name} have other classes: they do not belong together")
    schedule, (_, world_size, device) = protocol.schedule, at.ranks
    settings = settings_of("segment", loaded, train_data, val_data, protocol)
    torch.manual_seed(schedule.seed)
    classes = len(train_data.classes)
    net = build_fcn(copy.deepcopy(loaded.encoder), classes, head_dilation=protocol.head_dilation).to(device)
    state = continue_from(at.folder, settings, at.ranks, "FCN")
    refuse_foreign_picture(at.folder / PICTURE, state, at.ranks)
    optimizer = schedule.optimizer(net, decay_norms=True)

    def evaluate(model: nn.Module) -> dict[str, float]:
        dtype = DTYPES[how.get("precision", "fp32")]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            counts = judge(model, val_data, at, protocol, loaded.mean_std, num_threads)
        if world_size > 1:
            dist.all_reduce(counts)
        return mean_iou(counts.cpu())

    order = slots(
        len(train_data.files), schedule.batch_size, schedule.seed, start=state["step"] if state else 0, ranks=at.ranks
    )
    step = train(
        at,
        net,
        optimizer,
        training_batches(train_data, order, protocol, loaded.mean_std, device, num_threads),
        forward,
        lambda step: [schedule.rate(step)] * len(optimizer.param_groups),
        evaluate,
        state=state,
        settings=settings,
        total=schedule.iterations,
        steps_per_epoch=max(1, len(train_data.files) // schedule.batch_size),
        batch_size=schedule.batch_size,
        judged_by="mIoU",
        **how,
    )
    rows = shared(lambda: evaluations(at.folder, "mIoU"), at.ranks)
    return step, {name: rows[-1][name] for name in ("mIoU", "pixel_accuracy")} if rows else {}


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy over the pixels that count: fp32 [1]."""
    logits = model(batch.images)["out"].float()  # [n, C, H, W]
    total = F.cross_entropy(logits, batch.classes, ignore_index=IGNORED, reduction="sum")
    return (total / (batch.classes != IGNORED).sum().clamp(min=1))[None]


def normalised(image: Tensor, mean_std: MeanStd, device: torch.device) -> Tensor:
    """fp32 [3, H, W] of uint8 [3, H, W]."""
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in mean_std)
    return (image.to(device).float() / 255 - mean) / std


def training_batches(
    data: ClassMaps,
    order: Iterator[list[Any]],
    protocol: Protocol,
    mean_std: MeanStd,
    device: torch.device,
    num_threads: int,
) -> Iterator[Batch]:
    def load(item: int, rng: Any) -> Labelled:
        return augmented(shrunk(load_labelled(data, item), protocol.short_side), protocol.crop, mean_std[0], rng)

    with contextlib.closing(loaded_ahead(load, order, threads=num_threads)) as ahead:
        for part in ahead:
            images = torch.stack([normalised(one.image, mean_std, device) for one in part])
            yield Batch(images, torch.stack([one.classes for one in part]).to(device).long())


def judge(
    net: nn.Module, data: ClassMaps, at: Session, protocol: Protocol, mean_std: MeanStd, num_threads: int
) -> Tensor:
    """Pixels of this rank's share, counted by true and by predicted class: int64 [C, C] on the device. Rank 0 draws the
    picture of its first images."""
    classes, (rank, world_size, device) = len(data.classes), at.ranks
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    items = ([(item,)] for item in share_of(len(data.files), at))
    images = loaded_ahead(functools.partial(load_labelled, data), items, threads=num_threads)
    rows = list[tuple[Tensor, Tensor]]()
    label = f"judging on {data.name}" if rank == 0 else ""
    with Progress(label, len(data.files)) as shown, contextlib.closing(images):
        for (one,) in images:
            small = shrunk(one, protocol.short_side)
            logits = net(normalised(small.image, mean_std, device)[None])["out"].float()
            logits = F.interpolate(logits, size=list(one.classes.shape), mode="bilinear")  # nothing where not shrunk
            predicted = logits.argmax(dim=1)[0]
            truth = one.classes.to(device).long()
            counts += count_pairs(truth, predicted, classes)
            if rank == 0 and len(rows) < ROWS:
                rows.append((tinted(one.image, one.classes, classes), tinted(one.image, predicted.cpu(), classes)))
            shown.advance(world_size)
    if rank == 0:
        save_rows(rows, at.folder / PICTURE)
    return counts


def count_pairs(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: pixels by true class and predicted one, without those to ignore."""
    counted = truth != IGNORED
    return torch.bincount(truth[counted] * classes + predicted[counted], minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> dict[str, float]:
    """{"mIoU", "pixel_accuracy"} in percent: the mean of intersection over union over the classes that truth or
    prediction have."""
    right, union = counts.diagonal().double(), (counts.sum(0) + counts.sum(1) - counts.diagonal()).double()
    occurs = union > 0
    iou = right[occurs] / union[occurs]
    return {
        "mIoU": 100 * float(iou.mean()) if len(iou) else 0.0,
        "pixel_accuracy": 100 * float(right.sum() / counts.sum().clamp(min=1)),
    }


def tinted(image: Tensor, found: Tensor, classes: int) -> Tensor:
    """The image uint8 [3, H, W] under the colours of the classes [H, W]; the first one, VOC's background, has none."""
    present = [c for c in range(classes) if bool((found == c).any())]
    drawn = [c for c in present if c > 0]
    if not drawn:
        return image
    masks = torch.stack([found == c for c in drawn])
    return draw_segmentation_masks(image, masks, alpha=0.6, colors=[COLOURS[c % len(COLOURS)] for c in drawn])


def main(args: Namespace) -> None:
    started = time.monotonic()
    protocol = Protocol(schedule_of(args), args.crop, args.short_side, args.head_dilation)
    out = folder_after_recipe(args, "segment")
    with session(out, hang_seconds=args.hang_seconds) as at:
        data = [open_class_maps(Path(args.data), sets, masks=args.masks) for sets in (args.train_set, args.val_set)]
        train_data, val_data = (d.first(args.images) if args.images else d for d in data)
        how = training_arguments(args)
        loaded = load_start(args, says=at.ranks.rank == 0)
        step, figures = segment(loaded, train_data, val_data, at, protocol, num_threads=args.num_threads, **how)
        if at.ranks.rank == 0 and step == args.iterations:
            settings = settings_of("segment", loaded, train_data, val_data, protocol)
            ledger.record(ledger.entry("segment", settings, figures, **ledger.judged(loaded)), args.run, out)
    if at.ranks.rank:
        return
    if step < args.iterations:
        print(json.dumps({"step": step, "total": args.iterations, "finished": False}))
        return
    about = {"train": len(train_data.files), "val": len(val_data.files), "iterations": step, "run": loaded.name}
    about |= {"from_step": loaded.step, "from": loaded.start, "out": out}
    result = {"segment": round(figures["mIoU"], 3), **{name: round(value, 3) for name, value in figures.items()}}
    print(json.dumps(result | about | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS), resumes=True)
