"""The watchdog: every rank says where it is, and when one dies or hangs the others name it and end."""

import contextlib
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
PATIENT = 1800.0  # seconds that start-up, judging and saving may take
UNHURRIED = ("start", "knn", "evaluate", "save")  # phases with that allowance

Places = dict[int, tuple[int, int, str, str]]  # rank -> phases gone through, step, phase, host and process


class Watchdog(threading.Thread):
    """Where this rank is, told to the others every second through the rendezvous store; ends the process when any
    rank is lost.

    A rank is lost when it gives no sign of life for `seconds`, or when nobody makes progress for that long (or five
    times the slowest step so far): then the one that is behind is named. Only a process that is gone cannot say so
    itself, hence the others do.
    """

    def __init__(self, rank: int, ranks: int, seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # for the rank that finds this one hanging
        self.rank, self.ranks, self.seconds = rank, ranks, seconds
        self.step, self.name_of_phase, self.ticks = 0, "start", 0
        self._changed = self._step_began = time.monotonic()
        self._slowest, self._steps = 0.0, 0
        self._over = threading.Event()
        self._seen = {r: (b"", time.monotonic()) for r in range(ranks)}
        self._where = f"{socket.gethostname()} {os.getpid()}"
        self._store: dist.Store | None = None
        if ranks > 1:
            # A connection of its own: the group's is locked while the main thread waits in it.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
            # torchrun keeps one store over its restarts
            self._store = dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self._publish()

    def phase(self, name: str) -> None:
        """Called by the loop wherever it goes on to something else; every rank goes through the same phases."""
        now = time.monotonic()
        if self.name_of_phase in UNHURRIED:
            self._step_began += now - self._changed  # no part of the step's time
        self.name_of_phase = name
        self.ticks += 1
        self._changed = now

    def next_step(self, step: int) -> None:
        self.phase("step")
        if self._steps > 1:  # the first two compile, tune and fill buffers
            self._slowest = max(self._slowest, self._changed - self._step_began)
        self.step, self._step_began = step, self._changed
        self._steps += 1

    def allowance(self) -> float:
        """Seconds without progress after which something is wrong."""
        if self.name_of_phase == "index":
            return math.inf  # hours, of many foreign shards
        if self._steps < 3 or self.name_of_phase in UNHURRIED:
            return PATIENT
        return max(self.seconds, 5 * self._slowest)

    def stop(self) -> None:
        self._over.set()

    def run(self) -> None:
        failures = 0
        while not self._over.wait(BEAT):
            try:
                self._publish()
                others = self._read()
                failures = 0
            except RuntimeError as error:
                failures += 1
                if failures * BEAT >= min(10.0, self.seconds):
                    self._end(f"the rendezvous store on rank 0's machine is gone: {error}")
                continue
            silent = [
                r for r, (_, when) in self._seen.items() if time.monotonic() - when > self.seconds and r != self.rank
            ]
            if silent:
                self._end(self._describe(others, silent, f"no sign of life for {self.seconds:.0f} s"), silent, others)
            idle = time.monotonic() - self._changed
            if idle > self.allowance():
                behind = [r for r in others if others[r][0] == min(ticks for ticks, *_ in others.values())]
                if idle < PATIENT and any(others[r][2] in UNHURRIED for r in behind):
                    continue  # this rank waits in its next step for rank 0, which saves to a slow disk
                what = f"no progress for {idle:.0f} s"
                if len(behind) == self.ranks and self.ranks > 1:
                    self._end(f"all ranks hang at step {self.step} in {self.name_of_phase!r}, {what}")
                self._end(self._describe(others, behind, what), behind, others)

    def lost(self, patience: float = 3.5) -> str:
        """After a collective failed: who is gone, as far as `patience` seconds show; "" when nobody is."""
        if self._store is None or not self.is_alive():  # hang_seconds 0: nobody gives signs of life
            return ""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(BEAT / 2)
            try:
                self._publish()
                others = self._read()
            except RuntimeError:
                return "the rendezvous store on rank 0's machine is gone"
            if self._store.check(["failed"]):
                return self._store.get("failed").decode()
        gone = [r for r, (_, when) in self._seen.items() if time.monotonic() - when > 2.5 * BEAT and r != self.rank]
        return self._describe(others, gone, "it died") if gone else ""

    def tell(self, message: str) -> None:
        """Leaves this rank's error where the others find the reason why their collectives fail."""
        if self._store is not None and not self._store.check(["failed"]):
            self._store.set("failed", f"rank {self.rank} failed: {message}")

    def _publish(self) -> None:
        if self._store is not None:
            # The clock makes every beat differ, so that silence shows.
            line = f"{self.ticks}|{self.step}|{self.name_of_phase}|{self._where}|{time.monotonic()}"
            self._store.set(str(self.rank), line)

    def _read(self) -> Places:
        if self._store is None:
            return {self.rank: (self.ticks, self.step, self.name_of_phase, self._where)}
        now, others = time.monotonic(), {}
        for rank, line in enumerate(self._store.multi_get([str(r) for r in range(self.ranks)])):
            if line != self._seen[rank][0]:
                self._seen[rank] = (line, now)
            ticks, step, phase, where, _ = line.decode().split("|")
            others[rank] = (int(ticks), int(step), phase, where)
        return others

    def _describe(self, others: Places, ranks: list[int], what: str) -> str:
        """Where those ranks are, or how long ago they said so: a rank goes through many steps between two signs."""
        said, stale = [], False
        for r in ranks:
            _, step, phase, where = others[r]
            age = time.monotonic() - self._seen[r][1] if r != self.rank else 0.0
            when = f", last heard of {age:.0f} s ago" if age > 2 * BEAT else ""
            stale = stale or bool(when)
            said.append(f"rank {r} ({where.replace(' ', ' process ')}){when} at step {step} in {phase!r}: {what}")
        here = f"; this rank is at step {self.step} in {self.name_of_phase!r}" if stale else ""
        return "; ".join(said) + here

    def _end(self, message: str, culprits: Sequence[int] = (), others: Places | None = None) -> None:
        speaker = min((r for r in range(self.ranks) if r not in culprits), default=0)
        if self.rank in (speaker, *culprits):
            print(f"error: rank {self.rank} ends the run: {message}", file=sys.stderr, flush=True)
        if self.rank in culprits:
            faulthandler.dump_traceback(all_threads=True)  # where it hangs
        places = [others[r][3].split(" ") for r in culprits if r != self.rank] if others else []
        here = [int(pid) for host, pid in places if host == socket.gethostname()]
        for number in (signal.SIGUSR2, signal.SIGKILL):  # its stacks, then its end
            for pid in here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if here and number == signal.SIGUSR2:
                time.sleep(0.5)
        os._exit(1)
