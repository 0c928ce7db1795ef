"""Where the time of a step goes: `train.py --profile N`, on rank 0.

1. Five steps pass unmeasured: compilers, autotuners and buffers.
2. N steps are traced by torch.profiler as they run: RUN/trace.json, for chrome://tracing or https://ui.perfetto.dev.
3. N steps are timed with the device synchronised at the end of each phase, so that a phase is charged what it started.

The phases follow each other, so they add up to the step. "data" is the wait for the batch; waiting for other ranks is
part of the phases that exchange something: key encoder (the end of the shuffle), backward, queue. Work beside the step
is listed apart: the loader's threads, and the copies to the GPU, which DALI makes ahead on a stream of its own.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

WARM_UP = 5


class Profile:
    """Hears of every phase; a step begins with "data". timings: the loader's seconds since it was last asked."""

    def __init__(
        self, run_dir: Path, steps: int, device: torch.device, timings: Callable[[], dict[str, float]]
    ) -> None:
        self.path, self.steps, self.device, self.timings = run_dir / "trace.json", steps, device, timings
        self.seconds: dict[str, float] = {}
        self.step = -1
        self.name, self.began = "", 0.0
        self.range: torch.profiler.record_function | None = None
        self.trace: torch.profiler.profile | None = None

    def beside(self, other: Callable[[str], None]) -> Callable[[str], None]:
        """A function that tells both what the loop goes on to."""

        def phase(name: str) -> None:
            if name == "data" and self.step + 1 == WARM_UP + self.steps:
                other("save")  # writing the trace may take longer than any step
            self.phase(name)
            other(name)

        return phase

    def phase(self, name: str) -> None:
        """The loop goes on to `name`; the phase before it ends."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if self.step >= WARM_UP + self.steps:
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + self._now() - self.began
        if name == "data":
            self._next_step()
        self.name = name
        if self.trace is not None:
            self.range = torch.profiler.record_function(name)
            self.range.__enter__()
        if self.step >= WARM_UP + self.steps:
            self.began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _next_step(self) -> None:
        self.step += 1
        if self.step == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.__enter__()
        if self.step == WARM_UP + self.steps:
            assert self.trace is not None
            self.trace.__exit__(None, None, None)
            self.trace.export_chrome_trace(str(self.path))
            self.trace = None
            self.timings()  # those of the steps so far

    def table(self, images_per_step: int) -> str:
        """Milliseconds a step of each phase, and beside them of the copies to the GPU and of the loader's threads."""
        self.phase("end")
        stages = self.timings()
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
        if self.device.type == "cuda":
            seconds, size = copied_to_device(self.path)
            lines.append(
                f"  beside them, from the trace: host to device {1000 * seconds / self.steps:.2f} ms and "
                f"{size / self.steps / 1e6:.1f} MB a step"
            )
        else:
            lines.append("  host to device: nothing, the run is on a CPU")
        beside = ", ".join(
            f"{name} {1000 * seconds / self.steps:.1f}" for name, seconds in stages.items() if name != "elapsed"
        )
        lines.append(f"  beside them, the loader's own stages, ms a step: {beside}")
        return "\n".join(lines)


def copied_to_device(trace: Path) -> tuple[float, float]:
    """Seconds and bytes of the host-to-device copies in a trace, on whichever stream: torch's and DALI's."""
    events = json.loads(trace.read_text())["traceEvents"]
    copies = [event for event in events if event.get("ph") == "X" and event["name"].startswith("Memcpy HtoD")]
    return sum(event["dur"] for event in copies) / 1e6, float(sum(event["args"].get("bytes", 0) for event in copies))
