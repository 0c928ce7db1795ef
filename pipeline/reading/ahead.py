"""Work done ahead of its consumer: a thread that reads, then DALI's queue; recovery when a batch does not decode.

The reading thread keeps a bounded number of batches ready. The graph takes them `prefetch` batches before they come
out, so whatever is inside it is remembered here: what comes out is paired with its batch, and after a decode error
nothing is lost or doubled. All that takes time for each image happens in the reading thread, `lend` too; the thread
that trains only hands whole batches on.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.files import is_remote
from pipeline.pixels.graph import DecodeError, Feed, Graph, Lent
from pipeline.reading.order import Order
from pipeline.reading.reader import Samples
from pipeline.sources.manifest import Source
from pipeline.sources.storage import Storage

log = logging.getLogger(__name__)


class EncodedBatch(NamedTuple):
    """One batch before decoding: samples, the same with the views' parameters as the graph takes them, labels (int64
    [n]) where wanted."""

    samples: Samples
    lent: Lent
    labels: np.ndarray | None = None
    by_pillow: bool = False


class ReadAhead:
    """Runs an iterator in a thread, at most `depth` items ahead. `get` hands on its items, then its exception."""

    def __init__(self, items: Iterator[EncodedBatch], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[EncodedBatch | BaseException] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            end = error
        self._put(end)

    def _put(self, item: EncodedBatch | BaseException) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def get(self) -> EncodedBatch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)


class Decoding:
    """Items in, (item, views on the device) out, in order.

    make_graph(feed) builds the graph. decode_with_pillow(item) gives an item's samples as files that cannot fail to
    decode: when the graph raises DecodeError it is replaced, the oldest batch in it goes through Pillow, and the
    others go in again.
    """

    def __init__(
        self,
        items: Iterator[EncodedBatch],
        make_graph: Callable[[Feed], Graph],
        decode_with_pillow: Callable[[EncodedBatch], EncodedBatch],
        depth: int = 2,
    ) -> None:
        self.seconds = {"graph": 0.0, "starved": 0.0}
        self._make_graph, self._decode_with_pillow = make_graph, decode_with_pillow
        self._ahead = ReadAhead(items, depth)
        self._again: deque[EncodedBatch] = deque()
        self._inside: deque[EncodedBatch] = deque()
        self._error: Exception | None = None
        self._graph = make_graph(self._feed)

    def _feed(self) -> Lent:
        if self._again:
            item = self._again.popleft()
        else:
            if self._error is not None:
                raise StopIteration
            started = time.perf_counter()
            try:
                item = self._ahead.get()
            except StopIteration:
                raise
            except Exception as error:
                self._error = error  # raised when the batches before it have come out
                raise StopIteration from None
            finally:
                self.seconds["starved"] += time.perf_counter() - started
        self._inside.append(item)
        return item.lent

    def next(self) -> tuple[EncodedBatch, tuple[torch.Tensor, ...]]:
        """StopIteration at the end; the exception of `items` in its place."""
        while True:
            started, starved = time.perf_counter(), self.seconds["starved"]
            try:
                views = self._graph.run()
            except StopIteration:
                if self._error is not None:
                    raise self._error from None
                raise
            except DecodeError as error:
                self._recover(error)
                continue
            finally:
                self.seconds["graph"] += time.perf_counter() - started - (self.seconds["starved"] - starved)
            return self._inside.popleft(), views

    def _recover(self, error: DecodeError) -> None:
        waiting = [*self._inside, *self._again]
        first = next((i for i, item in enumerate(waiting) if not item.by_pillow), None)
        if first is None:
            raise error
        log.warning("DALI could not decode a batch, Pillow decodes it: %s", str(error)[:300])
        waiting[first] = self._decode_with_pillow(waiting[first])._replace(by_pillow=True)
        self._graph.close()
        self._inside.clear()
        self._again = deque(waiting)
        self._graph = self._make_graph(self._feed)

    def close(self) -> None:
        self._ahead.close()
        self._graph.close()


class ShardsAhead:
    """Has a rank's next shards and their indexes fetched in the background, where any of them is remote.

    They are listed anew only when a lane begins a chunk: a list for each step would cost as much as the step itself.
    """

    def __init__(self, source: Source, storage: Storage, order: Order, rank: int, world_size: int) -> None:
        self._source, self._storage, self._order = source, storage, order
        self._rank, self._world_size = rank, world_size
        self._remote = any_remote(source)
        self._chunks: np.ndarray | None = None

    def reach(self, epoch: int, step: int) -> None:
        """To be called before this step is read."""
        if not self._remote:
            return
        chunks = self._order.chunks_at(epoch, step, self._rank, self._world_size)
        if self._chunks is None or not np.array_equal(chunks, self._chunks):
            self._chunks = chunks
            ahead = self._order.upcoming_shards(epoch, step, self._rank, self._world_size)
            prefetch_shards(self._source, self._storage, ahead)


def any_remote(source: Source) -> bool:
    return any(is_remote(m.shard_url(0)) for m in source.manifests)


def prefetch_shards(source: Source, storage: Storage, ahead: Sequence[tuple[int, int]]) -> None:
    """Has the (manifest, shard) pairs and their indexes fetched in the background."""
    wanted: list[str | tuple[str, int, str]] = []
    for m, shard in ahead:
        manifest = source.manifests[m]
        entry = manifest.shards[shard]
        wanted += [manifest.index_url(shard), (manifest.shard_url(shard), entry.bytes, entry.checksum)]
    storage.prefetch(wanted)
