"""Whether shards are still what their manifest says: size, checksum, index, images that decode."""

import contextlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from pipeline.files import is_remote
from pipeline.pixels.decode import BadImage
from pipeline.pixels.screen import verify
from pipeline.progress import track
from pipeline.sources.index import format_index, image_rank, index_tar, read_index
from pipeline.sources.scan import FETCHES, checksum_of, in_processes, map_ahead
from pipeline.sources.storage import Storage
from pipeline.sources.tar import LACKS_END


class Expected(NamedTuple):
    """A shard as its manifest has it."""

    tar: str
    idx: str
    samples: int
    bytes: int
    checksum: str


@contextlib.contextmanager
def fresh_storage(shards: Sequence[Expected], cache_dir: str | None) -> Iterator[Storage]:
    """Without what was fetched before: the question is what lies there now. As large as the fetches under way take."""
    if not any(is_remote(s.tar) for s in shards):
        yield Storage(open_files=1)
        return
    beside = Storage(cache_dir=cache_dir).cache_dir
    beside.mkdir(parents=True, exist_ok=True)
    room = 2 * FETCHES * max(s.bytes for s in shards)
    with (
        tempfile.TemporaryDirectory(prefix="check-", dir=beside) as folder,
        contextlib.closing(Storage(cache_dir=folder, cache_bytes=room)) as storage,
    ):
        yield storage


def check_shards(shards: Sequence[Expected], storage: Storage, *, workers: int, progress: bool) -> Iterator[str]:
    """Reads every shard again as a whole and yields a line for each fault: size, checksum, index, count, images
    that do not decode."""
    if any(is_remote(s.tar) for s in shards):
        with ThreadPoolExecutor(FETCHES) as pool:
            results = map_ahead(pool, partial(_check, storage), shards)
            faults = track(results, "checking" if progress else "", len(shards), unit="shards")
            yield from itertools.chain.from_iterable(faults)
    else:
        yield from itertools.chain.from_iterable(in_processes(_check_local, shards, "checking", workers, progress))


def _check_local(shard: Expected) -> list[str]:
    return _check(Storage(open_files=1), shard)


def _check(storage: Storage, shard: Expected) -> list[str]:
    try:
        data = storage.open(shard.tar, bytes=shard.bytes)
        if shard.checksum and (found := checksum_of(data)) != shard.checksum:
            return [f"{shard.tar}: checksum {found}, the manifest says {shard.checksum}: fetch or write it again"]
        kinds: Counter[str] = Counter()
        samples = index_tar(data, kinds)
        try:
            text = storage.read_bytes(shard.idx)
        except FileNotFoundError:  # then it is built in the cache when it is needed: from the same tar, as here
            text = format_index(samples)
        index = read_index(text, samples=shard.samples, size=shard.bytes, label=shard.idx)
    except (ValueError, OSError) as error:
        return [str(error) if str(error).startswith(shard.tar) else f"{shard.tar}: {error}"]
    best = [min((c for c in s if image_rank(c.extension) >= 0), key=lambda c: image_rank(c.extension)) for s in samples]
    faults = [f"{shard.tar}: a tar {LACKS_END}"] if kinds["no end"] else []
    if sorted(zip(index.offsets.tolist(), index.sizes.tolist())) != sorted((c.offset, c.size) for c in best):
        faults.append(f"{shard.idx}: does not say where the images of {shard.tar} are: delete it and the manifest")
    for component in best:
        try:
            verify(data[component.offset : component.offset + component.size])
        except BadImage as error:
            faults.append(f"{shard.tar}: {component.name}: {error}")
    return faults
