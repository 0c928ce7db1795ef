"""Fine-tunes a detector on an encoder, and judges both by average precision (MoCo, section 4.2).

    torchrun --nproc_per_node 8 -m -- transfer.detect --config recipes/detection/voc0712_c4.yaml --run runs/photos \\
        --data VOCdevkit

1. The detector is built on the encoder (`detectors`), and all of it trained, batch norm over all ranks.
2. Images are shrunk to a short side drawn from a list, and mirrored half of the time; nothing else.
3. Before it is judged, its batch norms get their statistics anew from training images (`precise_statistics`).

The recipes are the paper's, and say its results. `--iterations`, `--short_side` and the like shrink them. The same
command continues where it was stopped. OUT holds metrics.jsonl, curves.png, the newest checkpoint, and detections.png,
predictions beside the truth.
"""

from transfer import dense_arguments

if __name__ == "__main__":
    ARGUMENTS = dense_arguments.detect()  # before the imports that take seconds

import contextlib
import copy
import functools
import json
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from model.sync_batchnorm import precise_statistics
from pipeline.command import command
from pipeline.progress import Progress
from trainer.build import DTYPES
from trainer.joining import gather_objects
from transfer import ledger
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
from transfer.detection_data import Annotated, Sample, has, load_sample, open_annotated
from transfer.detection_picture import draw_detections
from transfer.detection_scores import Detection, scores
from transfer.detectors import Body, Task, build_detector
from transfer.image_batches import loaded_ahead, slots
from transfer.load import LoadedEncoder
from transfer.training import Session, continue_from, evaluations, session, shared, train

OF_TASK = {"boxes": "bbox", "masks": "segmentation", "keypoints": "keypoints"}  # what an image must have to train on
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
PICTURE = "detections.png"


@dataclass(frozen=True)
class Protocol:
    """How a detector is built, trained and judged."""

    body: Body = "c4"
    task: Task = "boxes"
    schedule: Schedule = field(default_factory=Schedule)
    short_side: Sequence[int] = (800,)
    long_side: int | None = None
    detections: int = 100
    least_score: float = 0.05
    rois: int = 512
    proposals: int = 1000
    precise_batches: int = 200


class Batch(NamedTuple):
    images: list[Tensor]  # fp32 [3, H, W], from 0 to 1
    targets: list[dict[str, Tensor]]
    sample_ids: Tensor


def detect(
    loaded: LoadedEncoder,
    train_data: Annotated,
    val_data: Annotated,
    at: Session,
    protocol: Protocol,
    *,
    num_threads: int = 4,
    **how: Any,
) -> tuple[int, dict[str, float]]:
    """Trains and judges; all ranks call it. Returns the step that it came to, less than `iterations` when told to stop,
    and the figures of the last evaluation: AP, AP50 and AP75 in percent, of masks and keypoints too.

    how: `precision`, `evaluate_every`, `save_every`, `log_every` of `transfer.training.train`.
    Raises ValueError for data that does not fit the task, an encoder that is no ResNet, a batch that the ranks do not
    divide, a folder with another experiment.
    """
    check_data(train_data, val_data, protocol.task)
    schedule, settings = protocol.schedule, settings_of("detect", loaded, train_data, val_data, protocol)
    train_data = train_data.with_objects(OF_TASK[protocol.task])
    torch.manual_seed(schedule.seed)
    net = detector_of(loaded, len(train_data.classes), len(train_data.joints), protocol).to(at.ranks.device)
    torch.manual_seed(schedule.seed + at.ranks.rank)  # sizes and sampled boxes, not alike on all ranks
    state = continue_from(at.folder, settings, at.ranks, "detector")
    refuse_foreign_picture(at.folder / PICTURE, state, at.ranks)
    losses = (*LOSSES, *{"boxes": (), "masks": ("loss_mask",), "keypoints": ("loss_keypoint",)}[protocol.task])
    optimizer = schedule.optimizer(net, decay_norms=False)

    def batches(start: int, seed: int) -> Generator[Batch]:
        order = slots(len(train_data.files), schedule.batch_size, seed, start=start, ranks=at.ranks)
        return training_batches(train_data, order, protocol.task, at.ranks.device, num_threads)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        found = model(batch.images, batch.targets)
        parts = [found[name].float() for name in losses]
        return torch.stack([torch.stack(parts).sum(), *(part.detach() for part in parts)])

    def arguments(some: Iterable[Batch]) -> Iterator[tuple[Any, ...]]:
        for batch in some:
            at.phase("evaluate")
            yield batch.images, batch.targets

    def evaluate(model: nn.Module) -> dict[str, float]:
        dtype = DTYPES[how.get("precision", "fp32")]
        with torch.autocast(at.ranks.device.type, dtype, enabled=dtype != torch.float32):
            if protocol.precise_batches:
                with contextlib.closing(batches(0, schedule.seed + 1)) as some:
                    precise_statistics(model, arguments(islice(some, protocol.precise_batches)))
                model.eval()
            mine = predict(model, val_data, at, protocol.task, num_threads)
        found = [each for part in gather_objects(mine, at.control) for each in part]
        if at.ranks.rank == 0:
            draw_detections(val_data, found, at.folder / PICTURE, task=protocol.task)
        figures: dict[str, float] = shared(lambda: scores(val_data, found, protocol.task), at.ranks)
        return figures

    step = train(
        at,
        net,
        optimizer,
        batches(0 if state is None else state["step"], schedule.seed),
        forward,
        lambda step: [schedule.rate(step)] * len(optimizer.param_groups),
        evaluate,
        state=state,
        settings=settings,
        total=schedule.iterations,
        steps_per_epoch=max(1, len(train_data.files) // schedule.batch_size),
        batch_size=schedule.batch_size,
        fields=("loss", *losses),
        judged_by="AP",
        **how,
    )
    rows = shared(lambda: evaluations(at.folder, "AP"), at.ranks)
    return step, {name: value for name, value in rows[-1].items() if "AP" in name} if rows else {}


def detector_of(loaded: LoadedEncoder, classes: int, joints: int, protocol: Protocol) -> nn.Module:
    return build_detector(
        copy.deepcopy(loaded.encoder),
        protocol.body,
        protocol.task,
        classes,
        mean_std=loaded.mean_std,
        short_side=protocol.short_side,
        long_side=protocol.long_side,
        keypoints=joints,
        detections=protocol.detections,
        least_score=protocol.least_score,
        rois=protocol.rois,
        proposals=protocol.proposals,
    )


def check_data(train_data: Annotated, val_data: Annotated, task: str) -> None:
    """ValueError for sets that do not belong together, or lack what the task needs."""
    if train_data.classes != val_data.classes:
        raise ValueError(
            f"{train_data.name} has {len(train_data.classes)} classes and {val_data.name} {len(val_data.classes)}, or "
            "they are named otherwise: they do not belong together"
        )
    if task == "keypoints" and not (train_data.joints and train_data.joints == val_data.joints):
        raise ValueError(
            f"keypoints need categories that list them, alike in both sets: {train_data.name} has "
            f"{len(train_data.joints)}, {val_data.name} {len(val_data.joints)} (COCO's are in person_keypoints_*.json)"
        )
    for data in (train_data, val_data):
        if not any(has(each, OF_TASK[task]) for objects in data.objects for each in objects):
            raise ValueError(f"{data.name}: no object of its {len(data.files)} images has a {OF_TASK[task]}")


def training_batches(
    data: Annotated, order: Iterator[list[Any]], task: str, device: torch.device, num_threads: int
) -> Generator[Batch]:
    def load(item: int, rng: Any) -> tuple[int, Sample]:
        return item, load_sample(data, item, task=task, flip=bool(rng.random() < 0.5))

    with contextlib.closing(loaded_ahead(load, order, threads=num_threads)) as ahead:
        for part in ahead:
            images = [sample.image.to(device).float() / 255 for _, sample in part]
            targets = [{name: x.to(device) for name, x in sample.target.items()} for _, sample in part]
            yield Batch(images, targets, torch.tensor([data.images[item]["id"] for item, _ in part]))


def predict(net: nn.Module, data: Annotated, at: Session, task: str, num_threads: int) -> list[Detection]:
    """This rank's share of `data`, one image at a time, as COCO's results."""
    found = list[Detection]()

    def load(item: int) -> tuple[int, Tensor]:
        return item, load_sample(data, item, task="boxes").image

    label = f"judging on {data.name}" if at.ranks.rank == 0 else ""
    images = loaded_ahead(load, ([(item,)] for item in share_of(len(data.files), at)), threads=num_threads)
    with Progress(label, len(data.files)) as shown, contextlib.closing(images):
        for ((item, image),) in images:
            (output,) = net([image.to(at.ranks.device).float() / 255])
            found += results_of({name: x.float().cpu() for name, x in output.items()}, data, item)
            shown.advance(at.ranks.world_size)
    return found


def results_of(output: dict[str, Tensor], data: Annotated, item: int) -> list[Detection]:
    """One image's detections of a torchvision detector as COCO's results."""
    corners = output["boxes"]
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found = []
    for i, (box, label, score) in enumerate(zip(boxes, output["labels"].long().tolist(), output["scores"].tolist())):
        each = {"image_id": data.images[item]["id"], "category_id": data.category_ids[label - 1]}
        each |= {"bbox": box, "score": score}
        if "masks" in output:
            from faster_coco_eval import mask as codec  # an optional package

            mask = (output["masks"][i, 0] > 0.5).numpy().astype("uint8")
            each["segmentation"] = codec.encode(mask[:, :, None].copy(order="F"))[0]
        if "keypoints" in output:
            points = output["keypoints"][i].clone()  # [K, 3]
            points[:, :2] -= 0.5  # as `load_sample` added
            each["keypoints"] = points.flatten().tolist()
        found.append(each)
    return found


def main(args: Namespace) -> None:
    started = time.monotonic()
    out = folder_after_recipe(args, "detect")
    short_side = [int(s) for s in (args.short_side if isinstance(args.short_side, list) else [args.short_side])]
    names = ("body", "task", "long_side", "detections", "least_score", "rois", "proposals", "precise_batches")
    protocol = Protocol(**{name: args[name] for name in names}, short_side=short_side, schedule=schedule_of(args))
    check_installed(args.task)
    with session(out, hang_seconds=args.hang_seconds) as at:
        data = [open_annotated(args.data, names) for names in (args.train_set, args.val_set)]
        train_data, val_data = (d.first(args.images) if args.images else d for d in data)
        loaded = load_start(args, says=at.ranks.rank == 0)
        how = training_arguments(args)
        step, figures = detect(loaded, train_data, val_data, at, protocol, num_threads=args.num_threads, **how)
        if at.ranks.rank == 0 and step == args.iterations:
            settings = settings_of("detect", loaded, train_data, val_data, protocol)
            ledger.record(ledger.entry("detect", settings, figures, **ledger.judged(loaded)), args.run, out)
    if at.ranks.rank:
        return
    if step < args.iterations:
        print(json.dumps({"step": step, "total": args.iterations, "finished": False}))
        return
    about = {"body": args.body, "task": args.task, "iterations": step, "run": loaded.name, "from_step": loaded.step}
    about |= {
        "from": loaded.start,
        "out": out,
        "train": len(train_data.files),
        "val": len(val_data.files),
        "metric": val_data.metric,
    }
    result = {"detect": round(figures["AP"], 3), **{name: round(value, 3) for name, value in figures.items()}, **about}
    print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))


def check_installed(task: str) -> None:
    """ValueError, before anything is read, where the package is missing that COCO's figures and masks need."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise ValueError("detection needs faster-coco-eval: pip install -e '.[detection]'") from None


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS), resumes=True)
