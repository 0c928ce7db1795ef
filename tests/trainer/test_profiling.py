"""--profile's table: every phase counted in every step, nothing twice, the copies to the GPU from the trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import profiling
from trainer.profiling import WARM_UP, Profile, copied_to_device


def copy(name: str, microseconds: float, size: int) -> dict[str, Any]:
    return {"ph": "X", "cat": "gpu_memcpy", "name": name, "ts": 1.0, "dur": microseconds, "args": {"bytes": size}}


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        copy("Memcpy HtoD (Pinned -> Device)", 1500.0, 3_000_000),  # DALI's
        copy("Memcpy HtoD (Pageable -> Device)", 500.0, 1_000_000),
        copy("Memcpy DtoH (Device -> Pageable)", 700.0, 5),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 1.0, "dur": 9.0, "args": {}},
        {"ph": "X", "cat": "kernel", "name": "Memset (Device)", "ts": 1.0, "dur": 9.0, "args": {"bytes": 8}},
    ]
}


def test_the_copies_to_the_gpu_are_those_of_the_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(TRACE))
    assert copied_to_device(tmp_path / "trace.json") == (pytest.approx(2e-3), 4e6)


class FakeTrace:
    """Of torch.profiler.profile, what Profile uses of it."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps(TRACE))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_phase_of_each_step_counts_once(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, synchronised, asked, heard = [0.0], [0], [0], list[str]()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronised.append(1))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: FakeTrace())

    def timings() -> dict[str, float]:
        asked[0] += 1
        return {"read": 0.050, "elapsed": 1.0} if asked[0] == 2 else {"read": 99.0, "elapsed": 99.0}

    profile = Profile(tmp_path, 2, torch.device(device), timings)
    phase = profile.beside(heard.append)
    for step in range(WARM_UP + 4):
        slow = 1.0 if step < WARM_UP + 2 else 0.001
        for name, milliseconds in (("data", 5), ("loss", 2), ("backward", 10), ("loss", 2), ("log", 1)):
            phase(name)
            clock[0] += milliseconds * slow
    said = profile.table(images_per_step=40)

    assert "  backward             10.00 ms a step   50.0%" in said
    assert "  data                  5.00 ms a step   25.0%" in said
    assert "  loss                  4.00 ms a step   20.0%" in said  # twice a step, with accumulation
    assert "  log                   1.00 ms a step    5.0%" in said
    assert "  all                  20.00 ms a step  = 2000 images/s" in said
    assert said.splitlines()[-1].endswith("ms a step: read 25.0")  # of the timed steps only
    assert heard.count("save") == 1
    assert heard[-1] == "log"
    if device == "cuda":
        assert "host to device 1.00 ms and 2.0 MB a step" in said
        assert len(synchronised) > 2 * 2 * 5
    else:
        assert "host to device: nothing, the run is on a CPU" in said
