"""From (shard, row) to screened encoded bytes: the read stage.

1. Where an image lies comes from its shard's index, parsed once and kept in a cache that is bounded in bytes.
2. Its bytes are read with one system call into memory that earlier batches have used (buffers.py), each shard being
   opened once a batch; by several threads in case the disk is slow. The tar header before them is read too: it tells
   whether index and shard still belong together.
3. `pipeline.pixels.screen` tells from the bytes how large the image is, or why it is bad.
4. A bad sample is replaced by the next good row of its shard and written down once in `quarantine.jsonl`.
"""

import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.permutation import Ints
from pipeline.pixels.decode import MAX_PIXELS, BadImage, decode
from pipeline.pixels.screen import as_ppm, inspect
from pipeline.reading.buffers import Buffers
from pipeline.reading.order import Draw
from pipeline.reading.quarantine import Quarantine
from pipeline.sources.index import Index, read_index, sample_key
from pipeline.sources.manifest import Source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage, read_at
from pipeline.sources.tar import number

INDEX_CACHE_BYTES = 128 << 20
HEADER = 512  # bytes of a tar header; it ends where the data of its member begins
# An image takes 0.04 ms from the page cache, and threads would make that more. Where most take longer than this they
# wait for a disk or a network, and threads do so side by side; now and then a batch is read singly, to see.
SLOW_SECONDS = 0.0003
SLOW_THREADS = 16
RETRY_BATCHES = 64
# Below so many samples a share of bad ones says nothing about the source, unless the source itself is smaller.
FEWEST_TO_JUDGE = 10_000


class Place(NamedTuple):
    """Where the images of one shard lie, and what its manifest says of it."""

    url: str
    bytes: int
    checksum: str
    entries: Index


class Samples(NamedTuple):
    """A batch: `draw` as replaced, encoded images (uint8 arrays), their sizes after orientation int64 [n]."""

    draw: Draw
    encoded: list[np.ndarray]
    heights: Ints
    widths: Ints


def read_member(descriptor: int, url: str, offset: int, member: np.ndarray, row: int) -> None:
    """Fills `member`, uint8 [HEADER + size], with a tar header and the data behind it, which begins at `offset`.
    ValueError when the shard has no such member there."""
    read_at(descriptor, url, offset - HEADER, member)
    size = len(member) - HEADER
    if number(member[124:136].tobytes()) != size:
        raise ValueError(
            f"{url} has no member of {size:,} bytes at {offset:,}, where its index has row {row}: the shard was "
            "replaced; put the old one back, or delete its manifest.json and .idx to have them rebuilt for a new run"
        )


class Reader:
    """Reads and screens samples of a source; safe to call from several threads, which wait for each other.

    `max_bad_fraction`: ValueError once more than this share of the samples read were bad.
    """

    def __init__(
        self,
        source: Source,
        storage: Storage,
        *,
        quarantine: str | Path | None = None,
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = 2,
    ) -> None:
        self.source, self.storage = source, storage
        self.max_bad_fraction, self.max_pixels = max_bad_fraction, max_pixels
        self.quarantine = Quarantine(quarantine, self._is_ours)
        self._lock = threading.Lock()
        self.seconds = {"read": 0.0, "screen": 0.0}
        self.drawn = self.bad = 0
        self._places: OrderedDict[tuple[int, int], Place] = OrderedDict()
        self._index_bytes = 0
        self._buffers = Buffers()
        self._slow, self._batches = False, 0
        self._said: set[str] = set()  # kinds of remarks on images
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pillow")
        self._readers = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="read")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._places.clear()

    def read(self, draw: Draw, *, replace: bool = True) -> Samples:
        """The samples of `draw`, each bad one replaced, or left out with `replace=False`.

        ValueError or FileNotFoundError for a shard that is not as its manifest says, or when too many samples are bad.
        """
        with self._lock:
            started = time.perf_counter()
            encoded = self._fetch_all(draw)
            fetched = time.perf_counter()
            self.drawn += len(encoded)
            samples = self._screen_all(draw, encoded, replace)
            self.seconds["read"] += fetched - started
            self.seconds["screen"] += time.perf_counter() - fetched
            return samples

    def decode_with_pillow(self, samples: Samples, *, replace: bool = True) -> Samples:
        """The same samples with Pillow's pixels, for a batch that DALI could not decode; what Pillow cannot decode
        either is replaced or left out."""
        with self._lock:
            return self._screen_all(samples.draw, samples.encoded, replace, trust_headers=False)

    def _screen_all(self, draw: Draw, encoded: list[np.ndarray], replace: bool, trust_headers: bool = True) -> Samples:
        encoded = list(encoded)
        ids = draw.sample_ids.tolist()
        heights, widths = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        bad: dict[int, str] = {}
        unusual: list[int] = []
        for i, data in enumerate(encoded):
            if ids[i] in self.quarantine.reasons:
                bad[i] = self.quarantine.reasons[ids[i]]
                continue
            try:
                size = inspect(data, self.max_pixels) if trust_headers else None
            except BadImage as error:
                bad[i] = str(error)
                continue
            if size is None:
                unusual.append(i)
            else:
                heights[i], widths[i] = size
        places = [(int(draw.manifest[i]), int(draw.shard[i]), int(draw.row[i])) for i in unusual]
        for i, result in zip(unusual, self._pool.map(self._by_pillow, [encoded[i] for i in unusual], places)):
            if isinstance(result, str):
                bad[i] = result
            else:
                encoded[i], heights[i], widths[i] = result
        if not bad:
            return Samples(draw, encoded, heights, widths)
        manifests, shards, rows, sample_ids, epochs = (column.copy() for column in draw)
        for i in sorted(bad):
            place = int(manifests[i]), int(shards[i]), int(rows[i])
            self.bad += 1
            self._write_down(*place, bad[i])
            self._judge(*place, bad[i])
            if replace:
                shards[i], rows[i], sample_ids[i], encoded[i], heights[i], widths[i] = self.replacement(
                    *place, trust_headers
                )
        draw = Draw(manifests, shards, rows, sample_ids, epochs)
        if not replace:
            good = np.array([i for i in range(len(ids)) if i not in bad], np.int64)
            draw = Draw(*(column[good] for column in draw))
            encoded, heights, widths = [encoded[i] for i in good], heights[good], widths[good]
        return Samples(draw, encoded, heights, widths)

    def _fetch_all(self, draw: Draw) -> list[np.ndarray]:
        by_shard: dict[tuple[int, int], list[int]] = {}
        for i, key in enumerate(zip(draw.manifest.tolist(), draw.shard.tolist())):
            by_shard.setdefault(key, []).append(i)
        parts = [(self._place(*key), images) for key, images in by_shard.items()]
        offsets, sizes = (np.empty(len(draw.row), np.int64) for _ in range(2))
        for place, images in parts:
            rows = draw.row[images]
            offsets[images], sizes[images] = place.entries.offsets[rows], place.entries.sizes[rows]
        ends = np.cumsum(sizes + HEADER).tolist()
        memory = self._buffers.take(ends[-1] if ends else 0)
        members = [memory[begin:end] for begin, end in zip([0, *ends], ends)]
        self._batches += 1
        one_by_one = not self._slow or self._batches % RETRY_BATCHES == 0
        seconds = np.zeros(len(members))

        def fetch(part: tuple[Place, list[int]]) -> None:
            place, images = part
            with self.storage.opened(place.url, bytes=place.bytes, checksum=place.checksum) as descriptor:
                for i in images:
                    began = time.perf_counter()
                    read_member(descriptor, place.url, int(offsets[i]), members[i], draw.row[i])
                    seconds[i] = time.perf_counter() - began

        if one_by_one:
            for part in parts:
                fetch(part)
            # The median: a thread that had to wait for a core delays a few images, a slow disk most of them.
            self._slow = len(members) > 0 and bool(np.median(seconds) > SLOW_SECONDS)
        else:
            list(self._readers.map(fetch, [(place, [i]) for place, images in parts for i in images]))
        return [member[HEADER:] for member in members]

    def _fetch(self, place: Place, row: int) -> np.ndarray:
        """Encoded bytes of one image, uint8 [n]. ValueError when the shard has no such member there."""
        offset, size = int(place.entries.offsets[row]), int(place.entries.sizes[row])
        member = np.empty(HEADER + size, np.uint8)
        with self.storage.opened(place.url, bytes=place.bytes, checksum=place.checksum) as descriptor:
            read_member(descriptor, place.url, offset, member, row)
        return member[HEADER:]

    def labels(self, draw: Draw) -> Ints:
        """The numbers in the samples' `.cls` members, int64 [n], -1 where there is none."""
        with self._lock:
            places = [self._place(m, shard) for m, shard in zip(draw.manifest.tolist(), draw.shard.tolist())]
        return np.array(list(map(self._label, places, draw.row.tolist())), np.int64)

    def _label(self, place: Place, row: int) -> int:
        offset, size = int(place.entries.label_offsets[row]), int(place.entries.label_sizes[row])
        if offset < 0:
            return -1
        text = self.storage.read(place.url, offset, size, bytes=place.bytes, checksum=place.checksum).tobytes()
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{place.url}: the label of row {row} is {text[:20]!r}, not a number") from None

    def sample_id(self, m: int, shard: int, row: int) -> int:
        return int(self.source.id_offsets[m] + self.source.manifests[m].offsets[shard]) + row

    def _write_down(self, m: int, shard: int, row: int, reason: str) -> None:
        """Puts a bad sample into the quarantine, if nobody has yet."""
        sample_id = self.sample_id(m, shard, row)
        manifest = self.source.manifests[m]
        if sample_id not in self.quarantine.reasons:
            line = {
                "source": self.source.names[m],
                "shard": manifest.shards[shard].path,
                "key": sample_key(read_index_text(manifest, shard, self.storage), row),
                "sample_id": sample_id,
                "reason": reason,
            }
            self.quarantine.add(line)

    def _judge(self, m: int, shard: int, row: int, reason: str) -> None:
        """ValueError past `max_bad_fraction`."""
        judged = max(self.drawn, min(self.source.samples, FEWEST_TO_JUDGE))
        if self.bad > self.max_bad_fraction * judged:
            where = f"; see {self.quarantine.path}" if self.quarantine.path else ""
            name = self.source.manifests[m].shards[shard].path
            raise ValueError(
                f"{self.bad:,} of {self.drawn:,} samples read are bad, more than max_bad_fraction "
                f"{self.max_bad_fraction:g} allows; last {name} row {row}: {reason}{where}"
            )

    def replacement(
        self, m: int, shard: int, row: int, trust_headers: bool = True
    ) -> tuple[int, int, int, np.ndarray, int, int]:
        """(shard, row, sample id, encoded, height, width) of the next good sample: further rows of the same shard,
        round to its first, then the shards that follow. The same whoever asks."""
        shards = self.source.manifests[m].shards
        for s in range(shard, shard + len(shards)):
            other = s % len(shards)
            first = row + 1 if s == shard else 0
            for candidate in range(first, first + shards[other].samples):
                r = candidate % shards[other].samples
                if s == shard and r == row:
                    break
                sample_id = self.sample_id(m, other, r)
                if sample_id in self.quarantine.reasons:
                    continue
                result = self._screened(self._fetch(self._place(m, other), r), (m, other, r), trust_headers)
                if isinstance(result, str):
                    self._write_down(m, other, r, result)
                else:
                    return other, r, sample_id, *result
        raise ValueError(f"no sample of source {self.source.names[m]} can be decoded")

    def _is_ours(self, line: dict[str, object]) -> bool:
        """Whether a line of the quarantine is about this source: a run folder may have been used with another."""
        sample_id = int(str(line["sample_id"]))
        if not 0 <= sample_id < self.source.samples:
            return False
        m = int(np.searchsorted(self.source.id_offsets, sample_id, side="right")) - 1
        offsets = self.source.manifests[m].offsets
        shard = int(np.searchsorted(offsets, sample_id - self.source.id_offsets[m], side="right")) - 1
        return line["shard"] == self.source.manifests[m].shards[shard].path

    def _screened(
        self, data: np.ndarray, place: tuple[int, int, int], trust_headers: bool
    ) -> tuple[np.ndarray, int, int] | str:
        try:
            size = inspect(data, self.max_pixels) if trust_headers else None
        except BadImage as error:
            return str(error)
        return (data, *size) if size else self._by_pillow(data, place)

    def _by_pillow(self, data: np.ndarray, place: tuple[int, int, int]) -> tuple[np.ndarray, int, int] | str:
        m, shard, row = place

        def say_once(kind: str, detail: str) -> None:
            if kind not in self._said:
                self._said.add(kind)
                where = f"{self.source.manifests[m].shards[shard].path} row {row}"
                print(f"note: {where}: {kind}: {detail} (said once, there may be more)", file=sys.stderr)

        try:
            return as_ppm(decode(data, self.max_pixels, say_once, grey16=self.source.manifests[m].grey16_range))
        except BadImage as error:
            return str(error)

    def _place(self, m: int, shard: int) -> Place:
        place = self._places.get((m, shard))
        if place is not None:
            self._places.move_to_end((m, shard))
            return place
        manifest = self.source.manifests[m]
        entry, url = manifest.shards[shard], manifest.index_url(shard)
        content = read_index_text(manifest, shard, self.storage)
        index = read_index(content, samples=entry.samples, size=entry.bytes, label=url)
        place = Place(manifest.shard_url(shard), entry.bytes, entry.checksum, index)
        self._places[m, shard] = place
        self._index_bytes += 32 * len(index)
        while self._index_bytes > INDEX_CACHE_BYTES and len(self._places) > 1:
            self._index_bytes -= 32 * len(self._places.popitem(last=False)[1].entries)
        return place
