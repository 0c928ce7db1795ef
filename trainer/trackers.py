"""TensorBoard, W&B and accelerate's other trackers, beside metrics.jsonl. A tracker that fails costs its curves, never
the run.
"""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recipe as recipes
from recipe import Recipe
from trainer.log import Log


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not here."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracker {name} is not installed: pip install {name}, or leave it out of --trackers")


def start(init_trackers: Callable[..., None], r: Recipe, step: int, *, is_main: bool) -> None:
    """TensorBoard goes into RUN/moco; W&B gets the recipe, and goes on with the W&B run of this folder. Raises
    ValueError when a tracker does not start.
    """
    # Without purge_step, what a killed run showed of steps that come again would be there twice; also from step 0 on.
    options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
    if "wandb" in r.trackers and is_main:
        options["wandb"] = wandb_options(Path(r.out)) | {"config": recipes.to_dict(r)}
    stdin = sys.stdin
    try:
        # Without a terminal W&B does not ask for an account, which would hold up all ranks, but says what to do.
        with Path(os.devnull).open() as sys.stdin:
            init_trackers("moco", init_kwargs=options)
    except Exception as error:  # each tracker has errors of its own
        hint = ", or set WANDB_MODE=offline and `wandb sync` later" if "wandb" in r.trackers else ""
        text = f"a tracker does not start: {str(error).rstrip('.')}{hint}, or leave it out of --trackers"
        raise ValueError(text) from error
    finally:
        sys.stdin = stdin


def wandb_options(out: Path) -> dict[str, Any]:
    """The same W&B run as long as the folder is the same, and never that of another folder with the same name."""
    file = out / "wandb_id"
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    os.environ.setdefault("WANDB_CACHE_DIR", str(out / "wandb" / "cache"))  # its logs; ~/.cache otherwise
    return {"name": out.name, "id": file.read_text().strip(), "resume": "allow", "dir": str(out)}


def track(send: Callable[..., None], log: Log, metrics: dict[str, float]) -> None:
    try:
        send({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])
    except Exception as error:  # a full disk, W&B's process killed
        log.warn({"trackers": f"a tracker fails, its curves may end here: {type(error).__name__}: {error}"})


def finish(end_training: Callable[[], None]) -> None:
    """The run is saved and over by now."""
    try:
        end_training()
    except Exception as error:
        print(f"warning: a tracker did not close: {type(error).__name__}: {error}", file=sys.stderr)
