"""Batches of annotated images for training: which image comes when, and images loaded ahead by threads.

The order is a function of seed and step, as the shards' is: every image once an epoch, whatever the number of ranks;
batches run over the end of an epoch, as the reference's do.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from trainer.joining import Ranks

T = TypeVar("T")
AHEAD = 3  # batches
Slot = tuple[int, np.random.Generator]  # an image, and the generator of its augmentation


def slots(images: int, batch_size: int, seed: int, *, start: int = 0, ranks: Ranks) -> Iterator[list[Slot]]:
    """This rank's part of each batch from step `start` on, without end. The generators are those of the place in the
    order: a run that goes on sees the images augmented as they would have been.

    Raises ValueError, at the call, when the ranks do not divide the batch.
    """
    if batch_size % ranks.world_size:
        raise ValueError(f"--batch_size {batch_size} does not divide into {ranks.world_size} ranks")
    return _slots(images, batch_size, seed, start, ranks)


def _slots(images: int, batch_size: int, seed: int, start: int, ranks: Ranks) -> Iterator[list[Slot]]:
    share, drawn = batch_size // ranks.world_size, (-1, np.empty(0, np.int64))
    step = start
    while True:
        part = list[Slot]()
        for number in range(step * batch_size + ranks.rank * share, step * batch_size + (ranks.rank + 1) * share):
            epoch, place = divmod(number, images)
            if drawn[0] != epoch:
                drawn = (epoch, np.random.default_rng((seed, epoch)).permutation(images))
            part.append((int(drawn[1][place]), np.random.default_rng((seed, number, 1))))
        yield part
        step += 1


def loaded_ahead(load: Callable[..., T], parts: Iterator[list[Any]], *, threads: int) -> Generator[list[T]]:
    """load(*arguments) for each of a part, in order, some parts ahead. Threads are enough: decoding lets go of Python's
    lock, and a detector takes a few images a second."""
    pool, waiting = ThreadPoolExecutor(threads, thread_name_prefix="images"), deque[Any]()
    try:
        for part in parts:
            waiting.append([pool.submit(load, *arguments) for arguments in part])
            if len(waiting) > AHEAD:
                yield [one.result() for one in waiting.popleft()]
        for futures in waiting:
            yield [one.result() for one in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
