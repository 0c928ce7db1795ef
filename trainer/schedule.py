"""Learning rate and momentum: pure functions of the optimiser step, the same for any number of ranks and restarts.

No scheduler object: one that accelerate prepares steps once per process, and its state is one more thing to save."""

import math


def learning_rate(
    step: int,
    *,
    lr: float,
    schedule: str,
    steps_per_epoch: int,
    epochs: int = 0,
    milestones: tuple[int, ...] = (),
    decay: float = 0.1,
    decay_steps: int = 1,
    warmup_epochs: int = 0,
) -> float:
    """The rate of optimiser step `step`, counted from 0.

    "step" and "cosine" change once an epoch, as the reference code does: lr * decay**(milestones passed), and lr * (1
    + cos(pi * epoch / epochs)) / 2. "cosine_from_1" is that of the reference's CIFAR-10 demo, which counts epochs from
    1: the first one is already below lr, and the last one's rate is 0. "exponential" is the IG-1B schedule of MoCo v1
    (section 4): lr * decay**(step // decay_steps). A warm-up multiplies the schedule by a line that reaches 1 at the
    end of `warmup_epochs`; the papers have none.
    """
    epoch = step // steps_per_epoch
    if schedule == "step":
        lr *= decay ** sum(epoch >= milestone for milestone in milestones)
    elif schedule in ("cosine", "cosine_from_1"):
        counted = epoch + (schedule == "cosine_from_1")
        lr *= 0.5 * (1.0 + math.cos(math.pi * counted / epochs))
    elif schedule == "exponential":
        lr *= decay ** (step // decay_steps)
    elif schedule != "constant":
        raise ValueError(f"schedule {schedule!r} is none of step, cosine, cosine_from_1, exponential, constant")
    return lr * min(1.0, (step + 1) / max(1, warmup_epochs * steps_per_epoch))


def key_momentum(step: int, *, momentum: float, schedule: str, total_steps: int) -> float:
    """m of equation 2 at optimiser step `step`, counted from 0.

    "constant" is the paper's. "cosine" rises from `momentum` at the first step to 1 at `total_steps`, as MoCo v3 has it
    (Chen et al. 2021, appendix): 1 - (1 - momentum) * (1 + cos(pi * step / total_steps)) / 2.
    """
    if schedule == "constant":
        return momentum
    if schedule != "cosine":
        raise ValueError(f"momentum schedule {schedule!r} is none of constant, cosine")
    return 1.0 - (1.0 - momentum) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
