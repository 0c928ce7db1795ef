"""From a source to a folder of features: ranges of ids are shared out to the ranks, each is a file when it is done."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.files import write_atomically
from pipeline.labelled import Augmented
from pipeline.pixels.view_recipe import name_of
from pipeline.progress import Progress
from pipeline.reading.order import draw_of_ids
from pipeline.reading.table import Row, shard_rows
from pipeline.sources.manifest import Source
from pipeline.sources.storage import Storage, storage_for
from trainer.joining import Ranks, all_ranks_agree, control_group, gather_objects
from trainer.run_views import run_views
from transfer.embedding import ABOUT, Part, assemble, part_path, save_part, shard_name
from transfer.extraction import FeatureBatch, embedding_by, feature_batches
from transfer.load import CentralCrops, LoadedEncoder, default_resize, weights_hash

SMALLEST_PART, LARGEST_PART = 256, 16_384  # images
PARTS = 1024  # of a source between these: a kill costs little, and a folder of so many files is no burden
PART_FLOATS = 1 << 26  # numbers in a part, which has to fit into memory a few times


def embed_source(
    loaded: LoadedEncoder,
    source: Source,
    output: Path,
    *,
    features: Literal["backbone", "head"] = "backbone",
    views: int = 0,
    image_size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    num_threads: int | None = None,
    seed: int = 0,
    notes: dict[str, Any] | None = None,
    ranks: Ranks,
    progress: bool = False,
) -> tuple[dict[str, Any], int]:
    """Fills `output` (transfer/embedding.py says with what). Returns embedding.json, and how many images were embedded
    now: none when the folder was whole. All ranks call it; `batch_size` is a rank's. `notes` are kept beside it.

    ValueError when the folder holds something else.
    """
    rank, world_size, device = ranks
    size = image_size or loaded.image_size
    resize = default_resize(size) if resize is None else resize
    augmentation, _ = run_views(loaded.recipe)
    name = name_of(augmentation)
    module = loaded.part(features)
    settings = {
        "encoder": weights_hash(module), "fingerprint": source.fingerprint, "features": features, "views": views,
        "image_size": size, "resize": resize, "mean_std": [list(each) for each in loaded.mean_std],
        "recipe": augmentation.to_dict() if name == "own" else name,
        "crop_min": augmentation.crop_scale[0], "precision": precision, "seed": seed,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # jsonargparse's number types, and what is read back is compared
    ranges = split(source.samples, loaded.encoder.features * (1 + views))
    control = control_group()
    with all_ranks_agree(control) as facts:
        facts |= settings
        about = prepare(output, settings) if rank == 0 else None
        missing = [] if about else [n for n in range(len(ranges)) if not part_path(output, n).exists()]
    about, missing = gather_objects((about, missing), control)[0]
    if about is not None:
        return about, 0
    module = module.to(device).to(memory_format=torch.channels_last)

    mine = missing[len(missing) * rank // world_size : len(missing) * (rank + 1) // world_size]
    batches = feature_batches(
        embedding_by(module, device, precision),
        source,
        CentralCrops(size, loaded.mean_std, resize, batch_size, num_threads, ranks),
        ranges=[ranges[n] for n in mine],
        augmented=Augmented(views, augmentation, seed),
    )
    images = sum(len(ranges[n]) for n in missing)
    label = "features" if progress and rank == 0 else ""
    storage = storage_for(source)
    writing: Future[None] | None = None
    last_shard = dict[tuple[int, int], list[Row]]()
    with ThreadPoolExecutor(1) as writer, Progress(label, source.samples, done=source.samples - images) as shown:
        for number, batch_of_part in by_part(batches, mine, ranges):
            part = [torch.cat(column).cpu().numpy() for column in zip(*batch_of_part)]
            if writing is not None:
                writing.result()
            writing = writer.submit(write_part, part_path(output, number), part, source, storage, last_shard)
            shown.advance(len(ranges[number]) * world_size)
        if writing is not None:
            writing.result()
    storage.close()
    with all_ranks_agree(control):
        pass
    with all_ranks_agree(control):
        if rank == 0:
            unseen = [n for n in range(len(ranges)) if not part_path(output, n).exists()]
            if unseen:
                raise ValueError(
                    f"rank 0 does not see {len(unseen)} of {len(ranges)} parts of {output}, the first is "
                    f"{part_path(output, unseen[0]).name}: give an --output that all machines share"
                )
            about = settings | {"classes": list(source.classes), "in_source": source.samples} | (notes or {})
            ranges16 = {m.grey16_range for m in source.manifests} - {None}
            about |= {"grey16_range": ranges16.pop()} if len(ranges16) == 1 else {}
            about = assemble(output, len(ranges), about)
    return gather_objects(about, control)[0], images


def split(samples: int, floats: int) -> list[range]:
    """Ranges of ids, the same for every number of ranks. floats: numbers that are kept of an image."""
    size = -(-samples // PARTS // SMALLEST_PART) * SMALLEST_PART
    size = min(max(size, SMALLEST_PART), LARGEST_PART, max(1, PART_FLOATS // floats))
    return [range(low, min(low + size, samples)) for low in range(0, samples, size)]


def prepare(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the folder, or checks that it holds the same features, whole or in parts. Returns embedding.json when they
    are whole. ValueError when it holds others."""
    whole, begun = output / ABOUT, output / "parts" / "settings.json"
    for file in (whole, begun):
        if file.is_file():
            there = json.loads(file.read_text())
            if changed := [name for name, value in settings.items() if there.get(name) != value]:
                was = ", ".join(f"{name} was {there.get(name)} and is {settings[name]}" for name in changed)
                raise ValueError(f"{output} holds other features: {was}; take another --output, or delete it")
            return there if file is whole else None
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps(settings, indent=1).encode())
    return None


def by_part(
    batches: Iterator[FeatureBatch], numbers: Sequence[int], ranges: Sequence[range]
) -> Iterator[tuple[int, list[FeatureBatch]]]:
    """The batches of each part in turn; an empty one for a part of which no image decodes."""
    batch = next(batches, None)
    for number in numbers:
        found = []
        while batch is not None and int(batch.sample_ids[0]) in ranges[number]:
            found.append(batch)
            batch = next(batches, None)
        none = torch.empty(0, dtype=torch.int64)
        yield number, found or [FeatureBatch(torch.empty(0, 0), none, none, torch.empty(0, 0, 0))]


def write_part(
    path: Path,
    part: Sequence[Any],
    source: Source,
    storage: Storage,
    last_shard: dict[tuple[int, int], list[Row]],
) -> None:
    """part: the columns of FeatureBatch as arrays. last_shard keeps the rows of one shard for the next part."""
    features, labels, sample_ids, views = part
    draw = draw_of_ids(source, sample_ids.astype(np.int64))
    shards, rows = [], []
    for m, shard, row in zip(draw.manifest.tolist(), draw.shard.tolist(), draw.row.tolist()):
        if (m, shard) not in last_shard:
            last_shard.clear()
            last_shard[m, shard] = shard_rows(source, m, shard, storage)
        shards.append(shard_name(source, m, shard))
        rows.append(last_shard[m, shard][row])
    save_part(path, Part(features, views, sample_ids, labels, shards, rows))
