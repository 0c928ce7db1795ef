"""Trainings for the tests: a tiny recipe, and a server that forks them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, cpu_environment, free_port

TINY: dict[str, Any] = {
    "arch": "timm:test_resnet",  # 0.4M parameters, batch norm throughout
    "image_size": 32,
    "batch_size": 12,
    "bn_groups": 2,
    "queue_size": 40,  # 12 does not divide it: the pointer wraps in mid-batch
    "dim": 16,
    "lr": 0.02,
    "temperature": 0.2,
    "views": "cifar",
    "epochs": 4,
    "precision": "fp32",
    "num_threads": 1,
    "log_every": 1,
    "save_every": 1000,
    "trackers": "[]",
}

# Put in front of a run's patch where no test looks at the picture: to draw takes 0.6 s, more than the steps.
WITHOUT_CURVES = "import train; train.curves.draw = lambda out: 'not drawn in this test'\n"


class Runs:
    """Starts trainings through one fork server."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=cpu_environment(),
        )
        assert self._answer() == {"ready": True}

    def start(self, out: Path, data: Path | list[Path], *, ranks: int = 1, **options: Any) -> list[int]:
        """Returns pids. Options beside the recipe's fields: recipe (a file instead of TINY), patch (code
        run in the child first), curves (True: draws them at the end), largest_file, env, url (that of --out; `out` then
        names the log alone). A list is one value for each rank."""
        command = {name: options.pop(name) for name in ("largest_file", "env") if name in options}
        patch = ("" if options.pop("curves", False) else WITHOUT_CURVES) + options.pop("patch", "")
        file = options.pop("recipe", None)
        fields = ({} if file else TINY) | {"data": data, "out": options.pop("url", out)} | options
        arguments = (["--config", str(file)] if file else []) + flags(fields)
        out.parent.mkdir(parents=True, exist_ok=True)
        command |= {
            "arguments": arguments,
            "ranks": ranks,
            "log": str(log_of(out)),
            "port": free_port(),
            "patch": patch,
        }
        return self._ask(command)["pids"]

    def wait(self, pids: list[int], timeout: float = 150) -> list[int | None]:
        return self._ask({"wait": pids, "timeout": timeout})["codes"]

    def train(self, out: Path, data: Path | list[Path], **options: Any) -> list[int | None]:
        """Starts and waits; exit codes by rank."""
        return self.wait(self.start(out, data, **options))

    def command(
        self, program: Path, arguments: Sequence[str | Path], folder: Path, *, ranks: int = 1, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program as `python PROGRAM ARGUMENTS`, its output in files of `folder`. The return code is that of the
        first rank that has another than 0. AssertionError when it takes longer than `timeout` seconds."""
        out, errors = folder / "stdout", folder / "stderr"
        for file in (out, errors):
            file.write_text("")
        pids = self._ask(
            {
                "program": str(program), "arguments": list(map(str, arguments)), "ranks": ranks, "log": str(out),
                "errors": str(errors), "env": cpu_environment(), "port": free_port(),
            }
        )["pids"]  # fmt: skip
        codes = self.wait(pids, timeout)
        for pid, code in zip(pids, codes):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        assert None not in codes, f"{program} runs longer than {timeout} s: {errors.read_text()[-8000:]}"
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess([str(program)], code, out.read_text(), errors.read_text())

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.kill()
        self.server.wait()
        self.server.stdin.close()
        self.server.stdout.close()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())


def flags(fields: dict[str, Any]) -> list[Any]:
    """Of train.py."""
    return [part for name, value in fields.items() for part in (f"--{name}", _text(value))]


def _text(value: Any) -> Any:
    return (
        [_text(v) for v in value]
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out) if "loss" in row]


def wait_for_step(out: Path, step: int, timeout: float = 120) -> None:
    """Until metrics.jsonl knows of `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").is_file():
            lines = (out / "metrics.jsonl").read_text().splitlines()
            if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} in {out}: {log_of(out).read_text()[-2000:]}")
