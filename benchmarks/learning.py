"""Does train.py learn as a plain loop does? CIFAR-10, several seeds a side, loss and kNN with their spread.

    python benchmarks/learning.py --cifar DIR --work WORK [--output benchmarks/results/learning]
    python benchmarks/learning.py --cifar DIR --work WORK --images 20000 --epochs 20 --val_images 10000

The first takes half an hour of one quiet core, the second some four hours. Sides, all with one recipe and one kNN:

- ours: train.py, with recipes/cifar10_r18.yaml and a small encoder.
- plain: benchmarks/plain_moco.py, torchvision's transforms on PIL images, DataLoader, thirty lines of MoCo.
- plain on ours: the same loop on the batches of our loader: the loops alone differ from ours.
- nudged: the loop on the batches of our loader, all with seed 0 and the same first weights but for a millionth: what is
  left of a spread comes from rounding.

A run that is finished is kept; a run that was stopped is continued (ours) or begun again. Judged are the mean loss of
the last epoch, the mean loss of all epochs, and kNN at the end: the difference of the means with its 95 % interval
(Welch), and a permutation test, exact, of the figure and of the whole curve. `--views_alone 4` compares the views
without a training. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.hardware import hardware, processor  # noqa: E402 - as a script, its own folder is what is on the path
from benchmarks.seeds import Values, by_chance, paired, permutation_p, welch  # noqa: E402
from pipeline.files import write_atomically  # noqa: E402
from transfer.curves import read_metrics, series  # noqa: E402

SIDES = {"ours": "#0072b2", "plain": "#d55e00", "plain on ours": "#009e73", "nudged": "#7b8794"}
RECIPE = {"arch": "test_resnet", "batch_size": 128, "bn_groups": 4, "queue_size": 2048, "lr": 0.06}
EARLIER_SEEDS, EARLIER_APART = 3, 0.08  # so many seeds a side had shown ours so much lower in loss
Run = dict[str, Any]

# figure -> its name, the curve that it is of, and its value from that curve
FIGURES: dict[str, tuple[str, str, Callable[[Values], Values]]] = {
    "last_loss": ("loss, last epoch", "loss", lambda curves: curves[:, -1]),
    "mean_loss": ("loss, mean of all epochs", "loss", lambda curves: curves.mean(axis=1)),
    "knn": ("kNN at the end, %", "knn", lambda curves: curves[:, -1]),
}


def run(*command: Any, log: Path) -> None:
    """A command of ours, one thread; what it says goes to `log`. ValueError with the log's end when it fails."""
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        line = [sys.executable, *map(str, command)]
        done = subprocess.run(line, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode} of {command[0]}; {log} ends with\n{log.read_text()[-1500:]}")


def pick(folder: Path, chosen: Path, images: int) -> None:
    """Links to `images` of the pictures in class folders, equally many of each class and from all over it."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for one in classes:
        names = sorted(one.iterdir())
        share = images // len(classes)
        if not 0 < share <= len(names):
            raise ValueError(f"{images} images are {share} of each class, and {one} has {len(names)}: change --images")
        (chosen / one.name).mkdir(parents=True)
        for i in range(share):
            name = names[i * len(names) // share]
            (chosen / one.name / name.name).symlink_to(name.resolve())


def prepare(cifar: Path, work: Path, images: int, val_images: int) -> None:
    """WORK/images/{train,test}/CLASS and WORK/shards/{train,test}, once."""
    for part, count in (("train", images), ("test", val_images)):
        shards = work / "shards" / part
        if (shards / "manifest.json").is_file():
            continue
        folder = cifar / part
        if not folder.is_dir():
            folder = work / "cifar" / part
            if not folder.is_dir():
                with tarfile.open(cifar / f"cifar10-{part}.tar") as tar:
                    tar.extractall(work / "cifar.part", filter="data")
                folder.parent.mkdir(exist_ok=True)
                (work / "cifar.part" / part).rename(folder)
        chosen = work / "images" / part
        shutil.rmtree(chosen, ignore_errors=True)
        pick(folder, chosen, count)
        run("pipeline/make_shards.py", chosen, shards, "--workers", 1, log=work / "logs" / "shards.log")


def command(side: str, seed: int, work: Path, folder: Path, args: argparse.Namespace) -> list[Any]:
    train, test = (work / "shards" / part for part in ("train", "test"))
    per_epoch = args.images // args.batch_size
    same: dict[str, Any] = {name: args.__dict__[name] for name in (*RECIPE, "epochs", "knn_every")}
    same |= {"seed": 0 if side == "nudged" else seed, "out": folder}
    if side == "ours":
        flags = {
            "config": "recipes/cifar10_r18.yaml", "data": train, **same, "arch": f"timm:{args.arch}",
            "small_stem": "false", "precision": "fp32", "num_threads": 1, "trackers": "[]", "log_every": per_epoch,
            "knn_data": test, "knn_features": "backbone", "save_every": 10 * per_epoch, "keep_checkpoints": 1,
            "hang_seconds": 0,
        }  # fmt: skip
        return ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    flags = {"images": work / "images" / "train", "bank": train, "val": test, **same}
    flags |= {"batches": "plain" if side == "plain" else "ours", "nudge": seed + 1 if side == "nudged" else 0}
    return ["benchmarks/plain_moco.py", *(f"--{name}={value}" for name, value in flags.items())]


def one(side: str, seed: int, args: argparse.Namespace) -> Run:
    """Trains and judges, unless that is done: the loss of each epoch, kNN by epoch, processor seconds."""
    folder = args.work / "runs" / f"{side.replace(' ', '_')}-{seed}"
    result = folder / "result.json"
    if not result.is_file():
        continued = (folder / "checkpoints").exists()  # then only a part of it is timed here
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*command(side, seed, args.work, folder, args), log=args.work / "logs" / f"{folder.name}.log")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows, per_epoch = read_metrics(folder), args.images // args.batch_size
        steps, knn = series(rows, "knn")
        used = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
        found = {
            "side": side, "seed": seed, "loss": series(rows, "loss")[1],
            "knn": {str(step // per_epoch): value for step, value in zip(steps, knn)},
            "cpu_seconds": None if continued else used,
            "seconds": round(time.monotonic() - began, 1), "load": round(os.getloadavg()[1], 1),
        }  # fmt: skip
        write_atomically(result, json.dumps(found).encode())
    return dict(json.loads(result.read_text()))


def trainings(args: argparse.Namespace) -> list[Run]:
    """All runs, the sides of a seed one after the other and in turn first, so that a stop leaves pairs."""
    done = []
    for seed in range(args.seeds):
        for side in args.sides if seed % 2 == 0 else args.sides[::-1]:
            done.append(one(side, seed, args))
            print(json.dumps(done[-1]), flush=True)
    return done


def views_alone(work: Path, batch_size: int, epochs: int) -> dict[str, Any]:
    """The views of both without any training: one finished encoder of ours, frozen, over `epochs` passes of each side.
    A chance of training that makes two runs differ is not in it, so it sees smaller differences of the views.

    In a batch: the InfoNCE loss of the queries among the batch's keys, the cosine of a pair, mean and standard
    deviation of the pixels (normalised), and the mean squared difference of the two views of an image.
    """
    import torch
    import torch.nn.functional as F

    from benchmarks.plain_moco import our_batches, plain_batches
    from transfer.load import load_encoder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = load_encoder(work / "runs" / "ours-0").encoder.eval()
    feeds = {
        "ours": our_batches(str(work / "shards" / "train"), batch_size, seed=0),
        "plain": plain_batches(work / "images" / "train", batch_size, 0),
    }
    rows: dict[str, list[list[float]]] = {side: [] for side in feeds}
    for epoch in range(epochs):
        for side, batches in feeds.items():
            for x, y in batches(epoch):
                with torch.no_grad():
                    q, k = (F.normalize(encoder(view), dim=1) for view in (x, y))
                    loss = F.cross_entropy(q @ k.T / 0.1, torch.arange(len(q)))
                pixels = torch.cat([x, y])
                figures = (loss, (q * k).sum(dim=1).mean(), pixels.mean(), pixels.std(), F.mse_loss(x, y))
                rows[side].append([float(figure) for figure in figures])
    ours, plain = (np.array(rows[side]) for side in feeds)
    names = ("loss", "cosine of a pair", "mean of pixels", "SD of pixels", "squared difference of two views")
    return {"batches": len(ours)} | {
        name: {"ours": ours[:, i].mean(), "plain": plain[:, i].mean()} | welch(ours[:, i], plain[:, i])
        for i, name in enumerate(names)
    }


def curves_of(runs: list[Run], side: str, curve: str) -> Values:
    """[runs, points]: the loss of each epoch, or kNN in per cent at each measurement."""
    mine = sorted((one for one in runs if one["side"] == side), key=lambda one: int(one["seed"]))
    rows = [one["loss"] if curve == "loss" else [100 * value for value in one["knn"].values()] for one in mine]
    return np.array(rows, np.float64)


def compare(runs: list[Run], a: str, b: str) -> dict[str, Any]:
    """a - b for each figure, with what `seeds` says of it."""
    found: dict[str, Any] = {"sides": [a, b]}
    seeds = [sorted(int(one["seed"]) for one in runs if one["side"] == side) for side in (a, b)]  # as in curves_of
    for figure, (_, curve, value) in FIGURES.items():
        sides = [curves_of(runs, side, curve) for side in (a, b)]
        x, y = (value(curves) for curves in sides)
        p = {"permutation_p": permutation_p(x[:, None], y[:, None]), "curve_p": permutation_p(*sides)}
        found[figure] = welch(x, y) | p
        found[figure]["paired"] = paired(x[np.isin(seeds[0], seeds[1])], y[np.isin(seeds[1], seeds[0])])
        if curve == "loss":
            found[figure] |= {"earlier_by_chance": by_chance(x, y, runs=EARLIER_SEEDS, apart=EARLIER_APART)}
    return found


def summary(runs: list[Run]) -> dict[str, Any]:
    """Means and spreads of each side that has two runs or more, and the comparisons of their means."""
    there = [side for side in SIDES if sum(one["side"] == side for one in runs) > 1]
    sides: dict[str, Any] = {}
    for side in there:
        mine = [one for one in runs if one["side"] == side]
        sides[side] = {
            "runs": len(mine),
            "cpu_seconds": [one["cpu_seconds"] for one in mine if one["cpu_seconds"] is not None],
        }
        for figure, (_, curve, value) in FIGURES.items():
            x = value(curves_of(runs, side, curve))
            sides[side][figure] = {"mean": x.mean(), "sd": x.std(ddof=1), "min": x.min(), "max": x.max()}
    others = [side for side in there if side not in ("ours", "nudged")]
    pairs = [("ours", other) for other in others] + ([("plain on ours", "plain")] if len(others) == 2 else [])
    return {"sides": sides, "comparisons": [compare(runs, a, b) for a, b in pairs if "ours" in there]}


def table(result: dict[str, Any]) -> str:
    about = result["about"]
    lines = [about["command"], about["where"], about["what"], ""]
    lines.append(
        f"{'mean, SD over seeds, range':27s} {'runs':>4s}" + "".join(f"{n:>32s}" for n, *_ in FIGURES.values())
    )
    for side, found in result["sides"].items():
        cells = [f"{f['mean']:.3f} SD {f['sd']:.3f} [{f['min']:.3f}, {f['max']:.3f}]" for f in map(found.get, FIGURES)]
        lines.append(f"{side:27s} {found['runs']:4d}" + "".join(f"{cell:>34s}" for cell in cells))
    for pair in result["comparisons"]:
        lines += ["", f"{pair['sides'][0]} less {pair['sides'][1]}"]
        for figure, (name, *_) in FIGURES.items():
            f = pair[figure]
            lines.append(
                f"  {name:25s} {f['difference']:+.3f} +- {f['half_width']:.3f} (95 %)  p {f['p']:.2f} Welch, "
                f"{f['permutation_p']:.2f} permuted, {f['curve_p']:.2f} whole curve  a true {f['detectable']:.3f} is "
                "found 8 times in 10"
            )
            two = f["paired"]
            lines.append(
                f"{'':28s}by pairs of one seed, which begin with the same weights: {two['difference']:+.3f} +- "
                f"{two['half_width']:.3f}  p {two['p']:.2f}, {two['flips_p']:.2f} by swaps  n {two['pairs']}"
            )
            if "earlier_by_chance" in f:
                often = f"{f['earlier_by_chance']:.0%}"
                lines.append(f"{'':28s}by this spread, means of 3 seeds lie {EARLIER_APART} apart by chance: {often}")
    if "views" in result:
        lines += ["", f"the views alone, through one frozen encoder, {result['views']['batches']} batches a side"]
        for name, f in result["views"].items():
            if name != "batches":
                apart = f"{f['difference']:+.4f} +- {f['half_width']:.4f} (95 %)  p {f['p']:.2f}"
                lines.append(f"  {name:33s} ours {f['ours']:.4f}  plain {f['plain']:.4f}  {apart}")
    spent = {side: np.median(found["cpu_seconds"]) for side, found in result["sides"].items()}
    lines += ["", "CPU seconds a run, median: " + ", ".join(f"{side} {value:.0f}" for side, value in spent.items())]
    return "\n".join(lines)


def draw(runs: list[Run], path: Path, title: str) -> None:
    """Loss and kNN over epochs: a thin line a seed, the mean thick in a band of one standard deviation; and the
    difference to ours with its 95 % interval at each epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    loss, knn, apart = figure.subplots(1, 3)
    there = [side for side in SIDES if sum(one["side"] == side for one in runs) > 1]
    measured = [int(epoch) for epoch in runs[0]["knn"]]
    for i, side in enumerate(there):
        for axes, curve in ((loss, "loss"), (knn, "knn")):
            values = curves_of(runs, side, curve)
            x = np.arange(1, values.shape[1] + 1) if curve == "loss" else np.array(measured)
            mean, sd = values.mean(axis=0), values.std(axis=0, ddof=1)
            axes.plot(x, values.T, color=SIDES[side], linewidth=0.6, alpha=0.5)
            axes.plot(x, mean, color=SIDES[side], linewidth=2, label=f"{side} (n {len(values)})", marker=".")
            axes.fill_between(x, mean - sd, mean + sd, color=SIDES[side], alpha=0.15, linewidth=0)
        if side not in ("ours", "nudged") and "ours" in there:
            ours, theirs = curves_of(runs, "ours", "loss"), curves_of(runs, side, "loss")
            found = [welch(ours[:, e], theirs[:, e]) for e in range(ours.shape[1])]
            apart.errorbar(
                np.arange(1, len(found) + 1) + 0.1 * i, [f["difference"] for f in found],
                [f["half_width"] for f in found], color=SIDES[side], capsize=3, marker="o", label=f"ours less {side}",
            )  # fmt: skip
    apart.axhline(0, color="black", linewidth=0.8)
    for axes, name in ((loss, "loss, mean of the epoch"), (knn, "kNN accuracy, %"), (apart, "difference of mean loss")):
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--cifar", type=Path, required=True, help="has train/CLASS/*.png and test/, or cifar10-train.tar, -test.tar")
    add("--work", type=Path, required=True, help="folder of images, shards and runs; the same again continues")
    add("--images", type=int, default=5000, help="to train on, equally many of each class")
    add("--val_images", type=int, default=5000, help="test images that kNN classifies")
    add("--epochs", type=int, default=8, help="passes over the images")
    add("--seeds", type=int, default=5, help="trainings a side")
    add("--sides", nargs="+", choices=SIDES, default=["ours", "plain"], help="which to run now; all that ran are shown")
    add("--knn_every", type=int, default=4, help="epochs between two measurements of kNN")
    for name, value in RECIPE.items():
        add(f"--{name}", type=type(value), default=value, help="of the recipe, both sides")
    add("--views_alone", type=int, default=0, help="also passes of both sides' views through a frozen encoder")
    add("--output", type=Path, help="writes OUTPUT.txt, OUTPUT.json and OUTPUT.png")
    args = parser.parse_args()
    places = {str(args.cifar): "CIFAR", str(args.work): "WORK"}  # of this machine: no business of a results file
    shown = ["python", "benchmarks/learning.py", *(places.get(word, word) for word in sys.argv[1:])]
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)

    names = ("images", "val_images", "epochs", "knn_every", *RECIPE)
    settings = {name: args.__dict__[name] for name in names}
    note = args.work / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{note} is of other settings, {note.read_text()}: give another --work")
    write_atomically(note, json.dumps(settings).encode())
    prepare(args.cifar.resolve(), args.work, args.images, args.val_images)
    trainings(args)
    seen = args.work / "views.json"
    if args.views_alone and not seen.is_file():
        write_atomically(seen, json.dumps(views_alone(args.work, args.batch_size, args.views_alone)).encode())

    runs = [json.loads(path.read_text()) for path in sorted((args.work / "runs").glob("*/result.json"))]
    facts = hardware("cpu")
    loads = [one["load"] for one in runs]
    where = (
        f"{time.strftime('%Y-%m-%d')}, {facts['cpu_cores']} cores of an {processor()}, one thread a run, load "
        f"{min(loads):g} to {max(loads):g}; Python {facts['python']}, torch {facts['torch']}, torchvision "
        f"{facts['torchvision']}, Pillow {facts['pillow']}, timm {facts['timm']}"
    )
    what = (
        f"CIFAR-10, {args.images:,} images, {args.epochs} epochs of {args.images // args.batch_size} steps, "
        f"{args.arch}, batch {args.batch_size}, K {args.queue_size}, fp32; kNN on {args.val_images:,} test images"
    )
    about = {"command": " ".join(shown), "where": where, "what": what, "settings": settings, "hardware": facts}
    result: dict[str, Any] = {"about": about, **summary(runs)}
    result |= {"views": json.loads(seen.read_text())} if seen.is_file() else {}
    result["runs"] = runs
    print(table(result))
    if args.output:
        args.output.with_suffix(".txt").write_text(table(result) + "\n")
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        draw(runs, args.output.with_suffix(".png"), what)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
