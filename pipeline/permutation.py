"""A keyed permutation of [0, n) that stores nothing, and the hash behind it: arithmetic alone.

`permute` gives the image of single numbers, so a shuffle of a billion samples costs no memory; `fold_key` makes its key
from seed, epoch and the like.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

ROUNDS = 8


def mix(x: Keys) -> Keys:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold_key(*parts: int | Ints) -> Keys:
    """uint64 key of the parts, broadcast against each other; negative and huge ints are taken modulo 2^64."""
    key = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        if isinstance(part, int):
            part = np.full(1, part & 0xFFFFFFFFFFFFFFFF, np.uint64)
        key = mix(key * np.uint64(0xD1342543DE82EF95) + np.asarray(part).astype(np.uint64))
    return key


def permute(index: Ints, n: int | Ints, key: int | Keys) -> Ints:
    """Image of `index` under a keyed bijection of [0, n); `n` and `key` may differ from element to element.

    A Feistel network over pairs (left, right) in [0, a) x [0, b), with a*b just above n: each round adds a hash of one
    half to the other. The few images in [n, a*b) walk on along their cycle until they fall inside
    (Black and Rogaway 2002), so nothing of length n is ever stored.
    """
    out = np.array(index, dtype=np.int64)
    sizes = np.broadcast_to(np.asarray(n, np.int64), out.shape)
    keys = np.asarray(key & 0xFFFFFFFFFFFFFFFF, np.uint64) if isinstance(key, int) else key
    keys = np.broadcast_to(keys, out.shape)
    if out.size and (out.min() < 0 or (out >= sizes).any()):
        raise ValueError("permute: an index lies outside [0, n)")
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.int64)
    b = -(-sizes // a)
    walking, x = np.arange(out.size), out
    while walking.size:
        x = _feistel(x, a, b, keys)
        out[walking] = x
        outside = x >= sizes
        walking, x, keys = walking[outside], x[outside], keys[outside]
        a, b, sizes = a[outside], b[outside], sizes[outside]
    return out


def _feistel(x: Ints, a: Ints, b: Ints, keys: Keys) -> Ints:
    left, right = (x // b).astype(np.uint64), (x % b).astype(np.uint64)
    ua, ub = a.astype(np.uint64), b.astype(np.uint64)
    for r in range(0, ROUNDS, 2):
        left = (left + mix(right ^ (keys + np.uint64(r * 0x9E3779B9))) % ua) % ua
        right = (right + mix(left ^ (keys + np.uint64((r + 1) * 0x9E3779B9))) % ub) % ub
    return left.astype(np.int64) * b + right.astype(np.int64)
