"""The pool of packing workers: a worker that dies is one clear error, whatever the pool was doing then."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.packing import shard, workers

pytestmark = pytest.mark.process


def work(task: str) -> int:
    """Counts one image of one byte, then dies by the signal that an out-of-memory killer sends, if the task says so."""
    assert shard.COUNTERS is not None
    shard.COUNTERS[shard.COUNTER] += 1
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def run(tasks: Iterator[str]) -> None:
    workers.run(work, tasks, what="packing", workers=2, scheduler="", total=4, done=0)


def test_a_worker_that_dies_between_two_tasks_is_a_clear_error() -> None:
    def tasks() -> Iterator[str]:
        yield "die"
        time.sleep(3)  # the pool knows by now that it is broken and refuses the next task
        yield "count"

    with pytest.raises(ValueError, match="a worker process died"):
        run(tasks())


def test_counters_have_no_lock_that_a_killed_worker_could_take_with_it() -> None:
    """A worker killed inside the lock of a shared array left the parent waiting for that lock for ever."""
    with workers.executor(2, "") as (pool, count, counters):
        assert count == 2 and isinstance(counters, ctypes.Array)  # not multiprocessing's wrapper with a lock
        assert sum(pool.submit(work, "count").result() for _ in range(20)) == 20
        assert sum(counters[::2]) == 20 and sum(counters[1::2]) == 0


FRESH = """
import functools, multiprocessing.forkserver, signal
from pipeline.packing import workers
from pipeline.sources.scan import in_processes

blocked = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK)
with workers.executor(1, "") as (pool, _, _):  # whose fork server knows nothing of it, as one of the caller's own
    assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
multiprocessing.forkserver._forkserver._stop()
workers.warm_up()
with workers.executor(2, "") as (pool, _, _):
    assert signal.SIGINT in pool.submit(blocked, ()).result()
assert all(signal.SIGINT in mask for mask in in_processes(blocked, 8 * [()], "", 2, False))
assert signal.SIGINT not in blocked(())
"""


def test_control_c_never_reaches_a_process_that_works_for_another() -> None:
    """One that only ignored it from some line of its own on ended in a traceback when Ctrl-C came before that line. In
    an interpreter of its own, which has started no process yet."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
