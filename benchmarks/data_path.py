"""Images per second of two 224 x 224 views on the CPU: ours beside what people use, on the same images in memory.

    python benchmarks/data_path.py --images DIR [--workers 2] [--rounds 5]

Every candidate is an endless stream of batches that lives through the whole run. A round takes each of them in turn:
what it had prefetched is thrown away, then `--seconds` of batches are timed; so a noisy machine is noisy for all, and
medians over the rounds compare; the processor time an image, of all threads and processes, depends less on what else
runs. `decode` is the limit: libjpeg-turbo alone, nothing kept. The candidates with torchvision run in `--workers`
processes of a DataLoader, those with DALI or SPDL in as many threads. `decode_torchcodec` and `spdl` need packages that
this project does without (peers/spdl.txt), and are left out where these are not installed.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import torchvision
import webdataset
from nvidia import dali
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms as T

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from benchmarks.hardware import is_installed, processor  # noqa: E402 - as a script, its own folder is what is on the path
from pipeline.loader import Loader  # noqa: E402
from pipeline.pixels.graph import Graph, Lent, lend  # noqa: E402
from pipeline.pixels.views import IMAGENET, sample_views  # noqa: E402
from pipeline.sources.opening import open_source  # noqa: E402

SIZE = 224
Streams = dict[str, Iterator[int]]  # name -> endless stream of batch sizes


class Blur:
    """The reference's: Pillow's Gaussian of a random sigma."""

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def reference_transform(recipe: str) -> Callable[[Image.Image], torch.Tensor]:
    """The recipe written with torchvision, in the order of the reference code."""
    crop, grey, flip = T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)), T.RandomGrayscale(p=0.2), T.RandomHorizontalFlip()
    end = [flip, T.ToTensor(), T.Normalize(*IMAGENET)]
    if recipe == "v1":
        return T.Compose([crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), *end])
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    return T.Compose([crop, jitter, grey, T.RandomApply([Blur()], p=0.5), *end])


class TwoViews(Dataset[Any]):
    """Endless in practice: index i is image i modulo their number. `transform` makes one view, or both when `both`."""

    def __init__(self, encoded: list[bytes], transform: Callable[[Any], Any], both: bool = False) -> None:
        self.encoded, self.transform, self.both = encoded, transform, both

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> Any:
        image = Image.open(io.BytesIO(self.encoded[index % len(self.encoded)])).convert("RGB")
        if self.both:
            return tuple(self.transform(image)[:2])
        return self.transform(image), self.transform(image)


class Decode(Dataset[int]):
    """libjpeg-turbo, the pixels dropped in the worker."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = [torch.frombuffer(bytearray(e), dtype=torch.uint8) for e in encoded]

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> int:
        return torchvision.io.decode_jpeg(self.encoded[index % len(self.encoded)]).numel()


class DecodeByTorchcodec(Decode):
    """The same by the package that takes the place of torchvision's decoders."""

    def __getitem__(self, index: int) -> int:
        from torchcodec.decoders import decode_jpeg

        return int(decode_jpeg(self.encoded[index % len(self.encoded)]).numel())


def spdl_stream(encoded: list[np.ndarray], batch_size: int, workers: int) -> Iterator[int]:
    """The v2 recipe with AlbumentationsX on OpenCV's images, in the threads of an SPDL pipeline."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # asks no server for a newer version
    import albumentations
    import cv2
    from spdl.pipeline import PipelineBuilder

    cv2.setNumThreads(1)
    view = albumentations.Compose(
        [
            albumentations.RandomResizedCrop((SIZE, SIZE), scale=(0.2, 1.0)),
            albumentations.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            albumentations.ToGray(p=0.2),
            albumentations.GaussianBlur(sigma_range=(0.1, 2.0), p=0.5),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Normalize(*IMAGENET),
        ],
        telemetry=False,
    )

    def two_views(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = cv2.cvtColor(cv2.imdecode(encoded[index], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return view(image=image)["image"], view(image=image)["image"]

    def collated(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(np.stack(views)) for views in zip(*pairs, strict=True))

    pipeline = (
        PipelineBuilder()
        .add_source(int(index) for batch in numbered(len(encoded), batch_size) for index in batch)
        .pipe(two_views, concurrency=workers)
        .aggregate(batch_size)
        .pipe(collated)
        .add_sink(2)
        .build(num_threads=workers)
    )
    with pipeline.auto_stop():
        for query, _ in pipeline:
            yield len(query)


def stream(dataset: Dataset[Any] | IterableDataset[Any], batch_size: int, workers: int) -> Iterator[int]:
    loader = DataLoader(dataset, batch_size, num_workers=workers, drop_last=True)
    for batch in loader:
        yield len(batch if isinstance(batch, torch.Tensor) else batch[0])


def webdataset_stream(tar: Path, batch_size: int, workers: int) -> Iterator[int]:
    view = reference_transform("v2")
    dataset = webdataset.WebDataset(str(tar), resampled=True, shardshuffle=False, seed=0).shuffle(100).decode("pil")
    return stream(dataset.to_tuple("jpg").map(lambda sample: (view(sample[0]), view(sample[0]))), batch_size, workers)


@pipeline_def
def plain_dali(feed: Callable[[], list[Any]]) -> tuple[Any, Any]:
    """The v2 recipe as DALI's documented operators have it: fixed order, contrast about 128, hue in YIQ."""

    def chance(p: float) -> Any:
        return fn.random.coin_flip(probability=p)

    images = fn.decoders.image(fn.external_source(feed, batch=True, dtype=types.UINT8))
    views = []
    for _ in range(2):
        view = fn.random_resized_crop(images, size=SIZE, random_area=(0.2, 1.0))
        jitter, colour = chance(0.8), 1 - chance(0.2)
        view = fn.color_twist(
            view,
            brightness=1 + jitter * fn.random.uniform(range=(-0.4, 0.4)),
            contrast=1 + jitter * fn.random.uniform(range=(-0.4, 0.4)),
            saturation=colour * (1 + jitter * fn.random.uniform(range=(-0.4, 0.4))),
            hue=jitter * fn.random.uniform(range=(-36.0, 36.0)),
        )
        if chance(0.5):
            view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
        mean, std = [255 * m for m in IMAGENET[0]], [255 * s for s in IMAGENET[1]]
        views.append(fn.crop_mirror_normalize(view, mean=mean, std=std, mirror=chance(0.5), output_layout="HWC"))
    return tuple(views)  # type: ignore[return-value]


def plain_dali_stream(encoded: list[np.ndarray], batch_size: int, workers: int) -> Iterator[int]:
    batches = numbered(len(encoded), batch_size)
    pipe = plain_dali(
        lambda: [encoded[i] for i in next(batches)],
        batch_size=batch_size,
        num_threads=workers,
        device_id=None,
        enable_conditionals=True,
        seed=0,
    )
    while True:
        first, _ = (torch.from_dlpack(out.as_tensor()) for out in pipe.run())
        yield len(first)


def our_stream(recipe: str, encoded: list[np.ndarray], batch_size: int, workers: int) -> Iterator[int]:
    sizes = np.array([Image.open(io.BytesIO(e.tobytes())).size for e in encoded])
    batches = numbered(len(encoded), batch_size)

    def feed() -> Lent:
        ids = next(batches)
        rows = [
            sample_views(
                recipe,
                seed=0,
                epochs=np.zeros(batch_size, np.int64),
                sample_ids=ids,
                view=view,
                heights=sizes[ids, 1],
                widths=sizes[ids, 0],
                image_size=SIZE,
                crop_min=0.2,
            )
            for view in range(2)
        ]
        return lend([encoded[i] for i in ids], rows, image_size=SIZE, device="cpu")

    graph = Graph(
        feed,
        num_views=2,
        image_size=SIZE,
        batch_size=batch_size,
        device="cpu",
        dtype=torch.float32,
        num_threads=workers,
    )
    while True:
        yield len(graph.run()[0])


def loader_stream(folder: Path, batch_size: int, workers: int) -> Iterator[int]:
    """The whole of ours: order, reading from the shard, screening, view parameters, graph."""
    for batch in Loader(open_source(str(folder), progress=False), batch_size=batch_size, num_threads=workers):
        yield len(batch.query)


def numbered(n: int, batch_size: int) -> Iterator[np.ndarray]:
    start = 0
    while True:
        yield np.arange(start, start + batch_size) % n
        start += batch_size


def packed(encoded: list[bytes], short_side: int) -> list[np.ndarray]:
    """As make_shards would repack them: the short side made smaller, quality 90."""
    out = []
    for data in encoded:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = min(1.0, short_side / min(image.size))
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        out.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return out


def processor_seconds() -> float:
    """CPU seconds of this process and its children, all threads, until now."""
    here = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (here, *here.children(recursive=True)))


Rates = dict[str, list[tuple[float, float]]]


def measure(streams: Streams, rounds: int, seconds: float, workers: int) -> Rates:
    """Images per second and processor milliseconds an image, of every stream in every round."""
    rates: Rates = {name: [] for name in streams}
    for r in range(rounds):
        for name, batches in streams.items():
            # As much as a DataLoader (2 batches a worker) or a DALI pipeline may have made while the others ran.
            for _ in range(2 * workers + 2):
                next(batches)
            start, used, images = time.perf_counter(), processor_seconds(), 0
            while time.perf_counter() - start < seconds:
                images += next(batches)
            elapsed, used = time.perf_counter() - start, processor_seconds() - used
            rates[name].append((images / elapsed, 1000 * used / images))
            print(
                f"round {r + 1}/{rounds}  {name:16s} {images / elapsed:7.0f} images/s {1000 * used / images:7.2f} ms",
                flush=True,
            )
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photographs")
    parser.add_argument("--workers", type=int, default=2, help="processes of a DataLoader, threads of DALI")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="timed per candidate and round, at least")
    parser.add_argument("--count", type=int, default=1000, help="at most so many of the images")
    parser.add_argument("--only", nargs="*", default=[], help="these candidates alone")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    paths = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: args.count]
    if not paths:
        parser.error(f"no JPEG files under {args.images}")
    encoded = [p.read_bytes() for p in paths]
    arrays = [np.frombuffer(e, np.uint8) for e in encoded]
    b, w = args.batch_size, args.workers

    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "shard-000000.tar"
        with webdataset.TarWriter(str(tar)) as writer:
            for i, data in enumerate(encoded):
                writer.write({"__key__": f"{i:06d}", "jpg": data})
        from lightly.transforms import MoCoV2Transform

        streams: Streams = {
            "decode": stream(Decode(encoded), b, w),
            "reference_v1": stream(TwoViews(encoded, reference_transform("v1")), b, w),
            "reference_v2": stream(TwoViews(encoded, reference_transform("v2")), b, w),
            "lightly": stream(TwoViews(encoded, MoCoV2Transform(input_size=SIZE), both=True), b, w),
            "webdataset": webdataset_stream(tar, b, w),
            "decode_torchcodec": stream(DecodeByTorchcodec(encoded), b, w),
            "spdl": spdl_stream(arrays, b, w),
            "plain_dali": plain_dali_stream(arrays, b, w),
            "ours_v1": our_stream("v1", arrays, b, w),
            "ours_v2": our_stream("v2", arrays, b, w),
            "ours_loader": loader_stream(Path(folder), b, w),
            "ours_v2_at_320": our_stream("v2", packed(encoded, 320), b, w),
            "ours_v2_at_256": our_stream("v2", packed(encoded, 256), b, w),
        }
        if args.only:
            streams = {name: streams[name] for name in args.only}
        for name, needed in (
            ("decode_torchcodec", ["torchcodec"]),
            ("spdl", ["spdl.pipeline", "albumentations", "cv2"]),
        ):
            if name in streams and (missing := [package for package in needed if not is_installed(package)]):
                print(f"{name} is left out: {', '.join(missing)} not installed (benchmarks/peers/spdl.txt)")
                del streams[name]
        for batches in streams.values():  # processes are forked before DALI starts its threads
            next(batches)
        rates = measure(streams, args.rounds, args.seconds, w)

    medians = {name: statistics.median(rate for rate, _ in values) for name, values in rates.items()}
    sizes = np.array([Image.open(io.BytesIO(e)).size for e in encoded])
    size = "x".join(str(int(v)) for v in np.median(sizes, axis=0))
    kilobytes = sum(map(len, encoded)) / len(encoded) / 1000
    optional = {"decode_torchcodec": ["torchcodec"], "spdl": ["spdl", "albumentationsx"]}
    versions = [f"{package} {version(package)}, " for name in optional if name in rates for package in optional[name]]
    lines = [
        f"two {SIZE} x {SIZE} views, {len(encoded)} photographs (median {size}, {kilobytes:.0f} kB)"
        f", {w} workers, batch {b}, {args.rounds} rounds of {args.seconds:g} s, interleaved",
        f"{processor()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, DALI {dali.__version__}, {''.join(versions)}"
        f"{time.strftime('%Y-%m-%d')}",
        f"{'':16s} {'images/s':>9s} {'range':>13s} {'/ reference_v2':>15s} {'/ plain_dali':>13s} {'CPU ms/image':>13s}",
    ]
    for name, values in rates.items():
        ratios = [f"{medians[name] / medians[o]:.2f}" if o in medians else "-" for o in ("reference_v2", "plain_dali")]
        spread = f"{min(rate for rate, _ in values):.0f}-{max(rate for rate, _ in values):.0f}"
        used = statistics.median(ms for _, ms in values)
        lines.append(f"{name:16s} {medians[name]:9.0f} {spread:>13s} {ratios[0]:>15s} {ratios[1]:>13s} {used:13.2f}")
    report = "\n".join(lines)
    result = json.dumps({name: round(value, 1) for name, value in medians.items()})
    print(report)
    print(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".txt").write_text(report + "\n")
        args.output.with_suffix(".json").write_text(result + "\n")


if __name__ == "__main__":
    main()
