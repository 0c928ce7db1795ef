"""Everything that only a GPU can show, in one command: one table, one JSON, in benchmarks/results/gpu_*.

    python benchmarks/gpu.py --images DIR                       # all of it; --parts and --seconds bound it
    python benchmarks/gpu.py --images DIR --device cpu --arch resnet18 --image_size 64 --batch_sizes 32 \\
        --steps 6 --train_steps 60 --seconds 300               # a dry run

1. loader: pipeline.loader alone (v1, v2; photographs as they are and packed at short side 256; 2, 4, 16 CPU threads,
   which are also all the cores it may use; prefetch depths; share of the hardware decoder).
2. train: train.py itself, fed by constant tensors, by shards, and by torchvision + DataLoader, eager and compiled. The
   first two on the same number of cores, interleaved.
3. roofline: measured ceilings (bf16 matrix product, device copy) and what a step needs of both.

Every measurement is a process of its own, so that neither caches nor allocators carry over. MoCo's own share of a step
is benchmarks/moco_step.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def hardware(device: str) -> dict[str, Any]:
    import torchvision
    from nvidia import dali

    facts: dict[str, Any] = {
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "dali": dali.__version__,
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 2**30, 1)}
    return facts


def make_shards(images: Path, work: Path, count: int) -> dict[str, str]:
    """Shards of `count` images (the folder's, as often as needed), at native size and packed at short side 256."""
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"error: no images in {images}")
    farm = work / "images"
    farm.mkdir()
    for i in range(count):
        (farm / f"{i:06d}{files[i % len(files)].suffix}").symlink_to(files[i % len(files)].resolve())
    made = {}
    for name, options in {"native": [], "short_256": ["--short_side", "256"]}.items():
        made[name] = str(work / name)
        command = [sys.executable, "-m", "pipeline.make_shards", str(farm), made[name], "--samples_per_shard", "1000"]
        subprocess.run([*command, *options], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return made


# --- children: each prints one JSON object as its last line -----------------------------------------------------------


def child_loader(o: dict[str, Any]) -> dict[str, Any]:
    from pipeline.loader import Loader
    from pipeline.sources.opening import open_source

    loader = Loader(
        open_source(o["data"], progress=False),
        views=o["views"],
        image_size=o["image_size"],
        batch_size=o["batch_size"],
        device=o["device"],
        dtype=torch.bfloat16,
        num_threads=o["threads"],
        prefetch=o["prefetch"],
        **({"hw_decoder_load": o["hw_decoder_load"]} if "hw_decoder_load" in o else {}),
    )
    rates = []
    for round_ in range(1 + o["rounds"]):  # the first one builds and warms up
        began = time.perf_counter()
        for _ in range(o["steps"]):
            batch = next(loader)
        batch.query[0, 0, 0, 0].item()  # waits for the device
        if round_:
            rates.append(o["steps"] * o["batch_size"] / (time.perf_counter() - began))
        else:
            loader.timings()  # so that the bottleneck is not that of building
    timings = loader.timings()
    free, total = torch.cuda.mem_get_info() if o["device"] != "cpu" else (0, 0)
    result = {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)}
    result |= {"bottleneck": loader.bottleneck(timings), "gpu_memory_gb": (total - free) / 2**30}
    loader.close()
    return result


class Repeated:
    """Stands where train.py has its Loader, and gives what `batches` gives."""

    def __init__(self, batches: Iterator[Any], steps_per_epoch: int) -> None:
        self.batches, self.steps_per_epoch = batches, steps_per_epoch

    def __next__(self) -> Any:
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def timings(self) -> dict[str, float]:
        return dict.fromkeys(("read", "screen", "views", "graph"), 0.0)  # train.py names the slowest of them

    def bottleneck(self, timings: dict[str, float]) -> str:
        return "consumer"

    def source_counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def constant_batches(batch_size: int, image_size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Random pixels (zeros run faster than real data does), the same few batches over and over."""
    from pipeline.loader import Batch

    def views() -> torch.Tensor:
        shape = (batch_size, 3, image_size, image_size)
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    ids = torch.arange(batch_size, device=device)
    few = [Batch(views(), views(), ids) for _ in range(4)]
    while True:
        yield from few


def torchvision_batches(
    images: Path, batch_size: int, image_size: int, workers: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Any]:
    """The usual way: torchvision's PIL transforms in a DataLoader, MoCo v2's augmentation."""
    import random

    from PIL import Image, ImageFilter
    from torchvision.transforms import v2

    from pipeline.loader import Batch

    def blur(image: Any) -> Any:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    augment = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.Lambda(blur)], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted(images.iterdir())

    class Views(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 10**6  # so many that no epoch ends, when the workers would start anew

        def __getitem__(self, i: int) -> Any:
            with Image.open(files[i % len(files)]) as image:
                rgb = image.convert("RGB")
            return augment(rgb), augment(rgb), i

    loader = torch.utils.data.DataLoader(
        Views(), batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda"
    )
    while True:
        for query, key, ids in loader:
            moved = [v.to(device, dtype, memory_format=torch.channels_last, non_blocking=True) for v in (query, key)]
            yield Batch(moved[0], moved[1], ids.to(device, non_blocking=True))


def child_train(o: dict[str, Any]) -> dict[str, Any]:
    import recipe
    import train
    from trainer import build

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[o["precision"]]
    real_loader = build.open_loader

    def open_loader(r: Any, source: Any, rank: int, ranks: int, device: torch.device) -> Any:
        if o["source"] == "shards":
            return real_loader(r, source, rank, ranks, device)
        Path(r.out).mkdir(parents=True, exist_ok=True)
        if o["source"] == "constant":
            batches = constant_batches(r.batch_size, r.image_size, device, dtype)
        else:
            images = Path(o["images"])
            batches = torchvision_batches(images, r.batch_size, r.image_size, o["threads"], device, dtype)
        return Repeated(batches, source.samples // r.batch_size)

    build.open_loader = open_loader
    with tempfile.TemporaryDirectory() as run:
        log_every = max(1, o["train_steps"] // (o["rounds"] + 2))
        flags = {
            "config": REPOSITORY / "recipes/moco_v2_r50.yaml",
            "data": o["data"],
            "out": run,
            "arch": o["arch"],
            "image_size": o["image_size"],
            "batch_size": o["batch_size"],
            "precision": o["precision"],
            "compile": str(o["compile"]).lower(),
            "num_threads": o["threads"],
            "max_steps": log_every * (o["rounds"] + 2),
            "log_every": log_every,
            "save_every": 10**9,
        }
        train.main(recipe.parse([f"--{name}={value}" for name, value in flags.items()]))
        log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in log if "images_per_second" in row][2:]  # the first two hold start-up and autotuning
    rates = [row["images_per_second"] for row in rows]
    result = {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)}
    return result | {
        "data_wait": statistics.median(row["data_wait"] for row in rows),
        "memory_gb": rows[-1]["memory_gb"],
    }


def child_roofline(o: dict[str, Any]) -> dict[str, Any]:
    """Ceilings measured here, and the operations of a step: query forward and backward, key forward."""
    from torch.utils.flop_counter import FlopCounterMode

    from model.encoders import build_encoder

    device = torch.device(o["device"])
    size = 8192 if device.type == "cuda" else 1024

    def median_seconds(work: Any, repeats: int = 20) -> float:
        seconds = []
        for i in range(3 + repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = median_seconds(lambda: a @ b)
    source = torch.randn(size * size * (16 if device.type == "cuda" else 4), device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source))

    encoder = build_encoder(o["arch"], dim=128, mlp=True)
    images = torch.randn(2, 3, o["image_size"], o["image_size"])
    with FlopCounterMode(display=False) as counter:
        encoder(images).sum().backward()
        with torch.no_grad():
            encoder(images)
    activations = 0

    def count(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    encoder(images)
    flops, elements = counter.get_total_flops() / 2, activations / 2
    # Fewest bytes without fusion, bf16: forward writes and reads each layer's output once (query and key); backward
    # reads it again and writes and reads its gradient.
    moved = elements * 2 * (2 * 2 + 3)
    flop_rate, byte_rate = 2 * size**3 / matmul, 2 * source.nbytes / copy
    floor = max(flops / flop_rate, moved / byte_rate)
    return {
        "matmul_tflops": flop_rate / 1e12,
        "copy_gb_per_second": byte_rate / 1e9,
        "gflop_per_image": flops / 1e9,
        "megabytes_per_image_unfused": moved / 1e6,
        "arithmetic_limit_images_per_second": flop_rate / flops,
        "memory_limit_images_per_second": byte_rate / moved,
        "images_per_second": 1 / floor,
    }


CHILDREN = {"loader": child_loader, "train": child_train, "roofline": child_roofline}


def run_child(kind: str, options: dict[str, Any], cores: int | None, seconds: float) -> dict[str, Any]:
    available = sorted(os.sched_getaffinity(0))
    pin = ["taskset", "-c", ",".join(map(str, available[:cores]))] if cores else []
    command = [*pin, sys.executable, __file__, "--child", kind, "--options", json.dumps(options)]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        print(f"  {kind} {options}: exit {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        return {"failed": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def plan(
    o: argparse.Namespace, data: dict[str, str], images: Path
) -> Iterator[tuple[str, str, dict[str, Any], int | None]]:
    """(name, kind, options, cores) of every measurement, the ones that matter most first."""
    cores = len(os.sched_getaffinity(0))
    common = {"device": o.device, "image_size": o.image_size, "arch": o.arch, "rounds": o.rounds, "steps": o.steps}
    threads = [t for t in (2, 4, 16) if t <= cores] or [cores]
    if "train" in o.parts:
        for batch_size in o.batch_sizes:
            for compiled in (False, True) if o.device != "cpu" else (False,):
                base = common | {"batch_size": batch_size, "compile": compiled, "threads": threads[0]}
                base |= {
                    "precision": "bf16" if o.device != "cpu" else "fp32",
                    "data": data["native"],
                    "images": str(images),
                    "train_steps": o.train_steps,
                }
                kind = "compiled" if compiled else "eager"
                for turn in range(o.turns):  # both sides, interleaved
                    for source in ("constant", "shards"):
                        name = f"train {source} {kind} batch {batch_size} {threads[0]} cores #{turn}"
                        yield name, "train", base | {"source": source}, threads[0]
            last = base | {"source": "torchvision", "compile": False, "train_steps": o.train_steps // 6}  # it is slow
            yield f"train torchvision eager batch {batch_size} {threads[0]} cores", "train", last, threads[0]
            if cores > threads[0]:
                name = f"train torchvision eager batch {batch_size} {cores} cores"
                yield name, "train", last | {"threads": cores}, cores
    if "loader" in o.parts:
        base = common | {"batch_size": o.batch_sizes[0], "prefetch": 2}
        for views in ("v2", "v1"):
            for packed, folder in data.items():
                for count in threads:
                    options = base | {"views": views, "data": folder, "threads": count}
                    yield f"loader {views} {packed} {count} threads", "loader", options, count
        base |= {"views": "v2", "data": data["native"], "threads": threads[0]}
        for depth in (1, 4):
            yield f"loader v2 native prefetch {depth}", "loader", base | {"prefetch": depth}, threads[0]
        if o.device != "cpu":
            for load in (0.0, 0.4, 0.9, 1.0):
                yield f"loader v2 native hw_decoder_load {load}", "loader", base | {"hw_decoder_load": load}, threads[0]
    if "roofline" in o.parts:
        yield "roofline", "roofline", common, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="photographs at their native size")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--steps", type=int, default=60, help="of a loader's warm-up and of each of its rounds")
    parser.add_argument("--train_steps", type=int, default=140, help="of a training, warm-up and rounds together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2, help="interleaved repetitions of constant against shards")
    parser.add_argument("--parts", nargs="+", choices=sorted(CHILDREN), default=sorted(CHILDREN))
    parser.add_argument("--count", type=int, default=4000, help="images in the shards")
    parser.add_argument("--seconds", type=float, default=1e9, help="end in that time, whatever is measured by then")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child:
        print(json.dumps(CHILDREN[o.child](o.options)))
        return
    if not o.images or not o.images.is_dir():
        sys.exit(f"error: --images {o.images} is not a folder")
    began, results, lines = time.monotonic(), {"hardware": hardware(o.device), "command": " ".join(sys.argv)}, []
    o.output.mkdir(parents=True, exist_ok=True)
    stem = o.output / f"gpu_{'cpu_dry_run' if o.device == 'cpu' else 'h200' if 'H200' in str(results) else 'other'}"
    if sorted(o.parts) != sorted(CHILDREN):  # parts that run one after another keep each other's files
        stem = stem.with_name("_".join([stem.name, *o.parts]))
    with tempfile.TemporaryDirectory() as work:
        data = make_shards(o.images, Path(work), o.count)
        for name, kind, options, cores in plan(o, data, Path(work) / "images"):
            left = o.seconds - (time.monotonic() - began)
            if left < 30:
                lines.append(f"{name:55} not begun: --seconds {o.seconds:.0f} had nearly passed")
            else:
                results[name] = found = run_child(kind, options, cores, min(900, left))
                spread = f"({found['min']:,.0f} to {found['max']:,.0f}, n {found['n']})" if "n" in found else ""
                rate = (
                    f"{found['images_per_second']:12,.0f} images/s" if "images_per_second" in found else "      failed"
                )
                more = "  ".join(
                    f"{k} {v:.3g}" for k, v in found.items() if k in ("data_wait", "memory_gb", "gpu_memory_gb")
                )
                lines.append(f"{name:55} {rate} {spread} {more}")
            print(lines[-1], flush=True)
            # Written after each: a machine that goes away takes nothing along.
            stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            header = f"{json.dumps(results['hardware'])}\n{results['command']}\n\n"
            stem.with_suffix(".txt").write_text(header + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
