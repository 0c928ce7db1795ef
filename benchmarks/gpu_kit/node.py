"""Several GPUs show: the exchange between ranks over NCCL, and images/s on one GPU and on all.

    python benchmarks/gpu_kit/node.py --data SHARDS --ranks 8                      # a node with eight GPUs
    python benchmarks/gpu_kit/node.py --data SHARDS --ranks 2 --device cpu --arch resnet18 --image_size 32 \\
        --images_per_rank 16 --queue_size 128 --steps 14                           # gloo

1. exchange: shuffled images come from all ranks, and what is computed from them is back at its own place to the last
   bit; after some steps of MoCo under DDP, parameters, key encoder and queue are equal on all ranks, the queue to the
   last bit, and it holds the keys of all ranks in their order.
2. speed: train.py itself from the shards, on one rank and on all, `images_per_rank` each.

Writes OUTPUT/gpu_CARD_node.json and .txt after each part. The last line is one JSON object.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.hardware import card, hardware  # noqa: E402
from model.batchnorm import Shuffled, arrive, unshuffle  # noqa: E402
from model.encoders import build_encoder  # noqa: E402
from model.moco import MoCo  # noqa: E402
from model.ranks import gather_rows  # noqa: E402

STEPS = 5


def exchange(o: argparse.Namespace) -> None:
    """One rank of part 1. Rank 0 prints the result."""
    rank, world, on_gpu = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), o.device == "cuda"
    device = torch.device(f"cuda:{rank}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    torch.manual_seed(0)
    encoder = build_encoder(o.arch, mlp=True).to(device).to(memory_format=torch.channels_last)
    moco = MoCo(encoder, dim=128, queue_size=o.queue_size, temperature=0.2).to(device)
    wrapped = DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.03, momentum=0.9)
    n, size = o.images_per_rank, o.image_size

    # Each image holds its own number.
    numbers = torch.arange(rank * n, (rank + 1) * n, device=device, dtype=torch.float32)
    images = numbers[:, None, None, None].expand(n, 3, size, size).to(memory_format=torch.channels_last)
    moved = moco.shuffle(images.contiguous(memory_format=torch.channels_last))
    assert isinstance(moved, Shuffled)
    seen = arrive(moved)[:, 0, 0, 0]  # [N]
    back = unshuffle(seen[:, None], moved.route)[:, 0]  # [N]
    from_others = (seen // n != rank).float().mean()

    torch.manual_seed(rank)  # images of its own on each rank
    written: list[Tensor] = []
    for _ in range(STEPS):
        query, key = (
            torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last) for _ in range(2)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            shuffled = moco.shuffle(key)
            q = wrapped(query)
            keys = moco.encode_keys(shuffled)
        moco.loss(q, keys)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        moco.momentum_update(encoder, 0.999)
        moco.enqueue(keys)
        written.append(gather_rows(keys))
    expected = torch.cat(written)[-o.queue_size :].T  # [dim, the newest]
    columns = (int(moco.queue_ptr) - expected.shape[1] + torch.arange(expected.shape[1], device=device)) % o.queue_size
    moco.check_ranks(encoder)  # raises where queue, key encoder or query encoder differ
    queues = gather_rows(moco.queue[None])  # [W, dim, K]
    facts = {
        "shuffle restores the order": bool(torch.equal(back, numbers)),
        "queue equal on all ranks": all(torch.equal(queue, queues[0]) for queue in queues),
        "queue holds all keys in order": bool(torch.equal(moco.queue[:, columns], expected)),
    }
    told: list[Any] = [None] * world
    dist.all_gather_object(told, facts | {"from others": float(from_others)})
    if rank == 0:
        result: dict[str, Any] = {name: all(f[name] for f in told) for name in facts}
        result |= {"encoders equal on all ranks": True}
        result |= {"shuffled images from other ranks": round(statistics.mean(f["from others"] for f in told), 3)}
        print(json.dumps(result | {"backend": dist.get_backend(), "ranks": world, "steps": STEPS}), flush=True)
    dist.destroy_process_group()


def launched(ranks: int, *command: str, seconds: float) -> str:
    """Standard output of torchrun with `command`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, *launcher, f"--master_port={port}", *command],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.wait()
        sys.exit(f"error: not done after {seconds:.0f} s: {' '.join(command)}")
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} on {ranks} ranks ended with {process.returncode}")
    return printed


def speed(o: argparse.Namespace, ranks: int) -> dict[str, float]:
    """train.py from the shards: medians over the log steps after the first two."""
    with tempfile.TemporaryDirectory() as run:
        every = max(1, o.steps // 7)
        flags = {
            "config": "recipes/moco_v2_r50.yaml", "data": o.data, "out": run, "arch": o.arch,
            "image_size": o.image_size, "batch_size": ranks * o.images_per_rank, "bn_groups": max(8, ranks),
            "queue_size": o.queue_size, "precision": "bf16" if o.device == "cuda" else "fp32", "num_threads": 2,
            "max_steps": 7 * every, "log_every": every, "save_every": 10**9, "trackers": "[]",
        }  # fmt: skip
        launched(ranks, "train.py", *(f"--{name}={value}" for name, value in flags.items()), seconds=o.seconds)
        log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in log if "images_per_second" in row][2:]
    found = {name: statistics.median(row[name] for row in rows) for name in ("images_per_second", "data_wait")}
    return found | {"n": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards to train from", required=True)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--images_per_rank", type=int, default=256, help="batch of one rank")
    parser.add_argument("--queue_size", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=70, help="of each training")
    parser.add_argument("--seconds", type=float, default=100, help="the longest that each part may take")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the results")
    parser.add_argument("--rank_of_exchange", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.rank_of_exchange:
        exchange(o)
        return
    if o.device == "cuda" and torch.cuda.device_count() < o.ranks:
        sys.exit(f"error: --ranks {o.ranks}, but there are {torch.cuda.device_count()} GPUs")
    if o.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    o.output.mkdir(parents=True, exist_ok=True)
    stem = o.output / f"gpu_{card(o.device)}_node"
    results: dict[str, Any] = {"hardware": hardware(o.device), "command": " ".join(sys.argv)}

    def done(part: str, found: dict[str, Any]) -> None:
        results[part] = found
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        lines = [f"{name}: {json.dumps(value)}" for name, value in results.items()]
        stem.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        print(f"{part}: {json.dumps(found)}", flush=True)

    printed = launched(o.ranks, __file__, *sys.argv[1:], "--rank_of_exchange", seconds=o.seconds)
    done("exchange", json.loads(printed.splitlines()[-1]))
    for ranks in (1, o.ranks):
        done(f"training on {ranks}", speed(o, ranks))
    one, every = (results[f"training on {ranks}"]["images_per_second"] for ranks in (1, o.ranks))
    print(json.dumps({"ranks": o.ranks, "images_per_second": every, "of_linear": round(every / (o.ranks * one), 3)}))
    if not all(value for value in results["exchange"].values() if isinstance(value, bool)):
        sys.exit("error: the ranks do not agree")


if __name__ == "__main__":
    main()
