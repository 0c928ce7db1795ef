"""How many dimensions the features really use, which needs no label: RankMe and LiDAR.

Both are the exponential of the entropy of a spectrum: 1 when one direction holds everything (collapse), D when all D
hold the same.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

EPSILON = 1e-7  # of both papers
DELTA = 1e-4  # on the diagonal of LiDAR's covariance within images; published code has 1e-6 to 1e-3
CHUNK_FLOATS = 1 << 24  # numbers that are read into memory at a time

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


def rankme(features: Floats) -> float:
    """RankMe (Garrido et al. 2023, equations 1 and 2) of features [N, D], not normalised and not centred; read in
    chunks. It depends on N: compare figures of as many images."""
    second_moment = np.zeros((features.shape[1],) * 2)
    for part in chunks(features):
        second_moment += part.T @ part
    return rank_of_spectrum(_singular_values(second_moment, len(features)))


class SecondMoment:
    """X'X of features X that come in batches, in float64 on their device: all that RankMe needs of them."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # [D, D]
        self.count = 0

    def add(self, features: Tensor) -> None:
        """features [b, D], not normalised."""
        with torch.autocast(features.device.type, enabled=False):  # the monitor may run inside train.py's
            x = features.double()
            product = x.T @ x
        self.total = product if self.total is None else self.total + product
        self.count += len(features)

    def rankme(self, group: dist.ProcessGroup | None = None) -> float:
        """As `rankme`, of the features of all ranks; every rank gets it. NaN when a feature is not finite."""
        assert self.total is not None, "no features were added"
        total = self.total
        count = torch.tensor(self.count, dtype=torch.float64, device=total.device)
        if group is not None and group.size() > 1:
            dist.all_reduce(total, group=group)
            dist.all_reduce(count, group=group)
        return rank_of_spectrum(_singular_values(total.cpu().numpy(), int(count)))


def _singular_values(second_moment: Doubles, count: int) -> Doubles:
    """Of X [N, D] from X'X in float64, where its small ones keep eight digits beside the largest: min(N, D) of them."""
    if not np.isfinite(second_moment).all():
        return np.array([np.nan])
    values = np.linalg.eigvalsh(second_moment)[::-1][:count]
    return np.sqrt(np.maximum(values, 0))


def lidar(views: Floats) -> float:
    """LiDAR (Thilak et al. 2024, section 4) of the features of V views of each of N images, [N, V, D]: the rank of
    what tells images apart, measured by what augmentation does to one. ValueError with less than two views or images.
    """
    count, number, dimensions = views.shape
    if min(count, number) < 2:
        raise ValueError(f"LiDAR needs two images with two views each at least, these are {count} with {number}")
    from scipy.linalg import eigh

    within = np.zeros((dimensions, dimensions))
    between, total = np.zeros_like(within), np.zeros(dimensions)
    for part in chunks(views):
        means = part.mean(axis=1)  # [n, D]
        apart = (part - means[:, None]).reshape(-1, dimensions)
        within += apart.T @ apart
        between += means.T @ means
        total += means.sum(axis=0)
    between = between / count - np.outer(total, total) / count**2
    within = within / (count * number) + DELTA * np.eye(dimensions)
    # Eigenvalues of within^-1/2 between within^-1/2, without the roots.
    return rank_of_spectrum(np.maximum(eigh(between, within, eigvals_only=True), 0))


def rank_of_spectrum(values: Doubles) -> float:
    """exp of the entropy of non-negative values after division by their sum; 0 when all are 0."""
    if values.sum() == 0:
        return 0.0
    p = values / values.sum() + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def chunks(x: Floats) -> Iterator[Doubles]:
    rows = max(1, CHUNK_FLOATS // int(np.prod(x.shape[1:])))
    for low in range(0, len(x), rows):
        yield x[low : low + rows].astype(np.float64)
