"""Exchange between ranks: gathered rows, exchanged rows, and whether they still agree.

Everything works without torch.distributed too, as a world of one. `group` None is the default process group.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
CHUNK = 1 << 24  # words that a checksum takes at a time


def rank_and_world(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) when torch.distributed is not running."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@torch.no_grad()
def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """[N, ...] of every rank -> [W*N, ...], rank 0's rows first. No gradient: queues and banks want none."""
    _, world = rank_and_world(group)
    if world == 1:
        return rows
    gathered = rows.new_empty((world * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


class GatherWithGradient(torch.autograd.Function):
    """`gather_rows` whose backward hands every row's gradient, summed over the ranks, back to the rank that owns it.

    Summed, not averaged: DDP then averages the parameters' gradients, which gives the gradient of the mean of the
    ranks' losses, the same as one process with the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, rows.shape[0]
        return gather_rows(rows, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)  # gloo has no reduce_scatter; [W*N, dim] is small
        rank, _ = rank_and_world(ctx.group)
        return total[rank * ctx.rows : (rank + 1) * ctx.rows], None


class ExchangeWithGradient(torch.autograd.Function):
    """`exchange_rows` whose backward sends the gradients the way the rows came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange_rows(rows, send, receive, group)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, _ = exchange_rows(gradients[0].contiguous(), ctx.receive, ctx.send, ctx.group)
        return back, None, None, None


def exchange_rows(
    rows: Tensor, send: list[int], receive: list[int], group: Group, wait: bool = True
) -> tuple[Tensor, dist.Work | None]:
    """all_to_all: the first `send[0]` rows go to rank 0, the next `send[1]` to rank 1, ...; returns what came, by rank.

    rows: [N, ...] contiguous, any dtype. With wait=False the transfer goes on beside other work until `work.wait()`.
    """
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    # as bytes: every back end moves those, whatever the training dtype
    work = dist.all_to_all_single(
        received.view(-1).view(torch.uint8).view(received.shape[0], -1),
        rows.view(-1).view(torch.uint8).view(rows.shape[0], -1),
        output_split_sizes=receive,
        input_split_sizes=send,
        group=group,
        async_op=not wait,
    )
    return received, work


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 that changes with any bit or place of a tensor: its 32-bit words times their positions, wrapping."""
    words = tensor.detach().contiguous().view(-1)
    words = words.view(torch.int32) if words.element_size() % 4 == 0 else words.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), CHUNK):  # a memory bank can be large, and this needs four times its words
        part = words[start : start + CHUNK].to(torch.int64)
        total += (part * (2 * torch.arange(start, start + len(part), device=words.device) + 3)).sum()
    return total


@torch.no_grad()
def check_equal(state: Mapping[str, Tensor], group: Group = None) -> None:
    """Compares checksums of named tensors over the ranks; synchronises, so for the start, a resume, and now and then.

    ValueError naming the tensors and the ranks that differ from most of the others.
    """
    _, world = rank_and_world(group)
    if world == 1:
        return
    names = sorted(state)
    mine = torch.stack([checksum(state[name]) for name in names])
    table = gather_rows(mine[None], group).tolist()  # [W][names]
    faults: dict[int, list[str]] = {}
    for column, name in enumerate(names):
        sums = [row[column] for row in table]
        usual = max(Counter(sums).items(), key=lambda item: (item[1], item[0] == sums[0]))[0]
        for rank in range(world):
            if sums[rank] != usual:
                faults.setdefault(rank, []).append(name)
    if faults:
        text = "; ".join(
            f"rank {rank}: {', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
            for rank, found in sorted(faults.items())
        )
        raise ValueError(
            f"the {world} ranks no longer hold the same state ({text} differ from the other ranks'); "
            "start again from the last checkpoint, and check that all ranks run the same code, seed and number of steps"
        )
