"""Small trainings that the model's tests compare: in this process, and as `tests/model/moco_runs.py` in real ranks.

`python -m pytest` reaches it as a plain module. One start of the ranks serves all scenarios, for starting is slow.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import sync_runs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.batchnorm import ShuffleBN, Shuffled, arrive, split_batchnorm, unshuffle
from model.encoders import Encoder
from model.mechanisms import EndToEnd, MemoryBank
from model.moco import MoCo
from model.ranks import GatherWithGradient

BATCH, SAMPLES, DIM, QUEUE = 16, 40, 8, 41  # the global batch; the queue's size is no multiple of it
TEMPERATURE, MOMENTUM, LR = 0.2, 0.9, 0.05


def small_encoder(seed: int = 0, *, batchnorm: bool = True) -> Encoder:
    """Two convolutions with batch norm (or group norm) and an MLP head: every statistic, in milliseconds."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8) if batchnorm else nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16) if batchnorm else nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Encoder(backbone, 16, dim=DIM, mlp=True)


def views(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step: query and key [BATCH, 3, 8, 8], sample ids [BATCH]."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator)
    noise = torch.randn(BATCH, 3, 8, 8, generator=generator)
    return images, images + 0.3 * noise, torch.randperm(SAMPLES, generator=generator)[:BATCH]


def part(tensor: Tensor, rank: int, world: int) -> Tensor:
    n = len(tensor) // world
    return tensor[rank * n : (rank + 1) * n]


def train(
    mechanism: str,
    *,
    groups: int,
    steps: int = 4,
    accumulate: int = 1,
    batchnorm: bool = True,
    repeat: int = 10**9,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Trains as train.py does, on this rank's part of each batch, with `groups` BN groups in the world.

    The batches come again after `repeat` steps. Returns this rank's losses [steps], the first step's gradients, the
    dictionary after each step, and the parameters at the end.
    """
    local_groups = groups // world
    encoder = split_batchnorm(small_encoder(batchnorm=batchnorm), local_groups)
    prepared: nn.Module = encoder
    if world > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers
            prepared = DistributedDataParallel(encoder, broadcast_buffers=False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=LR, momentum=0.9)
    moco = MoCo(encoder, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, bn_groups=local_groups)
    end_to_end = EndToEnd(encoder, temperature=TEMPERATURE)
    bank = MemoryBank(SAMPLES, dim=DIM, num_negatives=24, temperature=TEMPERATURE)
    losses, gradients, queues = [], [], []
    for step in range(steps):
        query, key, ids = (part(t, rank, world) for t in views(step % repeat))
        optimizer.zero_grad()
        all_keys, total = [], 0.0
        for x, y, i in zip(query.chunk(accumulate), key.chunk(accumulate), ids.chunk(accumulate)):
            if mechanism == "moco":
                shuffled = moco.shuffle(y)
                q = prepared(x)
                keys = moco.encode_keys(shuffled)
                loss, _ = moco.loss(q, keys)
                all_keys.append(keys)
            elif mechanism == "end_to_end":
                q = prepared(x)
                loss, _ = end_to_end.loss(q, end_to_end.encode_keys(y, prepared))
            else:
                q = prepared(x)
                loss, _ = bank.loss(q, i)
                bank.update(q, i)
            (loss / accumulate).backward()
            total += loss.item() / accumulate
        losses.append(total)
        if step == 0:
            gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        optimizer.step()
        if mechanism == "moco":
            moco.momentum_update(prepared, MOMENTUM)
            moco.enqueue(torch.cat(all_keys))
        queues.append((bank.bank if mechanism == "memory_bank" else moco.queue).clone())
    moco.check_ranks(prepared if mechanism == "moco" else None)
    bank.check_ranks(encoder)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "gradients": gradients,
        "queues": queues,
        "queue_ptr": moco.queue_ptr.clone(),
        "parameters": [p.detach().clone() for p in encoder.parameters()],
        "key_parameters": [p.detach().clone() for p in moco.encoder_k.parameters()],
    }


def shuffles(rank: int, world: int) -> dict[str, Any]:
    """What shuffle and unshuffle do to tagged images, each rank with its own random state; layouts and dtypes too."""
    torch.manual_seed(100 + rank)  # the permutation must not come from here
    shuffler = ShuffleBN(seed=5)
    n, rounds = BATCH, 60
    stayed, back, mixed = 0, True, []
    for _ in range(rounds):
        tags = torch.arange(n) + rank * n
        images = tags.float()[:, None, None, None].expand(n, 3, 2, 2).contiguous()
        moved = shuffler(images)
        assert isinstance(moved, Shuffled)
        there = arrive(moved)
        stayed += int((there[:, 0, 0, 0].long() // n == rank).sum())
        mixed.append(there[:, 0, 0, 0].long())
        back &= torch.equal(unshuffle(there[:, :, 0, 0], moved.route)[:, 0].long(), tags)
    kinds = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(n, 3, 4, 4).to(dtype).to(memory_format=layout)
            moved = shuffler(images)
            there = arrive(moved)
            same = there.dtype == dtype and there.is_contiguous(memory_format=layout)
            rows = unshuffle(there.flatten(1), moved.route)
            kinds[f"{dtype} {layout}"] = same and torch.equal(rows, images.flatten(1))
    return {"stayed": stayed / (rounds * n), "back": back, "tags": torch.stack(mixed), "kinds": kinds}


def enqueue_non_finite(rank: int, world: int) -> dict[str, Any]:
    """Four keys a rank, tagged; rank 1's second is not finite."""
    moco = MoCo(small_encoder(), dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE)
    keys = torch.arange(4.0)[:, None].expand(4, DIM) + 10 * rank
    if rank == 1:
        keys = keys.clone()
        keys[1, 0] = torch.nan
    moco.enqueue(keys)
    return {"queue": moco.queue[0].clone(), "ptr": int(moco.queue_ptr), "filled": int(moco.queue_filled)}


def check_that_fails(rank: int, world: int) -> str:
    """The message when one bit of the queue differs on the last rank."""
    moco = MoCo(small_encoder(), dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE)
    moco.check_ranks()
    if rank == world - 1:
        moco.queue[3, 7] = torch.nextafter(moco.queue[3, 7], torch.tensor(2.0))
    try:
        moco.check_ranks()
    except ValueError as error:
        return str(error)
    return ""


def gather_gradient(rank: int, world: int) -> Tensor:
    """Each rank's rows weigh differently in each rank's loss: the gradient must hold all ranks' shares."""
    rows = torch.full((2, 1), 1.0 + rank, requires_grad=True)
    gathered = GatherWithGradient.apply(rows, None)
    weights = torch.arange(2.0 * world)[:, None] * (rank + 1)
    (gathered * weights).sum().backward()
    assert rows.grad is not None
    return rows.grad


def work(rank: int, world: int, port: int, output: str) -> None:
    """One rank: all scenarios; rank 0 writes what every rank found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    result = {
        "moco": train("moco", groups=world, steps=20, rank=rank, world=world),
        "both": train("moco", groups=2 * world, rank=rank, world=world),
        "accumulate": train("moco", groups=world, accumulate=2, batchnorm=False, rank=rank, world=world),
        "end_to_end": train("end_to_end", groups=world, rank=rank, world=world),
        "memory_bank": train("memory_bank", groups=world, rank=rank, world=world),
        "shuffles": shuffles(rank, world),
        "non_finite": enqueue_non_finite(rank, world),
        "check": check_that_fails(rank, world),
        "gather_gradient": gather_gradient(rank, world),
        "synchronised": sync_runs.of_rank(rank) if world == 2 else None,
    }
    results: list[Any] = [None] * world
    dist.all_gather_object(results, result)
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


def main(world: int, port: int, output: str) -> None:
    """Forks the ranks, so that torch is imported once for all of them: each is a process of its own all the same."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(rank, world, port, output)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    failed = 0
    for _ in pids:
        pid, status = os.wait()
        if status and not failed:
            failed = 1
            for other in pids:  # they would wait for it
                if other != pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
    sys.exit(failed)


@functools.cache
def of_ranks(world: int) -> list[dict[str, Any]]:
    """Every rank's results of all scenarios, from `world` real processes over gloo."""
    from conftest import REPOSITORY, cpu_environment, free_port

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.pt"
        command = [sys.executable, __file__, str(world), str(free_port()), str(output)]
        done = subprocess.run(
            command, env=cpu_environment(), cwd=REPOSITORY, timeout=200, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-6000:]
        loaded: list[dict[str, Any]] = torch.load(output, weights_only=True)
        return loaded


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
