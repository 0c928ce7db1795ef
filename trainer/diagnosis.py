"""The meaning of a run's numbers: warnings that name the likely cause and the remedy, and the end at a loss of NaN."""

import math
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from checkpoint import Writer
from trainer.joining import gather_objects
from trainer.metrics import Window


def warnings_before(
    mechanism: str, samples: int, batch_size: int, queue_size: int, lr: float, warmup_epochs: int
) -> dict[str, str]:
    """Warnings that the settings alone call for, before the first step: kind -> explanation."""
    found = {}
    # A memory bank leaves the own sample out of what it draws, and end-to-end has no queue.
    if mechanism == "moco" and queue_size > samples / 10:
        found["queue"] = (
            f"queue_size {queue_size} is {queue_size / samples:.0%} of the {samples} images: an image's own key of an "
            f"earlier step is often among its negatives. At most a tenth, {samples // 10}, is usual (the papers: 5 %)"
        )
    if batch_size > 1024 and not warmup_epochs:
        found["batch"] = (
            f"batch_size {batch_size} with lr {lr} and no warm-up: SGD is known to fail that way above 1024; "
            "try warmup_epochs 10"
        )
    return found


def warnings_during(
    metrics: dict[str, float],
    queue_size: int,
    batch_size: int,
    usual_wait: float,
    bottleneck: str,
    stages: dict[str, float],
) -> dict[str, str]:
    """Warnings that the figures of one log step call for: kind -> explanation. `usual_wait` keeps one slow shard from
    being called a slow loader.

    About loss and accuracy it is silent until the queue was filled twice and 300 steps have gone by: a loss that rises
    from 0 to near chance and accuracies of 100 % are how a young queue looks.
    """
    found: dict[str, str] = {}
    if "loss" not in metrics:
        return found
    step, chance = metrics["step"], math.log(queue_size + 1)
    old = step >= 300 + 2 * queue_size / batch_size
    if old and metrics["loss"] > 0.98 * chance:
        found["chance"] = (
            f"at step {step} the loss is {metrics['loss']:.2f}; ln(queue_size + 1) = {chance:.2f} is that of chance: "
            f"queries do not find their keys. Usual causes: lr {metrics['lr']:.3g} too high for batch {batch_size}, "
            "moco_momentum too low, images that all look alike"
        )
    if old and metrics["accuracy"] > 0.99:
        found["shortcut"] = (
            f"at step {step} pretext accuracy is {metrics['accuracy']:.1%}: the encoder finds its keys by something "
            "easier than the image. Usual causes: batch-norm statistics that give them away (shuffle_bn false, too few "
            "bn_groups), views that are too alike (crop_min near 1), a small queue_size"
        )
    if step > 50 and usual_wait > 0.10:
        parts = {name: stages[name] for name in ("read", "screen", "views", "graph") if name in stages}
        slowest = bottleneck if bottleneck in parts else max(parts, key=parts.__getitem__)
        listed = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in parts.items())
        found["data"] = (
            f"{usual_wait:.0%} of the time is spent waiting for data; the slowest stage is {slowest} "
            f"({listed} since the last log step). These help: more num_threads, smaller stored images (make_shards "
            "--short_side), a --cache_dir on a faster disk for remote shards"
        )
    return found


def stop_if_not_finite(
    window: Window, gather: Callable[[Tensor], Tensor], control: dist.ProcessGroup | None, writer: Writer
) -> None:
    """Reads the losses since the last look, on all ranks. Raises FloatingPointError at one that is NaN or inf, with
    what is needed to find the cause.
    """
    bad = window.settle(gather)
    if bad is None:
        return
    step, rank, loss = bad
    ids = gather_objects(window.sample_ids(step), control)[rank]
    writer.join()
    good = gather_objects(str(writer.last_good or "none"), control)[0]  # rank 0 writes
    shown = ", ".join(map(str, ids[:32])) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
    raise FloatingPointError(
        f"the loss is {loss} at step {step} on rank {rank} (sample ids {shown}); last good checkpoint: {good}. "
        "Usual remedies: bf16 or fp32 instead of fp16, a look at these samples, a new run with a lower lr or a warm-up"
    )
