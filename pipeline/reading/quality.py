"""How well an order is shuffled: pairs of samples of the same class that meet in a batch, against the ideal."""

from typing import Any

import numpy as np

from pipeline.permutation import Ints, permute
from pipeline.reading.order import Order, draw_of_ids
from pipeline.reading.reader import Reader
from pipeline.sources.manifest import Source
from pipeline.sources.storage import storage_for

# Labels are read one by one, after their shard's index: the classes' shares are estimated from so many labels, and a
# source of more shards than this is judged by its shards.
MOST_LABELS = 100_000
MOST_SHARDS = 2_000


def shuffle_quality(source: Source, order: Order, *, epoch: int = 0, start: int = 0, steps: int = 1) -> dict[str, Any]:
    """Share of the pairs within a batch that are of one class, over `steps` steps; the same for batches drawn at random
    without replacement ("ideal"); and their ratio, 1 when perfectly shuffled. Shards take the place of classes in a
    source without labels or of very many shards: for shards sorted by class that is the same question.
    """
    storage = storage_for(source)
    reader = Reader(source, storage, num_threads=1)
    draws = [
        order.draw(epoch + s // order.steps_per_epoch, s % order.steps_per_epoch) for s in range(start, start + steps)
    ]
    ids = np.concatenate([draw.sample_ids for draw in draws])
    shards = sum(len(m.shards) for m in source.manifests)
    labelled = shards <= MOST_SHARDS and reader.labels(draw_of_ids(source, ids[:1]))[0] >= 0

    def classes(ids: Ints) -> Ints:
        draw = draw_of_ids(source, ids)
        if not labelled:
            return draw.manifest << 40 | draw.shard
        return reader.labels(draw)

    seen = classes(ids).reshape(steps, order.batch_size)
    together = np.mean([_same_class_pairs(batch) for batch in seen])
    # The ideal draws from every source in its weight, and within it from all samples alike.
    shares = np.array(order.source_counts(order.steps_per_epoch), np.float64)
    ideal = 0.0
    for m, share in enumerate(shares / shares.sum()):
        n = int(order.totals[m])
        sampled = np.arange(min(n, MOST_LABELS), dtype=np.int64)
        if n > MOST_LABELS:
            sampled = permute(sampled, n, 0)
        counts = np.unique(classes(sampled + int(source.id_offsets[m])), return_counts=True)[1].astype(np.float64)
        ideal += share**2 * (counts * (counts - 1)).sum() / max(1, len(sampled) * (len(sampled) - 1))
    reader.close()
    storage.close()
    return {
        "pairs_of": "class" if labelled else "shard",
        "same_class_pairs": float(together),
        "ideal": float(ideal),
        "ratio": float(together / ideal) if ideal else None,
        "batches": steps,
        "batch_size": order.batch_size,
    }


def _same_class_pairs(classes: Ints) -> float:
    counts = np.unique(classes, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / (len(classes) * (len(classes) - 1)))
