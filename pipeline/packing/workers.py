"""The processes that pack: on this machine or on a Dask cluster, behind the same `submit`."""

import concurrent.futures as futures
import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.packing import shard
from pipeline.progress import Progress
from pipeline.sources.scan import starting_processes

AHEAD = 2  # tasks that wait beyond those in work: enough to keep all workers busy, few enough to keep memory small


def warm_up() -> None:
    """Begins to import what workers need, in the process that they will be forked from, while this one works on."""
    multiprocessing.set_forkserver_preload(["pipeline.packing.shard", "webdataset"])
    with starting_processes():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def executor(
    workers: int, scheduler: str
) -> Iterator[tuple[futures.Executor, int, "ctypes.Array[ctypes.c_longlong] | None"]]:
    """An executor, the number of its workers, and their counters of images and bytes done (None on a cluster).

    Each worker has two counters of its own and no lock: a worker killed while it held one would stop all others.
    """
    if scheduler:
        try:
            import distributed
        except ImportError:
            raise ValueError("--scheduler takes Dask: pip install distributed") from None
        try:
            client = distributed.Client(scheduler, timeout=10)
        except (OSError, TimeoutError, ValueError) as error:
            raise ValueError(f"no Dask scheduler answers at {scheduler}: {error}") from None
        with client:
            threads = sum(client.nthreads().values())
            if not threads:
                raise ValueError(
                    f"the Dask scheduler at {scheduler} has no workers: start some with `dask worker {scheduler}`"
                )
            with client.get_executor(pure=False, retries=3) as pool:
                yield pool, threads, None
        return
    context = multiprocessing.get_context("forkserver")
    counters = context.RawArray("q", 2 * workers)
    with futures.ProcessPoolExecutor(workers, context, _start_worker, (counters,)) as local:
        yield local, workers, counters


def _start_worker(counters: "ctypes.Array[ctypes.c_longlong]") -> None:
    shard.COUNTERS = counters
    number = int(re.split("[-:]", multiprocessing.current_process().name)[-1])  # a pool numbers its workers in a row
    shard.COUNTER = 2 * (number % (len(counters) // 2))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # not blocked when the fork server was running before, for the caller

    def follow_parent() -> None:  # when that is killed without a word, its workers would wait for ever
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run(
    work: Callable[[Any], shard.TaskDone],
    tasks: Iterable[Any],
    *,
    what: str,
    workers: int,
    scheduler: str,
    total: int,
    done: int,
    check: Callable[[shard.TaskDone], None] | None = None,
) -> None:
    """Does all tasks. `total` and `done` are images, for the bar.

    On an error, of a task or of `check`, which sees what came of each, the tasks in work are finished, no further ones
    begun, and it is raised.
    """
    waiting = iter(tasks)
    error: BaseException | None = None
    with executor(workers, scheduler) as (pool, count, counters), Progress(what, total, done=done) as progress:
        start, finished_images = time.monotonic(), 0
        running: set[futures.Future[shard.TaskDone]] = set()
        while True:
            while error is None and len(running) < count + AHEAD and (task := next(waiting, None)) is not None:
                try:
                    with starting_processes():  # a worker starts when the first tasks are submitted
                        running.add(pool.submit(work, task))
                except futures.BrokenExecutor as problem:  # a worker died between two tasks
                    error = problem
            if not running:
                break
            finished, running = futures.wait(running, timeout=0.5, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                try:
                    finished_images += future.result().images
                    if check is not None:
                        check(future.result())
                except BaseException as failure:
                    error = error or failure
            if counters is None:
                progress.advance(done + finished_images - progress.done)
            else:
                progress.note = f"{sum(counters[1::2]) / 1e6 / (time.monotonic() - start):.1f} MB/s"
                progress.advance(done + sum(counters[::2]) - progress.done)
    if isinstance(error, futures.BrokenExecutor):
        raise ValueError(
            "a worker process died, perhaps for lack of memory: the same command goes on where it stopped, "
            "with fewer --workers if need be"
        ) from error
    if error is not None:
        raise error
