"""Few labels: the same parts of a labelled set for everybody, decided by the labels and a seed alone."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def share_of_each_class(labels: Indices, share: float, seed: int) -> Indices:
    """Positions of `share` of each class (at least one image of it), ascending. labels int64 [N], by sample id.

    With one seed, a smaller share lies inside a larger one.
    """
    return _first_of_each_class(labels, seed, lambda n: max(1, round(share * n)))


def shots(labels: Indices, k: int, seed: int) -> Indices:
    """Positions of k images of each class, or of all where it has fewer, ascending; fewer shots lie inside more."""
    return _first_of_each_class(labels, seed, lambda n: k)


def _first_of_each_class(labels: Indices, seed: int, how_many: Callable[[int], int]) -> Indices:
    chosen = []
    for label in np.unique(labels).tolist():
        of_class = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, label]).permutation(len(of_class))
        chosen.append(of_class[order[: how_many(len(of_class))]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
