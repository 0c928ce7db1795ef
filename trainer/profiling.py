"""Where the time of a step goes: `train.py --profile N`.

1. Five steps pass unmeasured: compilers, autotuners and buffers.
2. N steps are traced by torch.profiler as they run: RUN/trace.json, for chrome://tracing or https://ui.perfetto.dev.
3. N steps are timed with the device synchronised at the end of each phase, so that a phase is charged what it started.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WARM_UP = 5


class Profile:
    """Hears of every phase; a step begins with "data"."""

    def __init__(self, run_dir: Path, steps: int, device: torch.device) -> None:
        self.path, self.steps, self.device = run_dir / "trace.json", steps, device
        self.seconds: dict[str, float] = {}
        self.step = -1
        self.name, self.began = "", 0.0
        self.range: Any = None
        self.trace: Any = None

    def beside(self, other: Callable[[str], None]) -> Callable[[str], None]:
        """A function that tells both what the loop goes on to."""

        def phase(name: str) -> None:
            other(name)
            self.phase(name)

        return phase

    def phase(self, name: str) -> None:
        """The loop goes on to `name`; the phase before it ends."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        timed = self.step >= WARM_UP + self.steps
        if timed:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if self.began:
                self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.began
            self.began = now
        self.name = name
        if name == "data":
            self._next_step()
        if self.trace is not None:
            self.range = torch.profiler.record_function(name)
            self.range.__enter__()

    def _next_step(self) -> None:
        self.step += 1
        if self.step == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.__enter__()
        if self.step == WARM_UP + self.steps:
            self.trace.__exit__(None, None, None)
            self.trace.export_chrome_trace(str(self.path))
            self.trace = None

    def table(self, stages: dict[str, float], images_per_step: int) -> str:
        """Milliseconds a step of each phase, and of the loader's threads beside them since it was last asked."""
        self.phase("end")
        total = sum(self.seconds.values())
        lines = [
            f"{self.steps} steps, each phase followed by a synchronisation; trace of {self.steps} more: {self.path}"
        ]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {name:<16}{1000 * seconds / self.steps:10.2f} ms a step{seconds / total:8.1%}")
        speed = images_per_step * self.steps / total
        lines.append(
            f"  {'all':<16}{1000 * total / self.steps:10.2f} ms a step  = {speed:.0f} images/s without overlap"
        )
        beside = ", ".join(f"{name} {1000 * seconds / (self.step + 1):.1f}" for name, seconds in stages.items())
        lines.append(f"  the loader's own stages, beside the above, ms a step: {beside}")
        return "\n".join(lines)
