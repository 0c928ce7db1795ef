"""How ours runs on a rank of `resume.py`; and what all systems share there: a place among the ranks, and the views.

An `open_NAME` (the peers' are in `resume_peers.py`) takes a `Place`, which rank of how many and what data, and what was
saved, a list with a state for each rank that saved one, or None at the start. It gives an `Opened`: batches of (epoch,
sample ids, checksums of each sample's views), the state to save, and how to close.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

SEED, SIDE = 0, 32


class Place(NamedTuple):
    data: str
    samples: int
    batch: int  # global
    epochs: int
    rank: int
    world: int
    workers: int  # of a rank's DataLoader
    first_world: int  # ranks that the run began with
    folder: Path  # of the run


class Opened(NamedTuple):
    batches: Iterator[tuple[int, list[int], list[int]]]
    state: Callable[[], Any]
    close: Callable[[], None]


def two_views(encoded: bytes) -> torch.Tensor:
    """uint8 [2, SIDE, SIDE, 3]: RandomResizedCrop(scale=(0.2, 1)) of square shape, and a flip."""
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = image.convert("RGB")
    views = []
    for _ in range(2):
        side = min(pixels.size) * float(torch.empty(1).uniform_(0.2, 1)) ** 0.5
        left, top = ((length - side) * float(torch.rand(1)) for length in pixels.size)
        view = pixels.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        if torch.rand(1) < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(torch.from_numpy(np.array(view)))
    return torch.stack(views)


def checksums(*views: torch.Tensor) -> list[int]:
    """One for each sample, over all its views."""
    found = [0] * len(views[0])
    for view in views:
        rows = view.contiguous().numpy()
        found = [zlib.crc32(rows[i].tobytes(), found[i]) for i in range(len(found))]
    return found


# --- ours -------------------------------------------------------------------------------------------------------------


def import_ours() -> None:
    """All that a rank loads before its first batch, but no pipeline: DALI's threads would not be there after a fork."""
    import aiohttp
    import nvidia.dali._debug_mode
    import nvidia.dali.plugin.numba

    import checkpoint
    from pipeline.loader import Loader
    from pipeline.manifest import open_source
    from pipeline.pixels.kernels_cpu import shape_setter

    assert nvidia.dali.plugin.numba and aiohttp and checkpoint and Loader is not None and open_source is not None
    shape_setter(SIDE)


def open_ours(place: Place, saved: Any) -> Opened:
    """docs/training.md: "the same command continues it", on any number of ranks that divides the batch."""
    from pipeline.loader import Loader
    from pipeline.manifest import open_source

    cache = str(place.folder / "cache") if place.data.startswith("http") else None
    loader = Loader(
        open_source(place.data, progress=False, cache_dir=cache),
        views="v1", image_size=SIDE, batch_size=place.batch, epochs=place.epochs, seed=SEED, rank=place.rank,
        world_size=place.world, num_threads=1, quarantine=place.folder / "quarantine.jsonl", cache_dir=cache,
    )  # fmt: skip
    if saved is not None:
        loader.load_state_dict(saved[0])

    def batches() -> Iterator[tuple[int, list[int], list[int]]]:
        for batch in loader:
            epoch = (loader.state_dict()["batches"] - 1) // loader.steps_per_epoch
            yield epoch, batch.sample_ids.tolist(), checksums(batch.query, batch.key)

    return Opened(batches(), loader.state_dict, loader.close)
