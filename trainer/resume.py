"""Continuing a run: may this recipe continue it, which checkpoint do all ranks take, and the random generators."""

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import checkpoint
import recipe as recipes
from recipe import BY_EPOCH, CHANGEABLE, Recipe
from trainer.run_views import comparable

PARTS = {"step", "encoder", "moco", "optimizer", "scaler", "loader", "rng", "metrics"}  # that continuing needs
WRITTEN_OVER = (
    "recipe.yaml", "metrics.jsonl", "quarantine.jsonl", "finished", "wandb_id", "curves.png", "trace.json",
)  # fmt: skip


def refuse_foreign_folder(out: Path) -> None:
    """ValueError when `out` holds files that a run would write over, and no run of this program has been there."""
    lock = out / ".lock"
    if lock.is_file() and not re.match(rb"on .*, process \d+|$", lock.read_bytes()[:300]):
        raise ValueError(f"{lock} is not of this program: give another --out, or move it away")
    if lock.exists() or (out / ".pull").exists() or checkpoint.list_steps(out):
        return
    found = [name for name in WRITTEN_OVER if (out / name).exists()]
    if found == ["metrics.jsonl"] and _is_log(out / found[0]):
        return  # of an earlier version, which was killed before its first checkpoint
    if found:
        raise ValueError(
            f"{out} holds {', '.join(found)} and no run of this program: give another --out, or move them away"
        )


def _is_log(path: Path) -> bool:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return all({"step", "loss"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def compare_recipes(out: Path, r: Recipe) -> list[str]:
    """Against RUN/recipe.yaml, if there is a checkpoint: a line for each field that differs and may. Raises ValueError
    naming those that may not, because the run would not be the same experiment.
    """
    path = out / "recipe.yaml"
    if not path.is_file() or not checkpoint.list_steps(out):
        return []
    old = recipes.load(path)
    changed = recipes.differences(old, r)
    for name in ("out", "views", "key_views", "crop_min", "mean", "std"):
        changed.pop(name, None)
    before, now = comparable(old), comparable(r)
    changed |= {n: (before.get(n), now.get(n)) for n in before | now if before.get(n) != now.get(n)}
    fatal = {name: values for name, values in changed.items() if name not in CHANGEABLE}
    if fatal:
        listed = ", ".join(f"{name} {old!r} there and {new!r} now" for name, (old, new) in fatal.items())
        raise ValueError(
            f"{out} holds a run with another recipe: {listed}. Give another --out, or the same values to continue it"
        )
    notes = [f"{name} changes from {old!r} to {new!r}" for name, (old, new) in changed.items()]
    if "bn_groups" in changed:
        was, size = (r.batch_size / groups for groups in changed["bn_groups"])
        notes.append(f"batch norm was over groups of {was:g} images, and is over groups of {size:g} from here on")
    if "epochs" in changed and r.schedule in BY_EPOCH:
        notes.append(f"the {r.schedule} schedule is that of {r.epochs} epochs from here on")
    return notes


def load_newest(out: Path, group: dist.ProcessGroup | None) -> dict[str, Any] | None:
    """The newest checkpoint that verifies; rank 0 chooses, so that all ranks take the same one. None when there is
    none. ValueError when it lacks a part that continuing needs.
    """
    state = None
    chosen: list[Any] = [None, ""]  # step, why it cannot be read
    is_rank_0 = group is None or dist.get_rank() == 0
    if is_rank_0:
        try:
            state = checkpoint.load_newest(out)
            if state is not None and (missing := sorted(PARTS - state.keys())):
                raise ValueError(
                    f"the newest checkpoint in {out} is of another version of this program: it has no "
                    f"{', '.join(missing)}; continue with that version, or give another --out"
                )
            chosen[0] = state and state["step"]
        except ValueError as error:
            chosen[1] = str(error)
    if group is not None:
        dist.broadcast_object_list(chosen, src=0, group=group)
    step, problem = chosen
    if problem:
        raise ValueError(problem)
    if step is None or is_rank_0:
        return state
    path = checkpoint.path_of(out, step)
    try:
        return checkpoint.load(path)
    except FileNotFoundError:
        raise ValueError(f"no {path} here: --out must be on storage that all machines share") from None


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Around the loading of a checkpoint's parts: ValueError that names the file, whatever does not fit."""
    try:
        yield
    except ValueError as error:  # the loader's, which says what changed
        raise ValueError(f"{path}: {error}") from None
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no checkpoint of this recipe: {type(error).__name__}: {reason[:200]}; take the file out of the "
            "folder, or give another --out"
        ) from None


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this rank's generators, in plain values and tensors. Order, views, shuffles and queue do not depend
    on them; dropout would.
    """
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is what others may draw from
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


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
