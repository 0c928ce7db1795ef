"""What a source holds, and whether it is still what its manifest says: the command `python -m pipeline.manifest`."""

import contextlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image

from pipeline.index import image_rank, index_tar, read_index
from pipeline.manifest import Source, open_source
from pipeline.scan import FETCHES, checksum_of, in_processes, map_ahead, track
from pipeline.storage import Storage, is_remote

PIXEL_LIMIT = 256_000_000


def run() -> int:
    """The command, to its exit code."""
    parser = ArgumentParser(
        prog="python -m pipeline.manifest", description="Print what a data source holds, or check it."
    )
    parser.add_argument("data", help="a folder of shards, one tar, a brace pattern, a URL, or a YAML source card")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read everything again and print a line for each fault: size, checksum, index, images that do not decode",
    )
    parser.add_argument(
        "--cache_dir", type=str | None, help="where remote shards are kept (default: ~/.cache/moco-pipeline)"
    )
    parser.add_argument("--cache_bytes", type=int, default=50 << 30, help="how much of them to keep")
    parser.add_argument("--workers", type=int | None, help="processes that index and check (default: all cores)")
    options = parser.parse_args()
    source = open_source(
        options.data, cache_dir=options.cache_dir, cache_bytes=options.cache_bytes, workers=options.workers
    )
    print(_table(source))
    if not options.check:
        return 0
    shards = [
        Expected(m.shard_url(i), m.index_url(i), s.samples, s.bytes, s.checksum)
        for m in source.manifests
        for i, s in enumerate(m.shards)
    ]
    faults = 0
    with _fresh_storage(shards, options.cache_dir) as storage:
        for fault in check_shards(shards, storage, workers=options.workers or os.cpu_count() or 1, progress=True):
            print(fault, flush=True)
            faults += 1
    unknown = sum(not s.checksum for s in shards)
    without = f" (shards without a checksum to compare with: {unknown:,})" if unknown else ""
    print(f"checked {len(shards):,} shards, {source.samples:,} samples: {faults:,} fault{'s' * (faults != 1)}{without}")
    return 1 if faults else 0


@contextlib.contextmanager
def _fresh_storage(shards: Sequence["Expected"], cache_dir: str | None) -> Iterator[Storage]:
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


def _table(source: Source) -> str:
    rows = [("source", "share", "samples", "shards", "size", "kB/sample", "classes", "where")]
    for manifest, weight, name in zip(source.manifests, source.weights, source.names):
        size = sum(shard.bytes for shard in manifest.shards)
        unit, of_unit = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
        counts = (f"{manifest.samples:,}", f"{len(manifest.shards):,}", f"{size / of_unit:,.2f} {unit}")
        each = f"{size / manifest.samples / 1000:.1f}"
        rows.append((name, f"{weight:.1%}", *counts, each, str(len(manifest.classes) or "-"), manifest.root))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in (0, 7) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    of_lane = -(-sum(len(m.shards) for m in source.manifests) // source.lanes)
    at_once = source.chunk_shards or of_lane
    chunk = "all its shards" if at_once >= of_lane else f"{at_once:,} shards at a time"
    lanes = f"{source.lanes} lane{'s' * (source.lanes > 1)}"
    return "\n".join([*lines, f"order: {lanes}, each shuffling {chunk}; fingerprint {source.fingerprint}"])


def main() -> None:
    try:
        sys.exit(run())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --- checking ---------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A shard as its manifest has it."""

    tar: str
    idx: str
    samples: int
    bytes: int
    checksum: str


def check_shards(shards: Sequence[Expected], storage: Storage, *, workers: int, progress: bool) -> Iterator[str]:
    """Reads every shard again as a whole and yields a line for each fault: size, checksum, index, count, images
    that do not decode."""
    if any(is_remote(s.tar) for s in shards):
        with ThreadPoolExecutor(FETCHES) as pool:
            results = map_ahead(pool, partial(_check, storage), shards)
            yield from itertools.chain.from_iterable(track(results, len(shards), "checking", progress))
    else:
        yield from itertools.chain.from_iterable(in_processes(_check_local, shards, "checking", workers, progress))


def _check_local(shard: Expected) -> list[str]:
    return _check(Storage(open_files=1), shard)


def _check(storage: Storage, shard: Expected) -> list[str]:
    try:
        data = storage.open(shard.tar, bytes=shard.bytes)
        if shard.checksum and (found := checksum_of(data)) != shard.checksum:
            return [f"{shard.tar}: checksum {found}, the manifest says {shard.checksum}: fetch or write it again"]
        samples = index_tar(data)
        index = read_index(storage.read_bytes(shard.idx), samples=shard.samples, size=shard.bytes, label=shard.idx)
    except (ValueError, OSError) as error:
        return [str(error) if str(error).startswith(shard.tar) else f"{shard.tar}: {error}"]
    best = [min((c for c in s if image_rank(c.extension) >= 0), key=lambda c: image_rank(c.extension)) for s in samples]
    faults = []
    if sorted(zip(index.offsets.tolist(), index.sizes.tolist())) != sorted((c.offset, c.size) for c in best):
        faults.append(f"{shard.idx}: does not say where the images of {shard.tar} are: delete it and the manifest")
    for component in best:
        reason = _undecodable(data[component.offset : component.offset + component.size])
        if reason:
            faults.append(f"{shard.tar}: {component.name}: {reason}")
    return faults


def _undecodable(encoded: np.ndarray) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded.tobytes())) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    return f"{image.width}x{image.height} pixels"
                image.load()
    except Exception as error:  # Pillow's decoders raise a dozen kinds on broken files
        return f"does not decode: {error}" if str(error) else f"does not decode: {type(error).__name__}"
    return ""
