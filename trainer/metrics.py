"""What a run says about itself: the means since the last log step, where they are written, and warnings that explain.

Between log steps nothing here waits for the device: losses stay tensors, and the time it idles for data is taken with
CUDA events.
"""

import contextlib
import errno
import json
import math
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

UNHEARD = contextlib.suppress(OSError)  # a log file on a full disk, a terminal that is gone: no reason to end a run
FIELDS = ("loss", "accuracy", "positive_logit", "negative_logit")  # of a row


class Window:
    """The steps since the last log step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pending: list[tuple[int, Tensor, Tensor]] = []  # step, row [4] and sample ids [N], on the device
        self.settled: list[list[float]] = []  # rows averaged over the ranks; part of the checkpoint
        self.waits_before: deque[float] = deque(maxlen=10)  # data_wait of the last log steps
        self.restart()

    def restart(self) -> None:
        """Starts the clock again, after a pause that is not training (kNN, saving) as after a log step."""
        self.began, self.steps, self.waits = time.perf_counter(), 0, 0.0
        self.events: list[tuple[Any, Any]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that fetches the batch. On a GPU: the time between the end of the last step's kernels and
        the batch.
        """
        self.steps += 1  # here, as a step that is skipped takes its time too
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self.waits += time.perf_counter() - begun

    def add(self, step: int, rows: list[Tensor], sample_ids: Tensor) -> None:
        """rows: [4] as FIELDS, of each pass of the step."""
        self.pending.append((step, rows[0] if len(rows) == 1 else torch.stack(rows).mean(dim=0), sample_ids))

    def settle(self, gather: Any) -> tuple[int, int, float] | None:
        """Reads the pending rows of all ranks (this waits for the device). Returns the first (step, rank, loss) that
        is not finite, the same on every rank, or None. `gather` puts the ranks' tensors one after another.
        """
        if not self.pending:
            return None
        mine = torch.stack([row for _, row, _ in self.pending])  # [n, 4]
        table = gather(mine[None]).double().cpu()  # [ranks, n, 4]
        self.settled += table.mean(dim=0).tolist()
        bad = (~table[:, :, 0].isfinite()).T.nonzero()  # by step, then by rank
        if len(bad):
            at, rank = (int(i) for i in bad[0])
            return self.pending[at][0], rank, float(table[rank, at, 0])
        self.pending.clear()
        return None

    def sample_ids(self, step: int) -> list[int]:
        """Of one pending step, on this rank."""
        return next((ids.tolist() for s, _, ids in self.pending if s == step), [])

    def means(self, images_per_step: int, temperature: float) -> dict[str, float]:
        """Of the rows settled since the last call, with the speed and the share of time lost waiting for data; restarts
        the clock. Empty when there are no rows: every step was skipped.
        """
        if not self.settled:
            self.restart()
            return {}
        count = len(self.settled)
        values = {name: sum(column) / count for name, column in zip(FIELDS, zip(*self.settled))}
        for name in ("positive_logit", "negative_logit"):  # the rows have cosines
            values[name] /= temperature
        self.settled.clear()
        seconds = max(time.perf_counter() - self.began, 1e-9)
        waited = self.waits + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        values["images_per_second"] = images_per_step * self.steps / seconds
        values["data_wait"] = min(1.0, waited / seconds)
        self.waits_before.append(values["data_wait"])
        self.restart()
        return values

    def usual_wait(self) -> float:
        """The median data_wait of the last ten log steps; 0 while there were fewer than three."""
        return statistics.median(self.waits_before) if len(self.waits_before) >= 3 else 0.0


class Log:
    """metrics.jsonl, and the progress bar or, where the output goes elsewhere than to a terminal, a plain line every
    ten seconds. On rank 0 only.
    """

    def __init__(self, run_dir: Path, *, step: int, total: int, enabled: bool) -> None:
        self.path, self.total, self.enabled, self.printed = run_dir / "metrics.jsonl", total, enabled, 0.0
        self.said: set[str] = set()
        self.bar: tqdm[Any] | None = None
        if not enabled:
            return
        drop_lines_after(self.path, step)
        if sys.stderr.isatty() and sys.stdout.isatty():  # `| tee log` gets the plain lines
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"  # with the figures, 80 columns
            self.bar = tqdm(total=total, initial=step, dynamic_ncols=True, bar_format=shape)

    def step(self) -> None:
        if self.bar is not None:
            with UNHEARD:
                self.bar.update()

    def write(self, values: dict[str, Any]) -> None:
        if not self.enabled:
            return
        # What is not finite (the gradient norm of a step that fp16 skipped) is no JSON.
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
        step, wait, left = values["step"], values["data_wait"], _duration(values["seconds_left"])
        shown = f"loss {values['loss']:.3f}  lr {values['lr']:.3g}  {values['images_per_second']:.0f} img/s"
        if self.bar is not None:
            with UNHEARD:
                self.bar.set_postfix_str(f"{shown}  wait {wait:.0%}  {left} left")
        elif time.monotonic() - self.printed > 10 or step == self.total:
            self.printed = time.monotonic()
            where = f"step {step}/{self.total}  epoch {values['epoch']:.2f}"
            self.say(f"{where}  {shown}  data wait {wait:.0%}  {left} left")

    def has(self, field: str, step: int) -> bool:
        """Whether metrics.jsonl has a value of this field at the step; rank 0's answer counts."""
        if not self.enabled or not self.path.is_file():
            return False
        rows = map(json.loads, self.path.read_text().splitlines())
        return any(row["step"] == step and field in row for row in rows)

    def say(self, text: str) -> None:
        if self.enabled:
            with UNHEARD:
                tqdm.write(text, file=sys.stdout if self.bar is None else sys.stderr)
                sys.stdout.flush()

    def warn(self, found: dict[str, str]) -> None:
        """kind -> text; each kind is said once in a process."""
        for kind, text in found.items():
            if self.enabled and kind not in self.said:
                self.said.add(kind)
                with UNHEARD:
                    tqdm.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            with UNHEARD:
                self.bar.close()


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
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept))
    beside.replace(path)


def warnings_before(samples: int, batch_size: int, queue_size: int, lr: float, warmup_epochs: int) -> dict[str, str]:
    """What the numbers alone say, before the first step: kind -> explanation."""
    found = {}
    if queue_size > samples / 10:
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
    metrics: dict[str, Any],
    queue_size: int,
    batch_size: int,
    usual_wait: float,
    bottleneck: str,
    stages: dict[str, float],
) -> dict[str, str]:
    """What the numbers of one log step say: kind -> explanation. One slow shard is no reason to warn of waiting for
    data, hence `usual_wait`.

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
            f"({listed} since the last log step). What helps: more num_threads, smaller stored images (make_shards "
            "--short_side), a cache_dir for remote shards"
        )
    return found


def memory_gb(device: torch.device) -> float:
    """Peak: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def norm(tensors: list[Tensor]) -> Tensor:
    """Of all of them as one vector; 0-d, on the device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.detach() for t in tensors])))


def _rounded(name: str, value: Any) -> Any:
    """Six digits are enough for people and plots; losses are written whole, so that two runs can be compared bit by
    bit.
    """
    return float(f"{value:.6g}") if isinstance(value, float) and name not in ("loss", "lr") else value


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{s:02d} min"
