"""How fast make_shards packs, beside what it is made of: GNU tar, bare libjpeg-turbo decoding, Pillow shrinking.

    python benchmarks/make_shards.py PHOTOS [--copies 8] [--rounds 5] [--workers 2] [--disk FOLDER]

Each round runs every side once, in turn, on the same files from the page cache, in processes that are already running
(make_shards takes about two seconds to start, whatever the size of the collection). Listing and planning are part of
our time, walking the folder is part of tar's. Written to memory (/dev/shm), so that both sides show what they cost and
not how busy the disk is; with `--disk` also there, both with an fsync at the end.
"""

import argparse
import concurrent.futures as futures
import functools
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image, ImageCms, ImageOps

from pipeline.make_shards import pack_tasks
from pipeline.packing import shard as pack
from pipeline.packing import workers
from pipeline.packing.collect import collect
from pipeline.packing.listing import Listing
from pipeline.packing.plan import plan
from pipeline.packing.prepare import Options
from pipeline.packing.survey import Survey

SIDE = 256
ORIENTATION = 0x0112


def decode(paths: list[str]) -> int:
    """Bare libjpeg-turbo: read the file, decode it to RGB, drop it."""
    for path in paths:
        simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB", strict=False)
    return len(paths)


def shrink(filter: Image.Resampling, paths: list[str]) -> int:
    """Pillow, draft mode off, the same work: decode all of it, resize, to sRGB, upright, encode; nothing is written."""
    for path in paths:
        image: Image.Image = Image.open(io.BytesIO(Path(path).read_bytes()))
        profile = to_srgb(image.info.get("icc_profile")) if image.mode == "RGB" else None
        upright = image.getexif().get(ORIENTATION, 1) == 1
        image = image.convert("RGB")
        scale = SIDE / min(image.size)
        if scale < 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), filter)
            if profile is not None:
                ImageCms.applyTransform(image, profile, inPlace=True)
            if not upright:
                ImageOps.exif_transpose(image, in_place=True)
            image.save(io.BytesIO(), "JPEG", quality=90)
    return len(paths)


@functools.lru_cache(64)
def to_srgb(icc: bytes | None) -> ImageCms.ImageCmsTransform | None:
    if not icc:
        return None
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    if "srgb" in ImageCms.getProfileDescription(profile).lower():
        return None
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")


def in_parallel(pool: futures.Executor, work: Callable[[list[str]], int], paths: list[str]) -> int:
    return sum(pool.map(work, [paths[i : i + 50] for i in range(0, len(paths), 50)]))


def ours(pool: futures.Executor, src: Path, dest: Path, options: Options, shards: int) -> int:
    """List, plan, pack: as make_shards does, without starting processes and without the contact sheet."""
    state = dest / ".make_shards"
    state.mkdir(parents=True)
    found = Survey()
    listing = Listing.write(state, collect(str(src), found), found, classes=[], labels=True)
    size = -(-len(listing) // shards)
    planned = plan(listing.sizes, None, 0, holdout=0, samples_per_shard=size, shard_bytes=1 << 40)
    tasks = pack_tasks(listing, None, 0, iter(planned), str(dest), options)
    return sum(done.images for done in pool.map(pack.pack, tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        rows = run(arguments, Path(memory))
    report = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "load_average": os.getloadavg(),
        **rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def run(arguments: argparse.Namespace, memory: Path) -> dict[str, object]:
    src = memory / "src"
    photos = sorted(p for p in arguments.photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    for copy in range(arguments.copies):
        folder = src / f"class_{copy}"
        folder.mkdir(parents=True)
        for photo in photos:
            shutil.copy(photo, folder)
    paths = sorted(map(str, src.rglob("*.*")))
    total = sum(os.path.getsize(path) for path in paths)  # noqa: PTH202
    count, shards = arguments.workers, 2 * arguments.workers
    no_verify, verified, small = Options(no_verify=True), Options(), Options(short_side=SIDE)
    with workers.executor(count, "") as (pool, _, _):

        def tar(root: Path, sync: bool) -> None:
            subprocess.run(["tar", "cf", root / "a.tar", "-C", src, "."], check=True)
            if sync:
                subprocess.run(["sync", root / "a.tar"], check=True)
            (root / "a.tar").unlink()

        def packed(root: Path, options: Options) -> None:
            ours(pool, src, root / "d", options, shards)
            shutil.rmtree(root / "d")

        sides: dict[str, Callable[[], object]] = {
            "GNU tar cf": lambda: tar(memory, False),
            "make_shards --no_verify": lambda: packed(memory, no_verify),
            "libjpeg-turbo decode": lambda: in_parallel(pool, decode, paths),
            "make_shards": lambda: packed(memory, verified),
            "Pillow bicubic": lambda: in_parallel(pool, bicubic_256, paths),
            "Pillow Lanczos": lambda: in_parallel(pool, lanczos_256, paths),
            "make_shards --short_side 256": lambda: packed(memory, small),
        }
        if arguments.disk:
            arguments.disk.mkdir(parents=True, exist_ok=True)
            sides["GNU tar cf, sync, on disk"] = lambda: tar(arguments.disk, True)
            sides["make_shards --no_verify, on disk"] = lambda: packed(arguments.disk, no_verify)
        for side in sides.values():
            side()  # imports, caches
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                begin, used = time.perf_counter(), cpu_seconds()
                side()
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(cpu_seconds() - used)
    pairs = [
        ("make_shards --no_verify", "GNU tar cf", 0.7),
        ("make_shards", "libjpeg-turbo decode", 0.8),
        ("make_shards --short_side 256", "Pillow bicubic", 2.0),
        ("make_shards --short_side 256", "Pillow Lanczos", 2.0),
        ("make_shards --no_verify, on disk", "GNU tar cf, sync, on disk", 0.7),
    ]
    return {
        "images": len(paths),
        "bytes": total,
        "images_per_second": {name: round(len(paths) / statistics.median(times), 1) for name, times in seconds.items()},
        "megabytes_per_second": {name: round(total / 1e6 / statistics.median(s), 1) for name, s in seconds.items()},
        "all_images_per_second": {name: [round(len(paths) / s, 1) for s in times] for name, times in seconds.items()},
        "ratios": {
            f"{a} / {b}": {"wall": ratio(seconds[a], seconds[b]), "cpu": ratio(cpu[a], cpu[b]), "bar": bar}
            for a, b, bar in pairs
            if a in seconds
        },
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast we are: the median over the rounds."""
    return round(statistics.median(y / x for x, y in zip(ours, theirs)), 3)


def cpu_seconds() -> float:
    """CPU seconds of this process and all below it, those that have ended too."""
    me = psutil.Process()
    times = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
    ended = me.cpu_times()
    return sum(t.user + t.system for t in times) + ended.children_user + ended.children_system


def bicubic_256(paths: list[str]) -> int:
    return shrink(Image.Resampling.BICUBIC, paths)


def lanczos_256(paths: list[str]) -> int:
    return shrink(Image.Resampling.LANCZOS, paths)


if __name__ == "__main__":
    workers.warm_up()
    main()
