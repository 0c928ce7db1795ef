"""Images through an encoder, batch by batch: kNN, the linear protocol, the monitor, the gallery and
`embed` share this."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.labelled import NOT_AUGMENTED, Augmented, augmented_batches
from pipeline.pixels.views import MeanStd
from pipeline.sources.manifest import Source
from transfer.load import default_resize


class FeatureBatch(NamedTuple):
    """Of b images, on the device: features fp32 [b, D] as the encoder gives them, not normalised; labels int64 [b], -1
    for none; ids int64 [b]; those of V augmented views fp32 [b, V, D], V may be 0."""

    features: Tensor
    labels: Tensor
    sample_ids: Tensor
    augmented: Tensor


def feature_batches(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    *,
    image_size: int,
    mean_std: MeanStd,
    resize: int | None = None,
    batch_size: int = 256,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    num_threads: int | None = None,
    ranges: Sequence[range] | None = None,
    augmented: Augmented = NOT_AUGMENTED,
) -> Iterator[FeatureBatch]:
    """This rank's part of `source`, in the order of the ids; bad samples are left out.

    embed: images fp32 [b, 3, S, S] on `device` -> [b, D]. The other arguments are those of `augmented_batches`.
    """
    batches = augmented_batches(
        source,
        augmented,
        image_size=image_size,
        resize=default_resize(image_size) if resize is None else resize,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device=str(device),
        dtype=torch.float32,
        num_threads=num_threads,
        mean_std=mean_std,
        ranges=ranges,
    )
    for batch, others in batches:
        with torch.no_grad():  # not around the yield: the caller may train a classifier there
            features = embed(batch.images).float()
            views = [embed(view).float() for view in others]
            stacked = torch.stack(views, dim=1) if views else features.new_empty(len(features), 0, features.shape[1])
        yield FeatureBatch(features, batch.labels, batch.sample_ids, stacked)
