"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a lost run.

Written beside, fsynced, renamed: a file named step_00000100.pt is whole. Read back only after every record's checksum
(the CRC-32 that torch.save's zip container holds) agrees; when the newest is damaged the one before it is taken.
Nothing is unpickled but tensors and plain values (`weights_only`).
"""

import contextlib
import os
import pickle
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline.files import writing_beside

NAME = re.compile(r"step_(\d{8,})\.pt")


def directory(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def save(run_dir: str | Path, state: dict[str, Any], *, step: int, keep: int, keep_every: int = 0) -> Path:
    """Writes RUN/checkpoints/step_{step:08d}.pt, then removes all but the `keep` newest and those whose step is a
    multiple of `keep_every` (in steps; 0: none). Raises OSError when the file cannot be written; the older
    checkpoints are then untouched. Later steps do not count as newest: they are damaged, or the run would have
    continued from them.
    """
    folder = directory(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    try:
        with writing_beside(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # of torch's zip writer, whose own words do not say that the disk is full
        raise OSError(f"{path}: {error.__context__ or error}") from error
    _fsync_folder(folder)
    for old in superseded(list_steps(run_dir), step, keep=keep, keep_every=keep_every):
        path_of(run_dir, old).unlink(missing_ok=True)
    return path


def superseded(steps: list[int], newest: int, *, keep: int, keep_every: int) -> list[int]:
    """Those of `steps`, ascending, that are not kept once `newest` is saved; as in `save`."""
    older = [step for step in steps if step <= newest][:-keep]
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def list_steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending. Other files there, such as somebody's copies, are
    left alone.
    """
    return steps_in(path.name for path in directory(run_dir).glob("step_*.pt"))


def steps_in(names: Iterable[str]) -> list[int]:
    """The steps of those names that a checkpoint can have, ascending."""
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def path_of(run_dir: str | Path, step: int) -> Path:
    return directory(run_dir) / f"step_{step:08d}.pt"


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint's path, unverified; None when there is none."""
    steps = list_steps(run_dir)
    return path_of(run_dir, steps[-1]) if steps else None


def load(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """Verifies every record's checksum, then reads. Raises FileNotFoundError, and ValueError when the file is damaged
    or not one of this program's.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
        if broken is not None:
            raise ValueError(f"{path} is damaged: checksum of {broken} differs")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:  # its own words advise to load the file unsafely
        raise ValueError(
            f"{path} is not a checkpoint of this program, or is damaged: it holds more than tensors and plain values, "
            "and nothing of it was run"
        ) from None
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this program: it holds a {type(state).__name__}")
    return state


def load_newest(run_dir: str | Path, map_location: str = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that verifies, warning about each damaged one passed over; None when the folder holds
    none. Raises ValueError when it holds some and all are damaged.
    """
    steps = list_steps(run_dir)
    for step in reversed(steps):
        try:
            return load(path_of(run_dir, step), map_location)
        except ValueError as error:
            print(f"warning: {error}; taking the checkpoint before it", file=sys.stderr, flush=True)
    if steps:
        raise ValueError(
            f"all {len(steps)} checkpoints in {directory(run_dir)} are damaged; remove the folder to begin again"
        )
    return None


def snapshot(state: Any) -> Any:
    """The state with every tensor copied to the host, so that training may go on while it is written. The copy is the
    only part of saving that training waits for.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


class Writer:
    """Writes snapshots in a background thread, one at a time. A write that fails is a warning, not the end of the
    run.

    `upload` copies the run folder to the URL that it is kept at, and is called in the same thread after each write.
    """

    def __init__(
        self, run_dir: str | Path, *, keep: int, keep_every: int = 0, upload: Callable[[], None] | None = None
    ) -> None:
        self.run_dir, self.keep, self.keep_every, self.upload = Path(run_dir), keep, keep_every, upload
        self.last_good: Path | None = latest(run_dir)
        self.problem = ""  # why the last write failed
        self.seconds = 0.0  # of the last write
        self._thread: threading.Thread | None = None
        # A writer that was killed leaves its unfinished file behind.
        for leftover in directory(run_dir).glob(".step_*.tmp"):
            leftover.unlink(missing_ok=True)

    def submit(self, state: dict[str, Any], step: int) -> None:
        """Takes a snapshot of `state` and returns; waits first for a write still under way."""
        self.join()
        copy = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(copy, step), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: dict[str, Any], step: int) -> None:
        begin = time.perf_counter()
        try:
            self.last_good = save(self.run_dir, state, step=step, keep=self.keep, keep_every=self.keep_every)
            self.problem = ""
        except OSError as error:
            self.problem = f"{error}; the same command repeats them"
            self._warn(f"step {step} not saved ({error}); the last checkpoint is {self.last_good or 'none'}")
        else:
            try:
                if self.upload is not None:
                    self.upload()
            except (OSError, ValueError) as error:
                self.problem = f"{error}; they are in {self.run_dir} alone, and the same command uploads them"
                self._warn(f"step {step} is saved in {self.run_dir} alone ({error}); the next save uploads again")
        self.seconds = time.perf_counter() - begin

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log may be on the same disk
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself, else a power cut may undo it
    finally:
        os.close(descriptor)
