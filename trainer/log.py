"""The output of a run: metrics.jsonl, the progress bar or plain lines, notes and warnings. Rank 0 speaks for all."""

import errno
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.files import write_atomically
from pipeline.progress import IGNORE_LOG_ERRORS, LINE_EVERY, Progress, duration, say_if_slow


class Log:
    """metrics.jsonl, and the progress bar or, where the output goes elsewhere than to a terminal, a plain line every
    ten seconds: with the figures where there are new ones, else with the step alone. On rank 0 only.
    """

    def __init__(self, run_dir: Path, *, step: int, total: int, enabled: bool) -> None:
        self.path, self.total, self.enabled = run_dir / "metrics.jsonl", total, enabled
        self.figures_are_due = True  # the first ones, and those after a line without any
        self.figures_came = -math.inf  # when
        self.said: set[str] = set()
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"  # with the figures, 80 columns
        label = "training" if enabled and sys.stdout.isatty() else ""  # `| tee log` gets the plain lines
        self.progress = Progress(label, total, unit="steps", done=step, lines=False, bar_format=shape)
        self.first_step: threading.Timer | None = None
        if enabled:
            drop_lines_after(self.path, step)

    def begin(self) -> None:
        """Right before the first step, which fills buffers, compiles and tunes."""
        if self.enabled:
            self.began, self.first_step = time.monotonic(), say_if_slow("training: the first step takes longest")

    def step(self) -> None:
        self.progress.advance()
        if self.first_step is not None:
            self.first_step.cancel()
        without_figures = time.monotonic() - self.figures_came > LINE_EVERY
        if self.enabled and self.progress.bar is None and without_figures and self.progress.is_due():
            self.figures_are_due = True
            self.say(f"step {self.progress.done}/{self.total}  {duration(time.monotonic() - self.began)} so far")

    def write(self, values: dict[str, Any]) -> None:
        if not self.enabled:
            return
        # JSON has no inf and NaN, which the gradient norm of a step that fp16 skipped is.
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        line = json.dumps({k: _rounded(k, v) for k, v in values.items()}).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk costs the line, not the run
            self.warn({"metrics": f"cannot write {self.path}: {error}"})
        if "loss" not in values:
            return
        self.figures_came = time.monotonic()
        step, wait, left = values["step"], values["data_wait"], duration(values["seconds_left"])
        shown = f"loss {values['loss']:.3f}  lr {values['lr']:.3g}  {values['images_per_second']:.0f} img/s"
        if self.progress.bar is not None:
            self.progress.note = f"{shown}  wait {wait:.0%}  {left} left"
        elif self.progress.is_due() or self.figures_are_due or step == self.total:
            self.figures_are_due = False
            where = f"step {step}/{self.total}  epoch {values['epoch']:.2f}"
            self.say(f"{where}  {shown}  data wait {wait:.0%}  {left} left")

    def has(self, field: str, step: int) -> bool:
        """Whether metrics.jsonl has a value of this field at the step; rank 0's answer counts."""
        if not self.enabled or not self.path.is_file():
            return False
        rows = map(json.loads, self.path.read_text().splitlines())
        return any(row["step"] == step and field in row for row in rows)

    def say(self, text: str) -> None:
        if self.progress.bar is not None:
            self.progress.say(text)
        elif self.enabled:
            with IGNORE_LOG_ERRORS:
                print(text, flush=True)

    def warn(self, found: dict[str, str]) -> None:
        """kind -> text; each kind is said once in a process."""
        for kind, text in found.items():
            if self.enabled and kind not in self.said:
                self.said.add(kind)
                self.progress.say(f"warning: {text}")

    def close(self) -> None:
        if self.first_step is not None:
            self.first_step.cancel()
        self.progress.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Removes what a killed run logged after its last checkpoint, and a line it did not finish: those steps come
    again.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_atomically(path, "".join(kept).encode())


def _rounded(name: str, value: Any) -> Any:
    """Six digits are enough for people and plots; losses are written whole, so that two runs can be compared bit by
    bit.
    """
    return float(f"{value:.6g}") if isinstance(value, float) and name not in ("loss", "lr") else value
