"""Near-duplicates: images whose 64-bit perceptual hashes are a few bits apart, such as copies of other size or quality.

The first in the order of the input stays. An image drops out when it is at most so many bits from one that stays; so of
a chain of small steps every second one stays, whatever the number of workers.

Nothing is compared with everything. Hashes at most b bits apart agree in two of b + 2 blocks of bits, so each pair of
blocks gives a table, sorted by these bits (about 26 of 64), and neighbours with equal ones are compared.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from pipeline import files
from pipeline.packing.fetch import fetch
from pipeline.packing.prepare import Options, Rejected, prepare
from pipeline.packing.shard import HashTask, TaskDone, count_done
from pipeline.pixels.decode import BadImage, picture

MOST_BITS = 3
LEAST_SIDE = 128  # pixels that an image is decoded to for its hash, which looks at 32 x 32 of them


def check_installed() -> None:
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise ValueError("--dedup_near takes ImageHash: pip install -e '.[near]'") from None


def hash_pictures(task: HashTask) -> TaskDone:
    """Writes uint64 [n, 2]: the perceptual hash of each image, and 1. Two zeros for an image that cannot be fetched or
    will be rejected: it must not take the place of another."""
    import imagehash

    assert task.options is not None
    only_looks = dataclasses.replace(task.options, short_side=0, convert=False)
    hashes = np.zeros((len(task.images), 2), np.uint64)
    for i, (image, contents) in enumerate(zip(task.images, fetch(task.images, task.headers))):
        if not isinstance(contents, Rejected) and is_packed(contents[0], image.name, only_looks):
            try:
                encoded, grey16 = np.frombuffer(contents[0], np.uint8), only_looks.grey16_range
                pixels = picture(encoded, only_looks.max_pixels, grey16=grey16, least_side=LEAST_SIDE)
                bits = imagehash.phash(pixels).hash  # bool [8, 8]
                hashes[i] = np.packbits(bits).view(">u8")[0], 1
            except BadImage:  # with --no_verify it is packed all the same
                pass
        count_done(image)
    files.write(task.output, hashes.tobytes())
    return TaskDone(len(task.images))


def is_packed(data: bytes, name: str, options: Options) -> bool:
    try:
        prepare(data, name, options)
    except Rejected:
        return False
    return True


def find_near_duplicates(hashes: np.ndarray, bits: int, folder: Path) -> tuple[np.ndarray, int]:
    """From the rows of `hash_pictures`, uint64 [n, 2]: int64 [m] numbers of the images that stay, and how many others
    there are. Writes what `find_duplicates` writes, and bits.bin (uint8), how far apart each pair is."""
    numbers = np.flatnonzero(hashes[:, 1])
    mine = np.asarray(hashes[numbers, 0])
    distinct, first, which = np.unique(mine, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the distinct hashes: by the number of their first image
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    which = place[which]
    distinct, first = distinct[order], first[order]
    stays = _that_stays(distinct, bits)  # int64 [distinct]
    original = first[stays[which]]  # of each image in `mine`: the image that stays in its place
    left_out = original != np.arange(len(mine))
    apart = np.bitwise_count(mine ^ mine[original])[left_out]
    pairs = np.stack([numbers, numbers[original]], 1)[left_out]  # int64 [d, 2]
    kept = np.ones(len(hashes), bool)
    kept[pairs[:, 0]] = False
    (folder / "kept.bin").write_bytes(np.flatnonzero(kept).tobytes())
    (folder / "duplicates.bin").write_bytes(pairs.astype(np.int64).tobytes())
    (folder / "bits.bin").write_bytes(apart.astype(np.uint8).tobytes())
    return np.flatnonzero(kept), len(pairs)


def _that_stays(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64 [n]: for each of these distinct hashes the earliest one at most `bits` from it that stays, or itself."""
    stays = np.arange(len(hashes))
    if bits and len(hashes) > 1:
        for earlier, later in near_pairs(hashes, bits).tolist():  # ascending by the later one: the earlier is decided
            if stays[later] == later and stays[earlier] == earlier:
                stays[later] = earlier
    return stays


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64 [m, 2]: the pairs (earlier, later) of distinct hashes, uint64 [n], at most `bits` apart, by the later."""
    count = len(hashes)
    found = [np.empty(0, np.int64)]
    edges = [round(64 * i / (bits + 2)) for i in range(bits + 3)]
    blocks = [((1 << end) - (1 << begin)) for begin, end in itertools.pairwise(edges)]
    for one, other in itertools.combinations(blocks, 2):
        keys = hashes & np.uint64(one | other)
        order = np.argsort(keys, kind="stable")  # among equal keys: as they came
        keys = keys[order]
        at = np.flatnonzero(keys[1:] == keys[:-1])
        step = 1
        while len(at):  # the step-th neighbours of those whose key goes on so far
            earlier, later = order[at], order[at + step]
            near = np.bitwise_count(hashes[earlier] ^ hashes[later]) <= bits
            found.append(later[near] * count + earlier[near])
            step += 1
            at = at[at + step < count]
            at = at[keys[at] == keys[at + step]]
    later, earlier = np.divmod(np.unique(np.concatenate(found)), count)
    return np.stack([earlier, later], 1)
