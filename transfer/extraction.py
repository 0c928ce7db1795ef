"""Images through an encoder, batch by batch: kNN, linear protocol, monitor, gallery and `embed` have this alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.labelled import NOT_AUGMENTED, Augmented
from pipeline.sources.manifest import Source
from transfer.load import CentralCrops


class FeatureBatch(NamedTuple):
    """A batch of b images, on the device: features fp32 [b, D] as the encoder gives them, not normalised; labels int64
    [b], -1 for none; ids int64 [b]; those of V augmented views fp32 [b, V, D], V may be 0."""

    features: Tensor
    labels: Tensor
    sample_ids: Tensor
    augmented: Tensor


def embedding_by(
    module: nn.Module, device: torch.device, precision: Literal["fp32", "bf16"]
) -> Callable[[Tensor], Tensor]:
    """A function images fp32 [b, 3, S, S] -> what `module`, in that number format, makes of them: [b, D]."""

    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return module(images)  # type: ignore[no-any-return]

    return embed


def feature_batches(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    crops: CentralCrops,
    *,
    ranges: Sequence[range] | None = None,
    augmented: Augmented = NOT_AUGMENTED,
) -> Iterator[FeatureBatch]:
    """This rank's part of `source`, or `ranges` of its ids, in their order; bad samples are left out.

    embed: images fp32 [b, 3, S, S] on the ranks' device -> [b, D].
    """
    for batch, views in crops.batches(source, ranges=ranges, augmented=augmented):
        with torch.no_grad():  # not around the yield: the caller may train a classifier there
            features = embed(batch.images).float()
            of_views = [embed(view).float() for view in views]
            none = features.new_empty(len(features), 0, features.shape[1])
            stacked = torch.stack(of_views, dim=1) if of_views else none
        yield FeatureBatch(features, batch.labels, batch.sample_ids, stacked)
