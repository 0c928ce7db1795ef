"""The rows of benchmarks/gpu.py: each is a process, which prints what it measured as one JSON object.

    python benchmarks/gpu_rows.py loader '{"data": "shards/photos", ...}'

Beside images/s, a row of the loader or of a training has `cpu_cores`, the processor seconds that the process used for
each second of the measurement, and `busiest_threads`, its threads with the largest share: a thread that waits by
spinning has 1.0 there.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


class Processor:
    """Processor time that this process and each of its threads use from now on."""

    def __init__(self) -> None:
        self.began, self.used, self.threads = time.perf_counter(), time.process_time(), self._threads()

    @staticmethod
    def _threads() -> dict[str, float]:
        """Thread's name and number -> processor seconds so far."""
        seconds = {}
        for task in Path("/proc/self/task").iterdir():
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            user, system = rest.split()[11:13]
            seconds[f"{name} {task.name}"] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return seconds

    def so_far(self) -> dict[str, Any]:
        """`cpu_cores` and `busiest_threads`, in processor seconds a second."""
        elapsed = time.perf_counter() - self.began
        shares = {name: (s - self.threads.get(name, 0.0)) / elapsed for name, s in self._threads().items()}
        busiest = sorted(shares.items(), key=lambda item: -item[1])[:5]
        cores = (time.process_time() - self.used) / elapsed
        return {"cpu_cores": round(cores, 2), "busiest_threads": {name: round(share, 2) for name, share in busiest}}


def child_loader(o: dict[str, Any]) -> dict[str, Any]:
    from pipeline.loader import Loader
    from pipeline.pixels import graph
    from pipeline.sources.opening import open_source

    if not o["fancy_upsampling"]:
        decode = graph.fn.decoders.image
        graph.fn.decoders.image = lambda *inputs, **options: decode(
            *inputs, **options | {"jpeg_fancy_upsampling": False}
        )
    loader = Loader(
        open_source(o["data"], progress=False),
        views=o["views"],
        image_size=o["image_size"],
        batch_size=o["batch_size"],
        device=o["device"],
        dtype=torch.bfloat16,
        num_threads=o["threads"],
        prefetch=o["prefetch"],
        hw_decoder_load=o["hw_decoder_load"],
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
            processor = Processor()
    timings = loader.timings()
    free, total = torch.cuda.mem_get_info() if o["device"] != "cpu" else (0, 0)
    result = {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)}
    result |= {"bottleneck": loader.bottleneck(timings), "gpu_memory_gb": (total - free) / 2**30}
    result |= processor.so_far()
    loader.close()
    return result


class Repeated:
    """A Loader whose batches are those of `batches`: it is asked for all else, and never begins to decode."""

    def __init__(self, loader: Any, batches: Iterator[Any]) -> None:
        self.loader, self.batches = loader, batches

    def __next__(self) -> Any:
        return next(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


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
    files = sorted(path for path in images.rglob("*") if path.is_file())

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

    torch.backends.cudnn.benchmark = o["cudnn_benchmark"]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[o["precision"]]
    real_loader = build.open_loader

    def open_loader(r: Any, source: Any, rank: int, ranks: int, device: torch.device) -> Any:
        loader = real_loader(r, source, rank, ranks, device)
        if o["source"] == "shards":
            return loader
        if o["source"] == "constant":
            return Repeated(loader, constant_batches(r.batch_size, r.image_size, device, dtype))
        images = Path(o["images"])
        return Repeated(loader, torchvision_batches(images, r.batch_size, r.image_size, o["threads"], device, dtype))

    build.open_loader = open_loader
    write_metrics, processors, used = train.write_metrics, list[Processor](), dict[str, Any]()

    def noting_processor_time(*arguments: Any) -> None:
        write_metrics(*arguments)
        processors.append(Processor())
        if len(processors) > 2:
            used.update(processors[1].so_far())  # as with the rates, from the third log step on

    train.write_metrics = noting_processor_time  # type: ignore[assignment]
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
        **used,
    }


def child_features(o: dict[str, Any]) -> dict[str, Any]:
    """Features of `train` and `val` on the CPU and on the device, and what weighted kNN makes of both: the evaluation's
    whole path twice. With untrained weights, whose features differ from image to image; those after a few steps do not.
    """
    from pipeline.sources.opening import open_source
    from trainer.joining import Ranks
    from transfer.extraction import embedding_by
    from transfer.knn import classify, extract
    from transfer.load import CentralCrops, load_encoder

    loaded = load_encoder(o["run"], untrained=True)
    found: dict[str, Any] = {}
    for name in ("cpu", o["device"]):
        device = torch.device(name)
        embed = embedding_by(loaded.encoder.backbone.to(device), device, "fp32")
        ranks = Ranks(0, 1, device)
        crops = CentralCrops(loaded.image_size, loaded.mean_std, batch_size=50, num_threads=o["threads"], ranks=ranks)
        (train, train_labels, _), (val, val_labels, _) = (
            extract(embed, open_source(o[part], progress=False), crops) for part in ("train", "val")
        )
        classes = int(train_labels.max()) + 1
        answers = classify(train, train_labels, val, 1, classes=classes, device=device)
        accuracy = (answers == val_labels).float().mean().item()
        found[name] = (torch.cat([train, val]), answers, accuracy)
    (ours, ours_answers, on_cpu), (theirs, their_answers, on_device) = found["cpu"], found[o["device"]]
    cosines = (ours * theirs).sum(dim=1)
    apart, spread = (ours - theirs).norm(dim=1), (ours - ours.mean(dim=0)).norm(dim=1)
    return {
        "images": len(cosines),
        "cosine_median": cosines.median().item(),
        "cosine_min": cosines.min().item(),
        "apart_over_spread": (apart.median() / spread.median()).item(),
        "same_answers": (ours_answers == their_answers).float().mean().item(),
        "knn_accuracy_cpu": on_cpu,
        "knn_accuracy_device": on_device,
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


CHILDREN = {"loader": child_loader, "train": child_train, "features": child_features, "roofline": child_roofline}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
