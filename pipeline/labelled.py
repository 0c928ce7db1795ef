"""Batches of images with their labels, for judging an encoder: every sample once, or without end for a classifier.

The same reading, screening, DALI graph and view arithmetic as in pre-training; one view instead of two.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.loader import usual_threads
from pipeline.pixels import views
from pipeline.pixels.graph import Graph, lend
from pipeline.pixels.view_recipe import RECIPES, MeanStd, ViewRecipe
from pipeline.reading.ahead import Decoding, EncodedBatch, ShardsAhead, any_remote, prefetch_shards
from pipeline.reading.order import Order, draw_of_ids, make_order
from pipeline.reading.reader import Reader, Samples
from pipeline.sources.manifest import Source
from pipeline.sources.storage import Storage, storage_for

CROP_MIN = 0.08  # of the image's area: torchvision's default, and that of the linear protocol
LABELS_TOGETHER = 4096
EVAL_SHARDS_AHEAD = 4  # on their way from a remote source while one is read from end to end


class LabelledBatch(NamedTuple):
    """One view of n images, [n, 3, S, S]; labels int64 [n], -1 where unknown; ids int64 [n]; all on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor


class Augmented(NamedTuple):
    """So many views of each image as pre-training makes them; those of one seed are always the same."""

    number: int
    recipe: ViewRecipe = RECIPES["v2"]
    seed: int = 0


NOT_AUGMENTED = Augmented(0)


def eval_batches(
    source: Source,
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    mean_std: MeanStd = views.IMAGENET,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
    max_bad_fraction: float = 0.01,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
    ranges: Sequence[range] | None = None,
) -> Iterator[LabelledBatch]:
    """Every sample once over the ranks, in the order of the ids: short side to `resize`, central crop of `image_size`.

    `batch_size` is this rank's; the last batch may be smaller. Bad samples are left out, and said so; ValueError past
    `max_bad_fraction`. The cache is the source's unless given. `ranges`: only these ids, all on this rank, no batch
    reaching from one range into the next.
    """
    batches = augmented_batches(
        source,
        NOT_AUGMENTED,
        image_size=image_size,
        resize=resize,
        batch_size=batch_size,
        mean_std=mean_std,
        rank=rank,
        world_size=world_size,
        device=device,
        dtype=dtype,
        num_threads=num_threads,
        max_bad_fraction=max_bad_fraction,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        ranges=ranges,
    )
    yield from (batch for batch, _ in batches)


def augmented_batches(
    source: Source,
    augmented: Augmented,
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    mean_std: MeanStd = views.IMAGENET,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
    max_bad_fraction: float = 0.01,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
    ranges: Sequence[range] | None = None,
) -> Iterator[tuple[LabelledBatch, tuple[torch.Tensor, ...]]]:
    """As `eval_batches`, and with each batch its augmented views: [n, 3, S, S] each."""
    storage = storage_for(source, cache_dir, cache_bytes)
    reader = Reader(source, storage, max_bad_fraction=max_bad_fraction, num_threads=num_threads or usual_threads())
    if ranges is None:
        ranges = [range(source.samples * rank // world_size, source.samples * (rank + 1) // world_size)]
    shards = [(m, s) for m, manifest in enumerate(source.manifests) for s in range(len(manifest.shards))]
    remote = any_remote(source)
    first = np.cumsum([0] + [len(manifest.shards) for manifest in source.manifests])  # of each manifest, in `shards`

    def with_view(samples: Samples) -> EncodedBatch:
        rows = [views.center_crops(samples.heights, samples.widths, image_size=image_size, resize=resize)]
        sizes: dict[str, Any] = {"heights": samples.heights, "widths": samples.widths, "image_size": image_size}
        for view in range(augmented.number):
            keys: dict[str, Any] = {"epochs": samples.draw.epochs, "sample_ids": samples.draw.sample_ids, "view": view}
            keys["seed"] = augmented.seed
            rows.append(views.sample_views(augmented.recipe, **keys, **sizes))
        lent = lend(samples.encoded, rows, image_size=image_size, device=device)
        return EncodedBatch(samples, lent, reader.labels(samples.draw))

    def items() -> Iterator[EncodedBatch]:
        reached = -1
        for low, end in ((low, ids.stop) for ids in ranges for low in range(ids.start, ids.stop, batch_size)):
            draw = draw_of_ids(source, np.arange(low, min(low + batch_size, end), dtype=np.int64))
            at = int(first[draw.manifest[0]] + draw.shard[0])
            if remote and at != reached:
                reached = at
                prefetch_shards(source, storage, shards[at : at + EVAL_SHARDS_AHEAD])
            samples = reader.read(draw, replace=False)
            if len(samples.encoded):
                yield with_view(samples)

    def decode_with_pillow(item: EncodedBatch) -> EncodedBatch:
        return with_view(reader.decode_with_pillow(item.samples, replace=False))

    try:
        yield from _decoded(
            items(),
            decode_with_pillow,
            reader,
            storage,
            batch_size,
            image_size,
            mean_std,
            device,
            dtype,
            num_threads,
            num_views=1 + augmented.number,
        )
    finally:
        if reader.bad:
            print(f"warning: {reader.bad} of {reader.drawn} samples left out, they do not decode", file=sys.stderr)


def train_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    mean_std: MeanStd = views.IMAGENET,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
    max_bad_fraction: float = 0.01,
    ids: np.ndarray | None = None,
    rest: bool = True,
) -> Iterator[LabelledBatch]:
    """This rank's share of batches `start`, `start` + 1, ... of the seed's order, without end.

    Random resized crop (0.08 to 1 of the area) and flip, as the linear protocol has it.

    `batch_size` is global. The last batch of an epoch holds what is left, as main_lincls.py has it: 5,005 batches of
    ImageNet at 256. That of a mixture, whose sources have epochs of their own, is full. A bad sample is replaced.
    `ids` int64 [n]: only these, shuffled over all shards. Without `rest` every batch is full, and an epoch leaves out
    less than a batch: batch norm that is trained fails on a last batch of one image, and is noisy on one of a few.
    ValueError when the source holds less than a batch, or too much of it is bad.
    """
    storage = storage_for(source)
    reader = Reader(source, storage, max_bad_fraction=max_bad_fraction, num_threads=num_threads or usual_threads())
    order = train_order(source, batch_size, seed, ids, rest)
    order.draw(0, 0, rank, world_size)  # so that ranks that do not divide the batch fail here
    ahead = ShardsAhead(source, storage, order, rank, world_size)

    def with_view(samples: Samples) -> EncodedBatch:
        draw = samples.draw
        keys: dict[str, Any] = {"seed": seed, "epochs": draw.epochs, "sample_ids": draw.sample_ids, "view": 0}
        sizes: dict[str, Any] = {"heights": samples.heights, "widths": samples.widths, "image_size": image_size}
        rows = views.sample_crops(**keys, **sizes, crop_min=CROP_MIN)
        lent = lend(samples.encoded, [rows], image_size=image_size, device=device)
        return EncodedBatch(samples, lent, reader.labels(draw))

    def items() -> Iterator[EncodedBatch]:
        step = start
        while True:
            epoch, within = divmod(step, batches_per_epoch(order))
            if within < order.steps_per_epoch:
                if ids is None:
                    ahead.reach(epoch, within)
                draw = order.draw(epoch, within, rank, world_size)
            else:
                draw = order.draw_rest(epoch, rank, world_size)
            if ids is not None:  # the order is one of places in `ids`
                draw = draw_of_ids(source, ids[draw.row])._replace(epochs=draw.epochs)
            yield with_view(reader.read(draw))
            step += 1

    def decode_with_pillow(item: EncodedBatch) -> EncodedBatch:
        return with_view(reader.decode_with_pillow(item.samples))

    share = batch_size // world_size
    batches = _decoded(
        items(), decode_with_pillow, reader, storage, share, image_size, mean_std, device, dtype, num_threads
    )
    yield from (batch for batch, _ in batches)


def train_order(source: Source, batch_size: int, seed: int, ids: np.ndarray | None = None, rest: bool = True) -> Order:
    """The order of `train_batches`. ValueError when there is less than a batch."""
    if ids is None:
        order = make_order(source, batch_size, seed)
    else:
        order = Order([[len(ids)]], batch_size=batch_size, seed=seed)
    order.rest = order.rest if rest else 0
    return order


def batches_per_epoch(order: Order) -> int:
    """Of `train_batches`: the last one may be smaller."""
    return order.steps_per_epoch + (order.rest > 0)


def read_labels(source: Source, *, rank: int = 0, world_size: int = 1) -> Iterator[np.ndarray]:
    """This rank's part of the labels, in the order of the ids, some thousands at a time: int64, -1 for none."""
    storage = storage_for(source)
    reader = Reader(source, storage, num_threads=1)
    begin, end = source.samples * rank // world_size, source.samples * (rank + 1) // world_size
    try:
        for low in range(begin, end, LABELS_TOGETHER):
            yield reader.labels(draw_of_ids(source, np.arange(low, min(low + LABELS_TOGETHER, end), dtype=np.int64)))
    finally:
        reader.close()
        storage.close()


def _decoded(
    items: Iterator[EncodedBatch],
    decode_with_pillow: Callable[[EncodedBatch], EncodedBatch],
    reader: Reader,
    storage: Storage,
    batch_size: int,
    image_size: int,
    mean_std: MeanStd,
    device: str,
    dtype: torch.dtype,
    num_threads: int | None,
    num_views: int = 1,
) -> Iterator[tuple[LabelledBatch, tuple[torch.Tensor, ...]]]:
    def make_graph(feed: Any) -> Graph:
        return Graph(
            feed,
            num_views=num_views,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            num_threads=num_threads or usual_threads(),
            mean=mean_std[0],
            std=mean_std[1],
        )

    decoding = Decoding(items, make_graph, decode_with_pillow)
    try:
        while True:
            try:
                item, (images, *others) = decoding.next()
            except StopIteration:
                return
            assert item.labels is not None
            labels, ids = torch.from_numpy(item.labels), torch.from_numpy(item.samples.draw.sample_ids)
            labels, ids = labels.to(device, non_blocking=True), ids.to(device, non_blocking=True)
            yield LabelledBatch(images, labels, ids), tuple(others)
    finally:
        decoding.close()
        reader.close()
        storage.close()
