"""Memory for the encoded images of a batch, which later batches use again.

A batch of photographs takes tens of megabytes. The allocator gives them back to the kernel when they are freed and asks
for them again with the next batch, and the kernel then clears and maps each page anew: that costs more than the copy
out of the page cache.
"""

from collections import deque

import numpy as np

SPARE = 8  # buffers kept for later; as many as batches that are underway at once
ROOM = 1.25  # batches differ in size, so a buffer is larger than the batch that it is made for
LARGEST = 4  # a buffer this many times too large is given up: one huge file must not keep its memory for the whole run


class Buffers:
    """Hands out arrays. The memory of one is used again once no view of it is left. From any thread."""

    def __init__(self) -> None:
        self._spare: deque[np.ndarray] = deque(maxlen=SPARE)  # the longest unused first

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], whose content is undefined."""
        try:
            memory = self._spare.popleft()
        except IndexError:
            memory = None
        if memory is None or not size <= memory.nbytes <= LARGEST * ROOM * size:
            memory = np.empty(int(ROOM * size), np.uint8)
        return np.asarray(_Lease(memory, self._spare))[:size]


class _Lease:
    """The base of all views of an array that was handed out: it goes when the last of them does."""

    def __init__(self, memory: np.ndarray, spare: deque[np.ndarray]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._spare = memory, spare

    def __del__(self) -> None:
        self._spare.append(self._memory)
