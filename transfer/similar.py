"""Neighbours, near-duplicates and the principal plane of features [N, D] that are read in chunks, by cosine similarity.

A folder of a billion features needs the memory of two chunks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.progress import Progress
from transfer.effective_rank import chunks
from transfer.embedding import Floats
from transfer.knn import nearest

CHUNK = 8192  # rows; the products of two chunks are 268 MB
MOST_PAIRS = 10_000  # that are kept of any number found


class Pairs(NamedTuple):
    """Near-duplicates, the most alike first. `found` counts all, the arrays hold the MOST_PAIRS most similar ones."""

    found: int
    similarities: NDArray[np.float32]  # [n]
    first: NDArray[np.int64]  # [n], a row of the one set
    second: NDArray[np.int64]  # [n], a row of the other, or a later row of the same


def unit_chunks(features: Floats) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, L2-normalised rows fp32 [n, D])."""
    for low in range(0, len(features), CHUNK):
        part = torch.tensor(np.asarray(features[low : low + CHUNK]))
        yield low, torch.nn.functional.normalize(part, dim=1)


def search(features: Floats, queries: Tensor, k: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """The k rows of features [N, D] that are most similar to each of queries [M, D]: (similarities fp32, rows int64),
    both [M, k], descending. By faiss where it is installed, which needs the memory of all features."""
    queries, k = torch.nn.functional.normalize(queries.float(), dim=1), min(k, len(features))
    try:
        import faiss
    except ImportError:
        best, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for low, part in unit_chunks(features):
            similarities, there = nearest(part, queries, min(k, len(part)), device=device)
            best, order = torch.cat([best, similarities], dim=1).sort(dim=1, descending=True, stable=True)
            rows = torch.cat([rows, there + low], dim=1).gather(1, order)
            best, rows = best[:, :k], rows[:, :k]
        return best, rows
    index = faiss.IndexFlatIP(features.shape[1])
    for _, part in unit_chunks(features):
        index.add(part.numpy())
    by_faiss = index.search(queries.numpy(), k)
    return torch.from_numpy(by_faiss[0]), torch.from_numpy(by_faiss[1])


def near_duplicates(
    one: Floats,
    other: Floats | None,
    above: float,
    *,
    device: str | torch.device = "cpu",
    progress: str = "",
) -> Pairs:
    """Pairs of a row of `one` and a row of `other` whose similarity is at least `above`; `other` None: pairs within
    `one`. Every pair is compared: N^2 D products, for a million images a matter of a GPU."""
    found, kept = 0, [(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))]
    with Progress(progress, len(one)) as shown:
        for low, part in unit_chunks(one):
            part = part.to(device)
            # Within a set each pair is met once: from the earlier chunk, above the diagonal.
            start = low if other is None else 0
            for behind, others in unit_chunks((one if other is None else other)[start:]):
                products = part @ others.to(device).T  # [n, m]
                at = (products >= above).nonzero()  # [pairs, 2]
                if other is None and behind == 0:
                    at = at[at[:, 1] > at[:, 0]]
                found += len(at)
                similarities = products[at[:, 0], at[:, 1]]
                if len(at) > MOST_PAIRS:
                    similarities, most = similarities.topk(MOST_PAIRS)
                    at = at[most]
                rows = at.cpu().numpy()
                kept.append((similarities.cpu().numpy(), rows[:, 0] + low, rows[:, 1] + behind + start))
                if sum(len(each[0]) for each in kept) > 4 * MOST_PAIRS:
                    kept = [_most_similar(kept)]
            shown.advance(len(part))
    return Pairs(found, *_most_similar(kept))


def _most_similar(
    kept: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    similarities, first, second = (np.concatenate(column) for column in zip(*kept))
    order = np.lexsort((second, first, -similarities))[:MOST_PAIRS]  # ties in the order of the rows
    return similarities[order], first[order], second[order]


def principal_plane(features: Floats) -> tuple[Floats, list[float]]:
    """(positions fp32 [N, 2], shares of the variance): L2-normalised features on their first two principal axes."""
    dimensions = features.shape[1]
    second_moment, total = np.zeros((dimensions, dimensions)), np.zeros(dimensions)
    for _, part in unit_chunks(features):
        for rows in chunks(part.numpy()):
            second_moment += rows.T @ rows
            total += rows.sum(axis=0)
    mean = total / len(features)
    values, vectors = np.linalg.eigh(second_moment / len(features) - np.outer(mean, mean))
    axes = vectors[:, :-3:-1]  # [D, 2], the largest first
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # an axis has no direction: choose one
    positions = [(part.numpy() - mean) @ axes for _, part in unit_chunks(features)]
    return np.concatenate(positions).astype(np.float32), (values[:-3:-1] / max(values.sum(), 1e-30)).tolist()
