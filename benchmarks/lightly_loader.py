"""lightly's own loader beside ours under the same MoCo, examples/lightly_moco.py: loading alone, the whole loop, kNN.

    python benchmarks/lightly_loader.py --images DIR [--output benchmarks/results/lightly_loader]

1. Loading: two 224 x 224 views of the photographs in DIR, MoCo v2's, by two worker processes and by two threads, from
   files and from shards of the same files (both in the page cache). Rounds interleaved, medians.
2. Loop: training steps on the same batches with a small and with a usual encoder; the encoder takes most of the time of
   the latter on a CPU.
3. kNN: `--epochs` epochs on the pages of benchmarks/letters.py, `--seeds` times with each loader, the same
   augmentations; the means must lie no further apart than the seeds of one loader do.
"""

import argparse
import itertools
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

import lightly
import torch
from nvidia import dali

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from benchmarks.data_path import measure  # noqa: E402 - as a script, its own folder is what is on the path
from benchmarks.hardware import processor  # noqa: E402
from examples.lightly_moco import MoCo, Pairs, lightly_batches, our_batches, train  # noqa: E402
from pipeline.pixels.views import CIFAR  # noqa: E402
from pipeline.sources.opening import open_source  # noqa: E402
from transfer.knn import evaluate  # noqa: E402
from transfer.load import CentralCrops  # noqa: E402

ENDLESS = 1_000_000  # epochs
LETTERS_SIDE, LETTERS_CROP, LETTERS_BATCH = 48, 0.3, 64  # as recipes/letters.yaml
PARTS = ("loading", "loop", "letters")
LOADERS = ("lightly", "ours")
LOOP_STEPS = {"test_resnet": 2, "resnet18": 1}  # of a round, by encoder


def run(*command: Any) -> None:
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, env=environment, check=True)


def photograph_streams(images: Path, shards: Path, batch_size: int) -> dict[str, Pairs]:
    how: dict[str, Any] = {"epochs": ENDLESS, "batch_size": batch_size, "workers": 2, "seed": 0}
    streams = {
        "lightly": lightly_batches(str(images), **how, views={"input_size": 224}),
        "ours": our_batches(str(shards), **how, views={"views": "v2", "image_size": 224}),
    }
    for batches in streams.values():  # processes are forked before DALI starts its threads
        next(batches)
    return streams


def loading(streams: dict[str, Pairs], rounds: int, seconds: float) -> dict[str, Any]:
    def counted(batches: Pairs) -> Iterator[int]:
        return (len(query) for query, _ in batches)

    rates = measure({name: counted(batches) for name, batches in streams.items()}, rounds, seconds, workers=2)
    found: dict[str, Any] = {}
    for name, values in rates.items():
        per_second, used = zip(*values)
        found[name] = {
            "images_per_second": round(statistics.median(per_second), 1),
            "range": [round(min(per_second), 1), round(max(per_second), 1)],
            "cpu_ms_per_image": round(statistics.median(used), 2),
        }
    ours, theirs = found["ours"], found["lightly"]
    found["times_as_fast"] = round(ours["images_per_second"] / theirs["images_per_second"], 2)
    found["times_less_cpu"] = round(theirs["cpu_ms_per_image"] / ours["cpu_ms_per_image"], 2)
    return found


def whole_loop(streams: dict[str, Pairs], rounds: int, batch_size: int) -> dict[str, Any]:
    """Images per second of training steps, by encoder and loader."""
    found: dict[str, Any] = {}
    for arch, steps in LOOP_STEPS.items():
        rates: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(rounds):
            for name, batches in streams.items():
                for _ in range(4):  # made while the others ran
                    next(batches)
                began = time.perf_counter()
                train(itertools.islice(batches, steps), arch, lr=0.03)
                rates[name].append(steps * batch_size / (time.perf_counter() - began))
                print(f"{arch}  {name:8s} {rates[name][-1]:7.1f} images/s", flush=True)
        found[arch] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return found


def one_training(loader: str, folder: Path, epochs: int, seed: int) -> dict[str, float]:
    """Trains on the letters in `folder` with one of the loaders, or not at all, and judges: kNN, and seconds."""
    train_source, val_source = (open_source(str(folder / "pages" / split)) for split in ("train", "val"))
    how: dict[str, Any] = {"epochs": epochs, "batch_size": LETTERS_BATCH, "workers": 2, "seed": seed}
    theirs: dict[str, Any] = {"input_size": LETTERS_SIDE, "min_scale": LETTERS_CROP, "gaussian_blur": 0.0}
    theirs["normalize"] = dict(zip(("mean", "std"), map(list, CIFAR)))
    ours = {"views": "cifar", "image_size": LETTERS_SIDE, "crop_min": LETTERS_CROP}
    torch.manual_seed(seed)
    began = time.perf_counter()
    if loader == "lightly":
        batches = lightly_batches(str(folder / "letters" / "train"), **how, views=theirs)
    else:
        batches = our_batches(str(folder / "pages" / "train"), **how, views=ours)
    model = MoCo("test_resnet") if loader == "untrained" else train(batches, "test_resnet", lr=0.06, queue=256)[0]
    seconds = time.perf_counter() - began
    crops = CentralCrops(LETTERS_SIDE, CIFAR, num_threads=2)
    knn = evaluate(model.backbone.eval(), train_source, val_source, crops)["knn"]
    return {"knn": round(float(knn), 4), "seconds": round(seconds, 1)}


def letters_knn(folder: Path, epochs: int, seeds: int) -> dict[str, Any]:
    """Each training in a process of its own: lightly's workers are forked, which a process must not do whose threads
    are at work already."""
    found: dict[str, list[dict[str, float]]] = {"lightly": [], "ours": [], "untrained": []}
    for seed in range(seeds):
        for name, values in found.items():
            command = [sys.executable, __file__, "--one", name, str(folder), str(epochs), str(seed)]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            values.append(json.loads(lines[-1]))
            print(f"seed {seed}  {name:9s} kNN {values[-1]['knn']:.1%}  {values[-1]['seconds']:.0f} s", flush=True)
    accuracy = {name: [value["knn"] for value in values] for name, values in found.items()}
    means = {name: statistics.mean(values) for name, values in accuracy.items()}
    spread = max(max(accuracy[name]) - min(accuracy[name]) for name in LOADERS)
    apart = abs(means["ours"] - means["lightly"])
    samples = {split: open_source(str(folder / "pages" / split), progress=False).samples for split in ("train", "val")}
    return {
        "knn": accuracy, "mean": {n: round(m, 4) for n, m in means.items()},
        "training_seconds": {name: [value["seconds"] for value in found[name]] for name in LOADERS},
        "means_apart": round(apart, 4), "spread_of_seeds": round(spread, 4), "within": apart <= spread,
        "epochs": epochs, "seeds": seeds, **samples,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = ["lightly's MoCo (examples/lightly_moco.py), fed by its own loader and by ours"]
    lines += [line for part in PARTS if part in result for line in ("", *shown(part, result[part]))]
    return "\n".join(lines)


def shown(part: str, found: dict[str, Any]) -> list[str]:
    """The lines of one part."""
    about = found["about"]
    on = (
        f"({about['cpu']}, {about['cores']} cores, load {about['load_before']} before and {about['load_after']} after; "
        f"Python {about['python']}, torch {about['torch']}, lightly {about['lightly']}, DALI {about['dali']}, "
        f"{about['date']})"
    )
    photographs = f"{about['photographs']} photographs, batch {about['batch_size']}"
    if part == "loading":
        lines = [
            f"loading alone: two 224 x 224 views, {photographs}, 2 workers or threads, {about['rounds']} interleaved "
            f"rounds of {about['seconds']:g} s",
            on,
            f"{'':10s} {'images/s':>9s} {'range':>13s} {'CPU ms/image':>13s}",
        ]
        for name in LOADERS:
            low, high = found[name]["range"]
            rate, used = found[name]["images_per_second"], found[name]["cpu_ms_per_image"]
            lines.append(f"{name:10s} {rate:9.0f} {f'{low:.0f}-{high:.0f}':>13s} {used:13.2f}")
        times = f"{found['times_as_fast']} times as fast, {found['times_less_cpu']} times less processor time an image"
        return [*lines, f"ours: {times}"]
    if part == "loop":
        lines = [f"whole loop on {photographs}, one thread for the encoder, {about['rounds']} interleaved rounds", on]
        lines.append(f"{'images/s':12s} {'lightly':>9s} {'ours':>9s}")
        return lines + [f"{arch:12s} {found[arch]['lightly']:9.1f} {found[arch]['ours']:9.1f}" for arch in LOOP_STEPS]
    lines = [
        f"kNN on {found['val']} pages of letters after {found['epochs']} epochs of {found['train']}, {found['seeds']} "
        "seeds, test_resnet",
        on,
        f"{'':10s} {'mean':>7s}  {'each seed':28s} seconds of training",
    ]
    for name, values in found["knn"].items():
        each = "  ".join(f"{value:.1%}" for value in values)
        spent = "  ".join(f"{s:.0f}" for s in found["training_seconds"].get(name, []))
        lines.append(f"{name:10s} {found['mean'][name]:7.1%}  {each:28s} {spent}".rstrip())
    verdict = "within" if found["within"] else "NOT within"
    apart, spread = f"{found['means_apart']:.1%}", f"{found['spread_of_seeds']:.1%}"
    return [*lines, f"the means are {apart} apart, {verdict} the seeds' spread of {spread}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="those to measure now")
    parser.add_argument("--batch_size", type=int, default=64, help="photographs in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="of loading alone, and of the whole loop")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed per loader and round, at least")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the letters")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each loader")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json; parts that are there stay")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the other core loads
    written = args.output.with_suffix(".json") if args.output else None
    result: dict[str, Any] = json.loads(written.read_text()) if written and written.exists() else {}
    with tempfile.TemporaryDirectory(prefix="lightly_loader-") as name:
        folder = Path(name)
        run("pipeline/make_shards.py", args.images, folder / "photos", "--labels", "none")
        photographs = open_source(str(folder / "photos"), progress=False).samples
        if "letters" in args.parts:
            run("benchmarks/letters.py", folder / "letters")
            for split in ("train", "val"):
                run("pipeline/make_shards.py", folder / "letters" / split, folder / "pages" / split)
        for part in args.parts:
            before = round(os.getloadavg()[0], 1)
            if part == "letters":
                found = letters_knn(folder, args.epochs, args.seeds)
            else:
                streams = photograph_streams(args.images, folder / "photos", args.batch_size)
                if part == "loading":
                    found = loading(streams, args.rounds, args.seconds)
                else:
                    found = whole_loop(streams, args.rounds, args.batch_size)
                for batches in streams.values():
                    batches.close()  # type: ignore[attr-defined]
            found["about"] = {
                "cpu": processor(), "cores": os.cpu_count(), "load_before": before,
                "load_after": round(os.getloadavg()[0], 1), "python": platform.python_version(),
                "torch": torch.__version__, "lightly": lightly.__version__, "dali": dali.__version__,
                "date": time.strftime("%Y-%m-%d"), "photographs": photographs, "batch_size": args.batch_size,
                "rounds": args.rounds, "seconds": args.seconds,
            }  # fmt: skip
            result[part] = found
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.with_suffix(".txt").write_text(table(result) + "\n")
                args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:  # a training of `letters_knn`
        torch.set_num_threads(1)
        print(json.dumps(one_training(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
