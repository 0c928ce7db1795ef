"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 end a run of any number of ranks after the same step, saved."""

import os
import signal

import torch
import torch.distributed as dist


class Stop:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 to any rank: all of them leave the loop after the same step.

    Made before anything slow: a signal during start-up ends the run at its first step, a second one then at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._begun = False
        self._group: dist.ProcessGroup | None = None
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._ask)

    def begin(self, group: dist.ProcessGroup | None) -> None:
        """From here on a second signal changes nothing: torchrun forwards the terminal's SIGINT that the rank already
        got itself, and there is something to save.
        """
        self._group, self._begun = group, True

    def _ask(self, number: int, frame: object) -> None:
        if self.name and not self._begun:
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    def asked(self) -> bool:
        """Call once a step. Each call sends this rank's wish and returns the ranks' common wish as of the call
        before: no waiting, and no device involved.
        """
        if self._group is None:
            return bool(self.name)
        if self._work is not None:
            self._work.wait()
        stop = bool(self._flag.item())
        self._flag = torch.tensor([float(bool(self.name))])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
