"""Which image goes into which shard. Arithmetic on numbers of images and their sizes; nothing of the images themselves.

1. Exact duplicates are found from the content's hashes (with `--dedup`) and drop out.
2. The n images that remain are permuted by the seed; the first of them are the held-out split, if there is one.
3. Each split is cut where a shard is full. The plan does not depend on what the images turn out to be, so no shard
   waits for another, and a finished shard stays as it is whatever happens elsewhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.permutation import fold_key, permute

AT_ONCE = 1 << 20  # images looked at together


class PlannedShard(NamedTuple):
    """A shard: its folder ("" without splits), its number there, its images' positions in the permutation."""

    split: str
    number: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.split}/shard-{self.number:06d}".lstrip("/")

    @property
    def record(self) -> str:
        return f"{self.name.replace('/', '.')}.json"


def image_numbers(begin: int, end: int, count: int, kept: np.ndarray | None, seed: int) -> np.ndarray:
    """int64 [end - begin]: the images at these positions of the permutation of `count`; `kept` are no duplicates."""
    numbers = permute(np.arange(begin, end), count, fold_key(seed))
    return numbers if kept is None else np.asarray(kept[numbers])


def plan(
    sizes: np.ndarray,
    kept: np.ndarray | None,
    seed: int,
    *,
    holdout: float,
    samples_per_shard: int,
    shard_bytes: int,
) -> list[PlannedShard]:
    """The shards. `sizes` are the images' bytes, -1 unknown. `holdout`: a fraction below 1, or a number of images."""
    count = len(sizes) if kept is None else len(kept)
    held = round(holdout * count) if holdout < 1 else int(holdout)
    if holdout and not held:
        raise ValueError(f"--holdout {holdout:g} of {count:,} images is less than one: hold out more")
    if held >= count:
        raise ValueError(f"--holdout {holdout:g} leaves nothing of {count:,} images to train on: hold out fewer")
    splits = {"val": (0, held), "train": (held, count)} if held else {"": (0, count)}
    shards: list[PlannedShard] = []
    for split, (first, last) in splits.items():
        begin, used = (
            first,
            0,
        )  # of the shard that is being filled: its first position, bytes from blocks before this one
        cuts = []
        for start in range(first, last, AT_ONCE):
            stop = min(start + AT_ONCE, last)
            ends = used + np.cumsum(np.maximum(sizes[image_numbers(start, stop, count, kept, seed)], 0))
            closed = 0  # bytes of `ends` that are in shards already full
            while True:
                fits = start + int(np.searchsorted(ends, closed + shard_bytes, side="right"))
                end = min(max(fits, begin + 1), begin + samples_per_shard)
                if end >= stop:
                    break  # this shard may go on in the next block
                cuts.append((begin, end))
                begin, closed = end, int(ends[end - start - 1]) if end > start else used
            used = int(ends[-1]) - closed
        if begin < last:
            cuts.append((begin, last))
        shards += [PlannedShard(split, number, *cut) for number, cut in enumerate(cuts)]
    return shards


def find_duplicates(hashes: np.ndarray, folder: Path) -> tuple[np.ndarray, int]:
    """From the images' hashes, uint64 [n, 2]: int64 [m] numbers of the first of each, and how many others there are.

    Writes kept.bin (int64) and duplicates.bin (int64 pairs: the duplicate, the image it equals) into `folder`. Hashes
    are looked at in parts of their range, so that memory is bounded by 16 AT_ONCE images (1 GB), not by n.
    """
    count = len(hashes)
    original = np.memmap(folder / "original.bin", np.int64, "w+", shape=(count,))
    parts = max(1, count // (16 * AT_ONCE))
    for part in range(parts):
        members = np.concatenate([
            begin + np.flatnonzero(hashes[begin : begin + AT_ONCE, 0] % np.uint64(parts) == part)
            for begin in range(0, count, AT_ONCE)
        ])  # fmt: skip
        mine = np.asarray(hashes[members])
        order = np.lexsort((members, mine[:, 1], mine[:, 0]))  # equal hashes side by side, in the order of the listing
        mine, members = mine[order], members[order]
        new = np.concatenate([[True], (mine[1:] != mine[:-1]).any(axis=1)])[: len(mine)]
        original[members] = members[new][np.cumsum(new) - 1]
    with (folder / "kept.bin").open("wb") as kept, (folder / "duplicates.bin").open("wb") as duplicates:
        for begin in range(0, count, AT_ONCE):
            numbers = np.arange(begin, min(begin + AT_ONCE, count))
            first = original[begin : begin + AT_ONCE]
            kept.write(numbers[first == numbers].tobytes())
            duplicates.write(np.stack([numbers, first], 1)[first != numbers].tobytes())
    kept_numbers = np.memmap(folder / "kept.bin", np.int64, "r")
    return kept_numbers, count - len(kept_numbers)


def duplicate_pairs(folder: Path) -> Iterator[tuple[int, int, int]]:
    """The duplicate, the image that stays, and how many bits their perceptual hashes are apart (-1: exact ones)."""
    path, near = folder / "duplicates.bin", folder / "bits.bin"
    if path.exists() and path.stat().st_size:
        pairs = np.memmap(path, np.int64, "r").reshape(-1, 2)
        apart = np.memmap(near, np.uint8, "r") if near.exists() else np.full(len(pairs), -1)
        for (duplicate, original), bits in zip(pairs, apart):
            yield int(duplicate), int(original), int(bits)
