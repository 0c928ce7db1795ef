"""This process among those that torchrun or `accelerate launch` started; alone when nobody did."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    rank: int
    world_size: int
    device: torch.device


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the process group named by the launcher's environment and leaves it at the end. ACCELERATE_USE_CPU=true
    keeps it off the GPUs."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not cpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("gloo" if cpu else "nccl", device_id=None if cpu else device)
    yield Ranks(rank, world_size, device)
    if world_size > 1:  # not after an error: NCCL would wait there for the other ranks, and hide it
        dist.destroy_process_group()
