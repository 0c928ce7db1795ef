"""Folders of features without an encoder."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.reading.table import Row
from transfer.embedding import Embedding, Part, assemble, open_embedding, part_path, save_part


def make_embedding(
    folder: Path,
    features: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    views: np.ndarray | None = None,
    label_lists: list[list[int]] | None = None,
    **about: Any,
) -> Embedding:
    """As transfer.embed writes it, in two parts. features [N, D]."""
    n = len(features)
    views = np.zeros((n, 0, features.shape[1])) if views is None else views
    labels = np.full(n, -1) if labels is None else labels
    rows = [Row(f"image_{i}", label_lists[i] if label_lists else None) for i in range(n)]
    (folder / "parts").mkdir(parents=True)
    for number, part in enumerate((slice(0, n // 3), slice(n // 3, n))):
        of_part = Part(
            features[part].astype(np.float32),
            views[part].astype(np.float32),
            np.arange(n)[part],
            labels[part].astype(np.int64),
            ["shard-000000.tar"] * len(rows[part]),
            rows[part],
        )
        save_part(part_path(folder, number), of_part)
    usual = {"run": "runs/r", "step": 7, "features": "backbone", "encoder": "e", "fingerprint": folder.name}
    assemble(folder, 2, usual | {"in_source": n, "views": views.shape[1]} | about)
    return open_embedding(folder)


def clusters(n: int, seed: int, classes: int = 5, d: int = 24, noise: float = 1.8) -> tuple[np.ndarray, np.ndarray]:
    """Noisy clusters, the same centres for every seed: float32 [n, d], int64 [n]."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return (centres[labels] + noise * rng.normal(size=(n, d))).astype(np.float32), labels
