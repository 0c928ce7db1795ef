"""The memory that batches share one after the other: never two at once, and not more than they need."""

import gc
import threading

import numpy as np
import pytest
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from pipeline.reading.buffers import LARGEST, ROOM, SPARE, Buffers


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_no_view_of_it_is_left() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    where, view = address(first), first[100:200][10:]
    del first
    assert address(buffers.take(1000)) != where  # `view` still looks at it
    view[:] = 7
    del view
    taken = [buffers.take(1000) for _ in range(2)]
    assert where in [address(each) for each in taken]
    assert not np.shares_memory(*taken)


def test_what_dali_still_reads_is_not_used_again() -> None:
    """DALI's tensors hold the arrays that they were made from."""
    buffers = Buffers()
    memory = buffers.take(100)
    where = address(memory)
    images = [memory[:40], memory[40:]]
    lent = TensorListCPU([TensorCPU(each) for each in images], contiguous=False)  # type: ignore[call-overload]
    del memory, images
    gc.collect()
    assert address(buffers.take(100)) != where
    del lent
    assert where in [address(each) for each in [buffers.take(100), buffers.take(100)]]


def test_sizes_differ() -> None:
    """A little larger: the same memory. Far smaller: other memory, so that one huge batch costs nothing later."""
    buffers = Buffers()
    where = address(buffers.take(1000))
    assert address(buffers.take(int(1000 * ROOM))) == where
    small = buffers.take(int(1000 / LARGEST) - 1)
    assert small.base is not None and len(np.asarray(small.base)) < 1000
    assert len(buffers.take(0)) == 0


def test_few_are_kept() -> None:
    buffers = Buffers()
    held = [buffers.take(1000) for _ in range(3 * SPARE)]
    del held
    assert len(buffers._spare) == SPARE


@pytest.mark.slow
def test_threads_never_share_memory() -> None:
    buffers, faults = Buffers(), []

    def use(mark: int) -> None:
        for size in np.random.default_rng(mark).integers(1, 20_000, 3000).tolist():
            mine = buffers.take(size)
            mine[:] = mark
            if (mine != mark).any():
                faults.append(mark)

    threads = [threading.Thread(target=use, args=[mark]) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
