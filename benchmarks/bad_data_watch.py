"""Runs the jobs of bad_data.py in processes of their own, under limits of time and memory, and says how they ended."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

SYSTEMS = Path(__file__).with_name("bad_data_systems.py")
LOOK_EVERY = 0.05  # seconds
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
GROWN = 16 << 20  # bytes of RSS from which on PSS, which takes the kernel longer, is asked again
STARTING = 300.0  # seconds that importing may take


class Limits(NamedTuple):
    """For a job: processor seconds, seconds of the clock (a busy machine is no hang), bytes of its process tree."""

    processor: float
    clock: float
    memory: int


class Ended(NamedTuple):
    """How: "" as it should, "exception", "signal 11", "hang" or "memory". Memory is PSS of the tree, at its peak."""

    how: str
    message: str
    megabytes: int
    processor: float


class NotInstalled(Exception):
    """The system cannot be imported here; the message says what is missing."""


class Server:
    """A process that has imported a system and forks another for each job, so that a job begins within milliseconds."""

    def __init__(self, system: str, python: str, folder: Path) -> None:
        self.folder = folder
        errors = folder / "server.log"
        # A core of its own for the threads of NumPy and torch is not what is measured here.
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        with errors.open("wb") as log:
            self.process = subprocess.Popen(
                [python, str(SYSTEMS), system],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                text=True,
            )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            ready = self.lines.get(timeout=STARTING) == "ready"
        except queue.Empty:
            ready = False
        if not ready:
            self.close()
            raise NotInstalled((errors.read_text().strip().splitlines() or ["it did not start"])[-1])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put("")

    def run(self, job: dict[str, Any], limits: Limits) -> Ended:
        """Sends a job and watches over it. All that it printed is in its log."""
        assert self.process.stdin is not None
        error = Path(job["error"])
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        process = int(self.lines.get(timeout=60))
        began, before = time.monotonic(), _used(process)
        rss_seen = pss_seen = 0
        used, killed = 0.0, ""
        while True:
            try:
                code = int(self.lines.get(timeout=LOOK_EVERY))
                break
            except queue.Empty:
                pass
            rss, used = _rss(self.process.pid), max(used, _used(process) - before)
            if rss > rss_seen + GROWN or not pss_seen:
                rss_seen = max(rss, rss_seen)
                pss_seen = max(pss_seen, _pss(self.process.pid))
            over = used > limits.processor or time.monotonic() - began > limits.clock
            if not killed and (pss_seen > limits.memory or over):
                killed = "memory" if pss_seen > limits.memory else "hang"
                _kill(process)
        _kill(process)  # what it may have left behind
        megabytes = round(pss_seen / 1e6)
        if killed == "memory":
            return Ended("memory", f"stopped at {pss_seen / 1e9:.1f} GB", megabytes, used)
        if killed:
            seconds = f"{used:.0f} s of the processor, {time.monotonic() - began:.0f} s of the clock"
            return Ended("hang", f"stopped after {seconds}", megabytes, used)
        if code < 0:
            return Ended(f"signal {-code}", signal.Signals(-code).name, megabytes, used)
        message = error.read_text().strip() if code and error.exists() else ""
        return Ended("exception" if code else "", message, megabytes, used)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own: of ours nothing else is in it
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def processes_below(root: int) -> list[int]:
    """A process and those below it."""
    found = [root]
    for process in found:
        with contextlib.suppress(OSError):  # it has ended
            for thread in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208 (thirty times a second)
                with open(f"/proc/{process}/task/{thread}/children") as file:  # noqa: PTH123
                    found += map(int, file.read().split())
    return found


def _stat(root: int) -> list[list[int]]:
    """The numbers of /proc/PID/stat of a process and those below it, from the parent's (field 4) on."""
    numbers = []
    for process in processes_below(root):
        with contextlib.suppress(OSError):
            numbers.append([int(v) for v in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1:]])
    return numbers


def _rss(root: int) -> int:
    """Bytes of memory of a process and those below it; pages that they share count once in each."""
    return PAGE * sum(numbers[20] for numbers in _stat(root))


def _used(root: int) -> float:
    """Processor seconds of a process, those below it, and those of them that have ended."""
    return sum(sum(numbers[10:14]) for numbers in _stat(root)) / TICKS


def _pss(root: int) -> int:
    """Memory as in `_rss`, but with each page that several processes share divided between them."""
    total = 0
    for process in processes_below(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total
