"""Means over the steps since the last log step, their speed, and the share of time lost waiting for data.

Between log steps nothing here waits for the device: losses stay tensors, and the time it idles for data is taken with
CUDA events.
"""

import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FIELDS = ("loss", "accuracy", "positive_logit", "negative_logit")  # of a row of train.py


class Window:
    """The steps since the last log step."""

    def __init__(self, device: torch.device, fields: tuple[str, ...] = FIELDS) -> None:
        self.device, self.fields = device, fields
        self.pending: list[tuple[int, Tensor, Tensor]] = []  # step, row [F] and sample ids [N], on the device
        self.settled: list[list[float]] = []  # rows averaged over the ranks; part of the checkpoint
        self.waits_before: deque[float] = deque(maxlen=10)  # data_wait of the last log steps
        self.restart()

    def restart(self) -> None:
        """Starts the clock again, after a pause that is not training (kNN, saving) as after a log step."""
        self.began, self.steps, self.waits = time.perf_counter(), 0, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

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
        """rows: [F] as `fields`, of each pass of the step."""
        self.pending.append((step, rows[0] if len(rows) == 1 else torch.stack(rows).mean(dim=0), sample_ids))

    def settle(self, gather: Callable[[Tensor], Tensor]) -> tuple[int, int, float] | None:
        """Reads the pending rows of all ranks (this waits for the device). Returns the first (step, rank, loss) that
        is not finite, the same on every rank, or None. `gather` puts the ranks' tensors one after another.
        """
        if not self.pending:
            return None
        mine = torch.stack([row for _, row, _ in self.pending])  # [n, F]
        table = gather(mine[None]).double().cpu()  # [ranks, n, F]
        self.settled += table.mean(dim=0).tolist()
        bad = (~table[:, :, 0].isfinite()).T.nonzero()  # by step, then by rank
        if len(bad):
            at, rank = (int(i) for i in bad[0])
            return self.pending[at][0], rank, float(table[rank, at, 0])
        self.pending.clear()
        return None

    def sample_ids(self, step: int) -> list[int]:
        """The sample ids of one pending step, on this rank."""
        return next((ids.tolist() for s, _, ids in self.pending if s == step), [])

    def means(self, images_per_step: int, temperature: float = 1.0) -> dict[str, float]:
        """The means of the rows settled since the last call, with the speed and the share of time lost waiting for
        data; restarts the clock. Empty when there are no rows: every step was skipped.
        """
        if not self.settled:
            self.restart()
            return {}
        count = len(self.settled)
        values = {name: sum(column) / count for name, column in zip(self.fields, zip(*self.settled))}
        for name in values.keys() & {"positive_logit", "negative_logit"}:  # the rows have cosines
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


def memory_gb(device: torch.device) -> float:
    """Peak: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors as one vector; 0-d, on the device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.detach() for t in tensors])))


def norm_of_gradients(net: nn.Module, scaler: torch.amp.GradScaler | None) -> Tensor:
    """0-d, on the device; without the factor that fp16's gradient scaler puts on."""
    scale = scaler.get_scale() if scaler is not None else 1.0
    return norm([p.grad for p in net.parameters() if p.grad is not None]) / scale
