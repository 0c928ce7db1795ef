"""Everything that only a GPU can show, in one command: a table and a JSON, OUTPUT/gpu_CARD_NAME.*, after every row.

    python benchmarks/gpu.py --images DIR                       # all of it; --parts, --only and --seconds bound it
    python benchmarks/gpu.py --images DIR --parts loader --only 'native (2|16) threads' --work WORK
    python benchmarks/gpu.py --images DIR --device cpu --arch resnet18 --image_size 64 --batch_sizes 32 \\
        --steps 6 --train_steps 60 --seconds 300               # a dry run

1. train: train.py itself, fed by constant tensors, by shards, and by torchvision + DataLoader, eager and compiled. The
   first two on the same number of cores, interleaved.
2. loader: pipeline.loader alone (v1, v2; photographs as they are and packed at short side 256; 2, 4, 16 CPU threads,
   which are also all the cores it may use; share of the hardware decoder; chroma upsampling; prefetch depths).
3. features: the evaluation's features and kNN answers on the CPU beside those on the GPU (with --run).
4. roofline: measured ceilings (bf16 matrix product, device copy) and what a step needs of both.

The rows that decide come first. Each is a process of its own (gpu_rows.py), so that neither caches nor allocators carry
over. MoCo's own share of a step is benchmarks/moco_step.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
PARTS = ("train", "loader", "features", "roofline")

Row = tuple[str, str, dict[str, Any], int | None]  # name, kind, options, cores


def make_shards(images: Path, work: Path, count: int) -> dict[str, str]:
    """Shards of `count` images (the folder's, as often as needed; each a class of its own), at native size and packed
    at short side 256. Those that `work` holds already stay."""
    farm = work / "images"
    made = {"native": str(work / "native"), "short_256": str(work / "short_256")}
    if not farm.is_dir():
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not files:
            sys.exit(f"error: no images in {images}")
        for i in range(count):
            link = farm / f"{i % len(files):04d}" / f"{i:06d}{files[i % len(files)].suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[i % len(files)].resolve())
    packing = []
    for name, options in {"native": [], "short_256": ["--short_side", "256"]}.items():
        if not (Path(made[name]) / "manifest.json").is_file():
            command = [sys.executable, "-m", "pipeline.make_shards", str(farm), made[name]]
            command += ["--samples_per_shard", "1000", *options]
            packing.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL))
    if max((process.wait() for process in packing), default=0):
        sys.exit(f"error: no shards of {images}")
    return made


def plan(o: argparse.Namespace, data: dict[str, str], images: Path) -> Iterator[Row]:
    """Every measurement, the ones that matter most first."""
    cores = len(os.sched_getaffinity(0))
    threads = [t for t in (2, 4, 16) if t <= cores] or [cores]
    few = threads[0]
    common = {"device": o.device, "image_size": o.image_size, "arch": o.arch, "rounds": o.rounds, "steps": o.steps}
    base = common | {
        "precision": "bf16" if o.device != "cpu" else "fp32",
        "data": data["native"],
        "images": str(images),
        "threads": few,
        "cudnn_benchmark": False,
    }

    def train(batch_size: int, source: str, kind: str = "eager", turn: int | None = None, **more: Any) -> Row:
        options = base | {"batch_size": batch_size, "source": source, "compile": kind == "compiled"}
        options |= {"train_steps": o.train_steps} | more
        name = f"train {source} {kind} batch {batch_size} {options['threads']} cores"
        return name + (f" #{turn}" if turn is not None else ""), "train", options, options["threads"]

    def interleaved(batch_size: int, kind: str = "eager", **more: Any) -> Iterator[Row]:
        for turn in range(o.turns):
            for source in ("constant", "shards"):
                yield train(batch_size, source, kind, turn, **more)

    # A loader's steps, of images that are as many whatever the batch of the training.
    loading = common | {"batch_size": o.batch_sizes[0], "prefetch": 2, "hw_decoder_load": 0.65, "views": "v2"}
    loading |= {"data": data["native"], "threads": few, "fancy_upsampling": True}

    def loader(name: str, **more: Any) -> Row:
        options = loading | more
        return f"loader {name}", "loader", options, options["threads"]

    first, *others = o.batch_sizes
    yield from interleaved(first)
    for count in dict.fromkeys((few, threads[-1])):
        yield loader(f"v2 native {count} threads", threads=count)
    yield loader(f"v2 short_256 {few} threads", data=data["short_256"])
    if o.device != "cpu":
        for load in (0.0, 1.0):
            yield loader(f"v2 native {few} threads hw_decoder_load {load}", hw_decoder_load=load)
    yield loader(f"v2 native {few} threads fancy upsampling off", fancy_upsampling=False)
    yield loader(f"v2 native {few} threads prefetch 4", prefetch=4)
    if o.run:
        run = {"run": str(o.run), "train": o.knn_train, "val": o.knn_val, "threads": cores}
        yield "features on the CPU and on the device", "features", common | run, None
    yield "roofline", "roofline", common, None
    slow = {"train_steps": o.train_steps // 6}
    yield train(first, "torchvision", **slow)
    if cores > few:
        yield train(first, "torchvision", threads=cores, **slow)
    yield train(first, "constant", "cudnn.benchmark", cudnn_benchmark=True)
    if o.device != "cpu":
        yield from interleaved(first, "compiled")
    for batch_size in others:
        yield from interleaved(batch_size)
    for count in threads[1:-1]:
        yield loader(f"v2 native {count} threads", threads=count)
    for count in threads[1:]:
        yield loader(f"v2 short_256 {count} threads", data=data["short_256"], threads=count)
    for name, folder in data.items():
        for count in threads:
            yield loader(f"v1 {name} {count} threads", views="v1", data=folder, threads=count)
    yield loader(f"v2 native {few} threads prefetch 1", prefetch=1)


def run_row(kind: str, options: dict[str, Any], cores: int | None, seconds: float) -> dict[str, Any]:
    pinned = sorted(os.sched_getaffinity(0))[:cores]
    command = [sys.executable, str(Path(__file__).with_name("gpu_rows.py")), kind, json.dumps(options)]
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=seconds,
            preexec_fn=lambda: os.sched_setaffinity(0, pinned),
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        print(f"  {kind} {options}: exit {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        return {"failed": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table: the rate first, where there is one, then the other figures."""
    if "failed" in found:
        return f"{name:55} failed: {found['failed'].strip()[-200:]}"
    figures = {k: v for k, v in found.items() if k not in ("images_per_second", "min", "max", "n", "busiest_threads")}
    words = [f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in figures.items()]
    if "n" in found:
        words.insert(0, f"({found['min']:,.0f} to {found['max']:,.0f}, n {found['n']})")
    if "images_per_second" in found:
        words.insert(0, f"{found['images_per_second']:,.0f} images/s")
    words += [f"[{thread} {share:.2f}]" for thread, share in list(found.get("busiest_threads", {}).items())[:3]]
    return f"{name:55} " + "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="photographs at their native size")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu for a dry run")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--steps", type=int, default=60, help="of a loader's warm-up and of each of its rounds")
    parser.add_argument("--train_steps", type=int, default=140, help="of a training, warm-up and rounds together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2, help="interleaved repetitions of constant against shards")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", type=re.compile, default="", help="only rows whose name this expression is found in")
    parser.add_argument("--count", type=int, default=4000, help="images in the shards")
    parser.add_argument("--work", type=Path, help="folder that keeps the shards for the next run")
    parser.add_argument("--prepare", action="store_true", help="make the shards in --work, and no more")
    parser.add_argument("--run", type=Path, help="folder of a run, for the features")
    parser.add_argument("--knn_train", help="labelled shards whose features vote")
    parser.add_argument("--knn_val", help="labelled shards to classify")
    parser.add_argument("--seconds", type=float, default=1e9, help="end in that time, whatever is measured by then")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the results")
    parser.add_argument("--name", help="of the results: gpu_CARD_NAME; the parts when left out")
    o = parser.parse_args()
    if not o.images.is_dir():
        sys.exit(f"error: --images {o.images} is not a folder")
    if o.run and not (o.knn_train and o.knn_val):
        sys.exit("error: --run needs --knn_train and --knn_val")
    if o.prepare and not o.work:
        sys.exit("error: --prepare needs --work")
    if o.prepare:
        made = make_shards(o.images, o.work, o.count)
        print(json.dumps(made | {"images": o.count}))
        return
    from benchmarks.hardware import card, hardware  # torch takes seconds

    began, lines = time.monotonic(), list[str]()
    results: dict[str, Any] = {"hardware": hardware(o.device), "command": " ".join(sys.argv)}
    o.output.mkdir(parents=True, exist_ok=True)
    name = o.name or ("all" if sorted(o.parts) == sorted(PARTS) else "_".join(o.parts))
    stem = o.output / f"gpu_{card(o.device)}_{name}"
    with ExitStack() as stack:
        work = o.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        data = make_shards(o.images, work, o.count)
        for name, kind, options, cores in plan(o, data, work / "images"):
            if kind not in o.parts or not re.search(o.only, name):
                continue
            left = o.seconds - (time.monotonic() - began)
            if left < 15:
                lines.append(f"{name:55} not begun: --seconds {o.seconds:.0f} had nearly passed")
            else:
                results[name] = run_row(kind, options, cores, min(900, left))
                lines.append(line(name, results[name]))
            print(lines[-1], flush=True)
            # Written after each: a machine that goes away takes nothing along.
            stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            header = f"{json.dumps(results['hardware'])}\n{results['command']}\n\n"
            stem.with_suffix(".txt").write_text(header + "\n".join(lines) + "\n")
    rows = [found for name, found in results.items() if name not in ("hardware", "command")]
    failed = sum("failed" in found for found in rows)
    print(json.dumps({"rows": len(rows) - failed, "failed": failed, "not_begun": len(lines) - len(rows)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
