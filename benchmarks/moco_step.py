"""What MoCo adds to a training step beside its encoders, part by part, and what its shuffle moves.

    python benchmarks/moco_step.py                                          # a GPU: ResNet-50, 224 pixels, batch 256
    python benchmarks/moco_step.py --arch resnet18 --image_size 32 --small_stem --batch_size 64 --queue_size 4096

1. step: query forward + backward + key forward alone, then split BN, momentum update, shuffle, loss and queue added one
   by one, for each number of ranks. The variants take turns within every round, so that a busy machine is busy for all
   of them; medians over rounds; device events on a GPU, and on a CPU the CPU time of rank 0 with one thread for the
   arithmetic, for the wall clock of a shared machine tells of its other users. Optimiser and data are in none of them.
2. shuffle: B images a rank by all_to_all and keys back, against gathering the whole batch in fp32 as the reference code
   does: bytes that a rank receives, and time.
3. split BN: an encoder's forward + backward with plain BN, with split BN, and with the reference demo's view of NCHW
   memory, in both layouts.

Each part is printed, and written to the JSON, when it is done: --output (benchmarks/results/moco_step_CARD.*), with a
picture at the end.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.hardware import card, hardware  # noqa: E402
from model.batchnorm import ShuffleBN, Shuffled, arrive, split_batchnorm, unshuffle  # noqa: E402
from model.encoders import build_encoder  # noqa: E402
from model.moco import MoCo  # noqa: E402

PARTS = ["encoders alone", "split BN", "momentum update", "shuffle", "loss", "queue"]


def in_turns(variants: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each variant, all of them run once in every round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            if dist.is_initialized():
                dist.barrier()
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                variant()
                end.record()
                torch.cuda.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.process_time()
                variant()
                took = 1000 * (time.process_time() - began)
            if turn >= 2:  # the first two warm up
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_step(a: argparse.Namespace, device: torch.device, world: int) -> dict[str, dict[str, float]]:
    """`added`: medians of the step with parts 0..i of PARTS, by the name of part i. `alone`: of each part by itself."""
    rows = a.batch_size // world
    torch.manual_seed(0)
    autocast: Callable[[], Any] = contextlib.nullcontext
    dtype = torch.float32
    if a.precision == "bf16":
        dtype = torch.bfloat16
        autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)  # noqa: E731
    query, key = (
        torch.randn(rows, 3, a.image_size, a.image_size, device=device, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    groups = a.bn_groups if world == 1 else 1
    plain = build_encoder(a.arch, small_stem=a.small_stem, mlp=True).to(device)
    plain.to(memory_format=torch.channels_last)

    def with_groups(count: int) -> tuple[nn.Module, MoCo]:
        encoder = split_batchnorm(copy.deepcopy(plain), count)
        moco = MoCo(encoder, dim=128, queue_size=a.queue_size, temperature=0.2, bn_groups=count).to(device)
        if a.compile:
            encoder.compile()
            moco.encoder_k.compile()
        if world == 1:
            return encoder, moco
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)
        return wrapped, moco

    models = {count: with_groups(count) for count in {1, groups}}

    def step(parts: int) -> None:
        encoder, moco = models[groups if parts >= 1 else 1]
        with autocast():
            shuffled = moco.shuffle(key) if parts >= 3 else key
            q = encoder(query)
            if parts >= 3:
                keys = moco.encode_keys(shuffled)
            else:
                with torch.no_grad():
                    keys = moco.encoder_k(key)
        loss = moco.loss(q, keys)[0] if parts >= 4 else (q.float() * keys.float()).mean()
        loss.backward()
        for p in encoder.parameters():
            p.grad = None
        if parts >= 2:
            moco.momentum_update(encoder, 0.999)
        if parts >= 5:
            moco.enqueue(keys)

    chosen = [i for i in range(len(PARTS)) if i != 1 or groups > 1]
    added = in_turns({PARTS[i]: lambda i=i: step(i) for i in chosen}, a.rounds, device)  # type: ignore[misc]

    encoder, moco = models[groups]
    rows_q = torch.randn(rows, 128, device=device, requires_grad=True)
    keys = F.normalize(torch.randn(rows, 128, device=device), dim=1)

    def shuffle() -> None:
        moved = moco.shuffle(key)
        assert isinstance(moved, Shuffled)
        arrive(moved)
        unshuffle(keys, moved.route)

    alone: dict[str, Callable[[], Any]] = {
        "momentum update": lambda: moco.momentum_update(encoder, 0.999),
        "shuffle": shuffle,
        "loss": lambda: moco.loss(rows_q, keys)[0].backward(),
        "queue": lambda: moco.enqueue(keys),
    }
    return {"added": added, "alone": in_turns(alone, 5 * a.rounds, device)}


def measure_shuffle(a: argparse.Namespace, device: torch.device, world: int) -> dict[str, Any]:
    """all_to_all against the reference's gather, with batch_size / ranks images of 224 pixels a rank."""
    rows, rank = a.batch_size // world, dist.get_rank()
    pixels = 3 * a.shuffle_size**2
    shuffler = ShuffleBN(seed=0)
    keys = torch.randn(rows, 128, device=device)

    def ours(images: Tensor) -> None:
        moved = shuffler(images)
        arrive(moved)
        unshuffle(keys, moved.route)

    def reference(images: Tensor) -> None:
        """Gather, permutation broadcast from rank 0, own rows; keys gathered again to be put back."""
        everything = [torch.empty_like(images) for _ in range(world)]
        dist.all_gather(everything, images)
        order = torch.randperm(world * rows, device=device)
        dist.broadcast(order, 0)
        torch.cat(everything)[order.view(world, -1)[rank]]
        every_key = [torch.empty_like(keys) for _ in range(world)]
        dist.all_gather(every_key, keys)
        torch.cat(every_key)[torch.argsort(order).view(world, -1)[rank]]

    single = torch.randn(rows, 3, a.shuffle_size, a.shuffle_size, device=device)
    half = single.bfloat16().to(memory_format=torch.channels_last)
    variants: dict[str, Callable[[], Any]] = {
        "reference, fp32 gather": lambda: reference(single),
        "ours, fp32": lambda: ours(single.to(memory_format=torch.channels_last)),
        "ours, bf16": lambda: ours(half),
    }
    times = in_turns(variants, a.rounds, device)
    # from other ranks: all of theirs by the gather, (W-1)/W of as many as its own by all_to_all, on average
    others = (world - 1) / world
    megabytes = {
        "reference, fp32 gather": (world - 1) * rows * (pixels * 4 + 128 * 4) / 1e6,
        "ours, fp32": others * rows * (pixels * 4 + 128 * 4) / 1e6,
        "ours, bf16": others * rows * (pixels * 2 + 128 * 4) / 1e6,
    }
    return {name: {"ms": times[name], "megabytes_received_per_rank": megabytes[name]} for name in variants}


class ViewBatchNorm(nn.BatchNorm2d):
    """The reference demo's way: groups beside the channels, by a view that needs contiguous NCHW memory."""

    groups = 8

    def forward(self, input: Tensor) -> Tensor:
        n, c, h, w = input.shape
        wide = input.contiguous().view(n // self.groups, c * self.groups, h, w)
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean.repeat(self.groups), self.running_var.repeat(self.groups)
        weight, bias = self.weight.repeat(self.groups), self.bias.repeat(self.groups)
        out = F.batch_norm(wide, mean, var, weight, bias, True, 0.1, self.eps).view(n, c, h, w)
        self.running_mean.copy_(mean.view(self.groups, c).mean(0))
        self.running_var.copy_(var.view(self.groups, c).mean(0))
        return out


def measure_split(a: argparse.Namespace, device: torch.device) -> dict[str, float]:
    variants: dict[str, Callable[[], Any]] = {}
    for layout_name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        images = torch.randn(a.batch_size, 3, a.image_size, a.image_size, device=device).to(memory_format=layout)
        plain = build_encoder(a.arch, small_stem=a.small_stem)
        view = copy.deepcopy(plain)
        for module in view.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = ViewBatchNorm
        nets = {"plain": plain, "split": split_batchnorm(copy.deepcopy(plain), 8), "view": view}
        for name, net in nets.items():
            net.to(device).to(memory_format=layout)

            def run(net: nn.Module = net, images: Tensor = images) -> None:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=a.precision == "bf16"):
                    net(images).float().mean().backward()
                net.zero_grad()

            variants[f"{name}, {layout_name}"] = run
    return in_turns(variants, a.rounds, device)


def work(a: argparse.Namespace) -> None:
    """One rank of one measurement."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(f"cuda:{rank}" if a.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if a.part == "step":
        result: Any = measure_step(a, device, world)
    elif a.part == "shuffle":
        result = measure_shuffle(a, device, world)
    else:
        result = measure_split(a, device)
    if rank == 0:
        Path(os.environ["MOCO_STEP_RESULT"]).write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


def in_ranks(part: str, world: int) -> Any:
    """Runs this file as `world` ranks; returns what rank 0 measured."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_addr=127.0.0.1"]
        launcher = [*launcher, f"--master_port={port}"] if world > 1 else []  # one rank needs no second import of torch
        command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--part", part]
        environment = dict(os.environ, MOCO_STEP_RESULT=str(output))
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"error: {part} on {world} rank(s) failed:\n{done.stderr[-4000:]}")
        return json.loads(output.read_text())


def added(times: dict[str, float]) -> list[tuple[str, float, float]]:
    """(part, its milliseconds, share of the encoders alone) for each part after the first."""
    names = list(times)
    first = times[names[0]]
    return [
        (now, times[now] - times[before], (times[now] - times[before]) / first)
        for before, now in itertools.pairwise(names)
    ]


def report(results: dict[str, Any]) -> None:
    """Prints what there is so far: a run that is cut short has printed and written the parts that were done."""
    for world, measured in results.get("step", {}).items():
        times = measured["added"]
        print(f"\nstep, {world} rank(s): encoders alone {times['encoders alone']:.2f} ms")
        for name, ms, share in added(times):
            by_itself = f"   by itself {measured['alone'][name]:8.2f} ms" if name in measured["alone"] else ""
            print(f"  + {name:<16} {ms:8.2f} ms  {share:+7.2%}{by_itself}")
        whole = times["queue"] - times["encoders alone"]
        print(f"  = MoCo's own part  {whole:8.2f} ms  {whole / times['encoders alone']:+7.2%}")
        whole = sum(measured["alone"].values())
        print(f"    its parts by themselves, without split BN {whole:.2f} ms {whole / times['encoders alone']:+7.2%}")
    for world, variants in results.get("shuffle", {}).items():
        print(f"\nshuffle, {world} ranks")
        for name, v in variants.items():
            print(f"  {name:<24} {v['ms']:9.2f} ms  {v['megabytes_received_per_rank']:9.2f} MB received a rank")
    if "split" in results:
        print("\nbatch norm in 8 groups, encoder forward + backward")
    for name, ms in results.get("split", {}).items():
        print(f"  {name:<24} {ms:9.2f} ms")


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    for i, (world, measured) in enumerate(results["step"].items()):
        shares = {name: share for name, _, share in added(measured["added"]) if name not in measured["alone"]}
        shares |= {name: ms / measured["added"][PARTS[0]] for name, ms in measured["alone"].items()}
        places = [PARTS.index(name) + 0.4 * i for name in shares]
        axes[0].barh(places, [100 * share for share in shares.values()], height=0.4, label=f"{world} rank(s)")
    axes[0].set_yticks([i + 0.2 for i in range(1, len(PARTS))], PARTS[1:])
    axes[0].set(title="each part by itself (split BN: added)", xlabel="% of the encoders alone")
    axes[0].legend()
    for i, (world, variants) in enumerate(results["shuffle"].items()):
        places = [j + 0.4 * i for j in range(len(variants))]
        axes[1].bar(places, [v["ms"] for v in variants.values()], width=0.4, label=f"{world} ranks")
        axes[1].set_xticks(places, [name.replace(", ", "\n") for name in variants])
        axes[1].legend()
    axes[1].set(title="shuffle", ylabel="ms")
    axes[2].barh(list(results["split"]), list(results["split"].values()))
    axes[2].set(title="BN in 8 groups", xlabel="ms, forward + backward")
    figure.suptitle(results["settings"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--small_stem", action="store_true")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--shuffle_size", type=int, default=224, help="image size of part 2")
    parser.add_argument("--batch_size", type=int, default=256, help="of all ranks together")
    parser.add_argument("--queue_size", type=int, default=65536)
    parser.add_argument("--bn_groups", type=int, default=8, help="on one rank; 1 on several")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=None, help="bf16 on a GPU unless told")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="*", default=None, help="of part 1: 1 and 2 unless told")
    parser.add_argument("--shuffle_ranks", type=int, nargs="*", default=None, help="of part 2: 2 and 4 unless told")
    parser.add_argument("--output", default="", help="path without suffix")
    parser.add_argument("--part", choices=["step", "shuffle", "split"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.precision = a.precision or ("bf16" if a.device == "cuda" else "fp32")
    if a.part:
        work(a)
        return
    there = torch.cuda.device_count() if a.device == "cuda" else 4
    name = torch.cuda.get_device_name() if a.device == "cuda" else f"{os.cpu_count()} CPU cores"
    results: dict[str, Any] = {
        "settings": f"{a.arch}, {a.image_size} px, batch {a.batch_size}, queue {a.queue_size}, {a.precision}, {name}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, n = {a.rounds}"
        + (", compiled" if a.compile else "")
        + (", CPU time" if a.device == "cpu" else ""),
        "hardware": hardware(a.device),
    }
    print(results["settings"], flush=True)
    output = Path(a.output or REPOSITORY / "benchmarks" / "results" / f"moco_step_{card(a.device)}")
    output.parent.mkdir(parents=True, exist_ok=True)

    def done(part: str, found: Any) -> None:
        results[part] = found
        report({part: found})
        sys.stdout.flush()
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")

    done("step", {w: in_ranks("step", w) for w in (a.ranks if a.ranks is not None else (1, 2)) if w <= there})
    done("split", in_ranks("split", 1))
    wanted = a.shuffle_ranks if a.shuffle_ranks is not None else (2, 4)
    done("shuffle", {w: in_ranks("shuffle", w) for w in wanted if w <= there})
    draw(results, output.with_suffix(".png"))
    print(f"\nwritten: {output}.json, {output}.png")
    shares = {}
    for world, measured in results["step"].items():
        encoders = measured["added"]["encoders alone"]
        shares[str(world)] = {
            "encoders_ms": round(encoders, 2),
            "moco_share": round(measured["added"]["queue"] / encoders - 1, 4),
            "by_themselves_without_split_bn": round(sum(measured["alone"].values()) / encoders, 4),
        }
    print(json.dumps({"ranks": shares, "n": a.rounds}))


if __name__ == "__main__":
    main()
