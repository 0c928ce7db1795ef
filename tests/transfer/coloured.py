"""Labelled pictures that a small network learns in seconds."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sample_shards import write_shards


def coloured(folder: Path, count: int, seed: int, labelled: bool = True) -> Path:
    """Noisy pictures of three colours; the colour is the label."""
    rng, files = np.random.default_rng(seed), list[tuple[str, bytes, int | None]]()
    for i in range(count):
        noise = rng.integers(0, 90, (24, 24, 3))
        noise[:, :, i % 3] += 90
        file = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
        files.append((f"{i}.png", file.getvalue(), i % 3 if labelled else None))
    return write_shards(folder, files, 16)
