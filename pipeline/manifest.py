"""The content of a data source, and whether it agrees with its manifest: `python -m pipeline.manifest D [--check]`.

`open_source` is imported from here: `from pipeline.manifest import open_source`.
"""

import os

from jsonargparse import ArgumentParser

from pipeline.command import add_cache_flags, cache_arguments, command
from pipeline.sources.check import Expected, check_shards, fresh_storage
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source

__all__ = ["Source", "open_source"]


def main() -> int:
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
    add_cache_flags(parser)
    parser.add_argument("--workers", type=int | None, help="processes that index and check (default: all cores)")
    options = parser.parse_args()
    source = open_source(options.data, **cache_arguments(options), workers=options.workers)
    print(_table(source))
    if not options.check:
        return 0
    shards = [
        Expected(m.shard_url(i), m.index_url(i), s.samples, s.bytes, s.checksum)
        for m in source.manifests
        for i, s in enumerate(m.shards)
    ]
    faults = 0
    with fresh_storage(shards, options.cache_dir) as storage:
        for fault in check_shards(shards, storage, workers=options.workers or os.cpu_count() or 1, progress=True):
            print(fault, flush=True)
            faults += 1
    unknown = sum(not s.checksum for s in shards)
    without = f" (shards without a checksum to compare with: {unknown:,})" if unknown else ""
    print(f"checked {len(shards):,} shards, {source.samples:,} samples: {faults:,} fault{'s' * (faults != 1)}{without}")
    return 1 if faults else 0


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
    lines += [
        f"grey of more than 8 bits in {name}: black is {m.grey16_range[0]}, white is {m.grey16_range[1]}"
        for m, name in zip(source.manifests, source.names)
        if m.grey16_range
    ]
    return "\n".join([*lines, f"order: {lanes}, each shuffling {chunk}; fingerprint {source.fingerprint}"])


if __name__ == "__main__":
    command(main)
