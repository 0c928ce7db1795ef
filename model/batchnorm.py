"""Shuffle BN (paper §3.3) across ranks and on one device, so that batch statistics do not give the answer away.

A query and its key must not share batch-norm statistics: with one group of statistics for the whole batch the network
finds its positives by them and learns nothing. Hence statistics over parts of the batch (a rank, or one of `groups`
parts of a rank's batch), and keys encoded in a shuffled order, so that a key meets other samples than its query did.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.encoders import Encoder
from model.parts_norm import PartsNorm
from model.ranks import ExchangeWithGradient, Group, exchange_rows, rank_and_world


def constructor_arguments(original: _BatchNorm) -> dict[str, Any]:
    """Those that make a batch norm like `original`, but for its state."""
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    return {name: getattr(original, name) for name in names}


class SplitBatchNorm(_BatchNorm):
    """Batch norm with separate statistics for each of `groups` equal, contiguous parts of the batch, when training.

    It keeps the layout of its input, channels-last included: the batch is the outermost dimension of both, so a part is
    a slice. The running statistics move once a step, to the mean over the parts, as if each were a GPU.
    """

    def __init__(self, original: _BatchNorm, groups: int) -> None:
        super().__init__(**constructor_arguments(original))
        self.load_state_dict(original.state_dict())
        self.train(original.training)
        self.groups = groups
        # timm's BatchNormAct2d has an activation inside
        self.drop = getattr(original, "drop", None) or nn.Identity()
        self.act = getattr(original, "act", None) or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return cast(Tensor, self.act(self.drop(super().forward(input))))
        if input.shape[0] % self.groups:
            raise ValueError(f"a rank's batch of {input.shape[0]} does not divide into bn_groups {self.groups}")
        if input.numel() // input.shape[1] <= self.groups:
            raise ValueError(
                f"a batch norm over {tuple(input.shape)} in bn_groups {self.groups} has one value a channel and group, "
                "which has no variance; take fewer groups or a larger batch"
            )
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var)
        settings = (self.groups, self.momentum or 0.0, self.eps)
        out = PartsNorm.apply(input, self.weight, self.bias, *running, *settings)
        return cast(Tensor, self.act(self.drop(out)))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs [N, C, ...], got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def split_batchnorm(encoder: Encoder, groups: int) -> Encoder:
    """The encoder, its batch norms replaced in place by ones with `groups` groups; unchanged for groups 1 or no BN.

    The state dict's keys and values stay as they are. ValueError for a kind of batch norm that it does not know.
    """
    if groups < 1:
        raise ValueError(f"bn_groups is {groups}; it is a number of equal parts of a rank's batch, 1 or more")
    if groups > 1:
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, SplitBatchNorm) or not isinstance(child, _BatchNorm):
                    continue
                if type(child).__name__ not in ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d"):
                    raise ValueError(f"bn_groups {groups}: cannot split a {type(child).__name__} into groups")
                setattr(module, name, SplitBatchNorm(child, groups))
    return encoder


def batchnorm_shortcut(encoder: Encoder, *, world_size: int, bn_groups: int, shuffle_bn: bool) -> str:
    """Why queries and keys of such a run would share batch statistics, with the remedy; empty when they do not."""
    if not encoder.has_batchnorm:
        return ""
    if world_size * bn_groups == 1:
        return (
            "one process with bn_groups 1: query and key share batch-norm statistics, which give the positive away, "
            "and the encoder learns that instead of the images; set bn_groups to 8 (a divisor of the batch), as the "
            "reference CIFAR-10 demo does on one GPU, or start more processes"
        )
    if not shuffle_bn:
        return (
            "shuffle_bn is off: a query and its key share batch-norm statistics, which give the positive away "
            "(the paper's Figure 7 shows what that does); set shuffle_bn true"
        )
    return ""


class Route(NamedTuple):
    """How one shuffle moves the rows of this rank. All of it follows from the permutation, which every rank draws."""

    send: Tensor  # int64 [N], on the device: own rows in the order they leave, by destination rank
    place: Tensor  # int64 [N], on the device: for each row of the shuffled batch, its place among those received
    send_back: Tensor  # the inverses of these two, for the way home
    place_back: Tensor
    send_counts: list[int]  # rows for each rank
    receive_counts: list[int]  # rows from each rank


class Shuffled(NamedTuple):
    """A key batch on its way: `arrive` ends the transfer."""

    route: Route
    received: Tensor
    sent: Tensor  # kept until the transfer ends
    work: dist.Work | None


def draw_permutation(rows: int, seed: int, count: int) -> np.ndarray:
    """int64 [rows], for the `count`-th shuffle of a run: the same on every rank, without a broadcast."""
    return np.random.default_rng((seed, count)).permutation(rows)


def plan_route(permutation: np.ndarray, rank: int, world: int, device: torch.device) -> Route:
    """Row j of the shuffled global batch is row `permutation[j]` of the global one; rank r holds [r*N, (r+1)*N)."""
    n = len(permutation) // world
    owner = permutation // n
    leaving = np.flatnonzero(owner == rank)  # rows of the shuffled batch that come from here: by destination, ascending
    arriving = owner[rank * n : (rank + 1) * n]
    send = permutation[leaving] - rank * n
    send_back = np.argsort(arriving, kind="stable")  # they arrive by source, in the order of the shuffled batch
    # all indices in one small copy; it needs no synchronisation
    indices = np.stack([send, np.argsort(send_back), send_back, np.argsort(send)])
    on_device = torch.from_numpy(indices).to(device, non_blocking=True)
    return Route(
        send=on_device[0],
        place=on_device[1],
        send_back=on_device[2],
        place_back=on_device[3],
        send_counts=np.bincount(leaving // n, minlength=world).tolist(),
        receive_counts=np.bincount(arriving, minlength=world).tolist(),
    )


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], with the layout kept: indexing a channels-last batch would otherwise give a contiguous one."""
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return rows.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return rows.index_select(0, index)


class ShuffleBN(nn.Module):
    """Shuffles the key batches of a run. Which permutation comes next is a count in the state dict, equal on all ranks.

    enabled False, or an encoder without batch norm, passes images on as they are.
    """

    def __init__(self, *, seed: int, group: Group = None, enabled: bool = True) -> None:
        super().__init__()
        self.seed, self.group, self.enabled = seed, group, enabled
        self.count = 0

    def forward(self, images: Tensor) -> Tensor | Shuffled:
        if not self.enabled:
            return images
        self.count += 1
        return shuffle(images, seed=self.seed, count=self.count, group=self.group)

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.seed, self.count = int(state["seed"]), int(state["count"])


@torch.no_grad()
def shuffle(images: Tensor, *, seed: int, count: int, group: Group = None) -> Shuffled:
    """Sends the rows of [N, 3, H, W] to where the permutation wants them: N images a rank, in their own dtype.

    The transfer runs on beside whatever comes next, until `arrive`. Every rank must hold the same N.
    """
    rank, world = rank_and_world(group)
    route = plan_route(draw_permutation(world * images.shape[0], seed, count), rank, world, images.device)
    leaving = _take(images, route.send)
    if world == 1:
        return Shuffled(route, leaving, leaving, None)
    channels_last = leaving.is_contiguous(memory_format=torch.channels_last)
    rows = leaving.permute(0, 2, 3, 1) if channels_last else leaving.contiguous()
    received, work = exchange_rows(rows, route.send_counts, route.receive_counts, group, wait=False)
    return Shuffled(route, received.permute(0, 3, 1, 2) if channels_last else received, rows, work)


def arrive(shuffled: Shuffled) -> Tensor:
    """Waits for the transfer; the shuffled images of this rank, [N, 3, H, W]."""
    if shuffled.work is None:
        return shuffled.received
    shuffled.work.wait()
    return _take(shuffled.received, shuffled.route.place)


def encode_shuffled(encoder: nn.Module, images: Tensor | Shuffled, group: Group = None) -> Tensor:
    """The encoder's output for the images, each row back with the rank and place of its image: [N, dim]."""
    if isinstance(images, Tensor):
        return cast(Tensor, encoder(images))
    return unshuffle(encoder(arrive(images)), images.route, group)


def unshuffle(rows: Tensor, route: Route, group: Group = None) -> Tensor:
    """The inverse, for what was computed from the shuffled images: [N, dim] -> [N, dim] of this rank's own samples.

    Gradients go back the same way, for the end-to-end mechanism.
    """
    _, world = rank_and_world(group)
    if world > 1:
        leaving = rows.index_select(0, route.send_back)
        rows = ExchangeWithGradient.apply(leaving, route.receive_counts, route.send_counts, group)
    return rows.index_select(0, route.place_back)
