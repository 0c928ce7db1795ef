"""The paper's two studies and shuffle BN's, at a size that one machine can do, through train.py and transfer.knn.

    python benchmarks/ablation.py --data shards/train --val shards/val --out runs/ablation --seconds 90

1. dictionary: mechanism x dictionary size, Figure 3. End-to-end's dictionary is its batch, so its size is the batch
   size there, the learning rate in proportion and the steps fewer: all runs see equally many images.
2. momentum: m = 0, 0.9, 0.99, 0.999, 0.9999 at one dictionary size (section 4.1, the table on momentum).
3. shuffle: pretext accuracy and kNN with shuffle BN and without (appendix A.9).

Budget: --steps of a batch for each run, or --seconds from which the steps are reckoned by the speed of a short first
run. The command again after an interruption goes on with the run that was interrupted. Results: OUT/results.json and
OUT/ablation.png.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from pipeline.command import add_cache_flags, command  # noqa: E402
from transfer.curves import read_metrics, series  # noqa: E402 - as a script, its own folder is what is on the path

MOMENTA = (0.0, 0.9, 0.99, 0.999, 0.9999)
STUDIES = ("dictionary", "momentum", "shuffle")
COLOURS = {"end_to_end": "#d55e00", "memory_bank": "#009e73", "moco": "#0072b2"}


@dataclass(frozen=True)
class Plan:
    """One training: `name` is its folder; two studies may share it."""

    name: str
    studies: tuple[str, ...]
    steps: int
    flags: dict[str, Any] = field(hash=False)


def plan(args: Namespace, steps: int) -> list[Plan]:
    """The trainings that the studies need, each once."""
    images = steps * args.batch_size
    found: dict[str, Plan] = {}

    def add(study: str, *, mechanism: str = "moco", size: int, batch: int, m: float, shuffle: bool = True) -> None:
        name = f"{mechanism}_k{size}_b{batch}_m{m:g}" + ("" if shuffle else "_noshuffle")
        n = max(1, images // batch)
        flags = {
            "mechanism": mechanism,
            "queue_size": size,
            "batch_size": batch,
            "bn_groups": max(1, batch // args.bn_size),
            "moco_momentum": m,
            "shuffle_bn": shuffle,
            "lr": args.lr * batch / args.batch_size,
            "max_steps": n,
            # To 1 % of the learning rate at the end, however few steps there are.
            "schedule": "exponential",
            "decay": 0.01 ** (1 / 20),
            "decay_steps": max(1, n // 20),
            "epochs": 0,
        }
        before = found.get(name)
        studies = (study,) if before is None else (*before.studies, study)
        found[name] = Plan(name, studies, n, flags)

    usual: dict[str, Any] = {"size": args.size, "batch": args.batch_size, "m": args.momentum}
    if "dictionary" in args.studies:
        for size in args.sizes:
            for mechanism in ("moco", "memory_bank"):
                add("dictionary", mechanism=mechanism, **(usual | {"size": size}))
        for batch in args.end_to_end_sizes:
            add("dictionary", mechanism="end_to_end", **(usual | {"size": batch, "batch": batch}))
    if "momentum" in args.studies:
        for m in MOMENTA:
            add("momentum", **(usual | {"m": m}))
    if "shuffle" in args.studies:
        add("shuffle", **usual)
        add("shuffle", **usual, shuffle=False)
    return list(found.values())


def train_command(args: Namespace, one: Plan, folder: Path) -> list[str]:
    flags = {
        "data": args.data,
        "out": folder,
        "arch": args.arch,
        "small_stem": args.small_stem,
        "views": "cifar",
        "image_size": args.image_size,
        "crop_min": 0.2,
        "temperature": 0.1,
        "weight_decay": 5e-4,
        "precision": args.precision,
        "seed": args.seed,
        "log_every": max(1, one.steps // 60),
        "save_every": max(1, one.steps // 6),
        "keep_checkpoints": 1,
        "trackers": "[]",
    } | one.flags
    return [sys.executable, "train.py", *(f"--{name}={_flag(value)}" for name, value in flags.items()), *cache_of(args)]


def cache_of(args: Namespace) -> list[str]:
    return [f"--{name}={args[name]}" for name in ("cache_dir", "cache_gb") if args[name] is not None]


def _flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def call(command: list[str], log: Path) -> str:
    """Runs a command of ours in the repository, its error output to `log`; returns what it printed. ValueError with
    the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    with log.open("a") as file:
        done = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=file, text=True)
    if done.returncode:
        raise ValueError(
            f"exit code {done.returncode} of {' '.join(command[1:6])} ...; {log} ends with\n{log.read_text()[-1500:]}"
        )
    return done.stdout


def reckon_steps(args: Namespace, out: Path) -> int:
    """Steps of a run: as told, or as many as fit in --seconds. Written down, so that a second call agrees with the
    first."""
    if args.steps:
        return int(args.steps)
    note = out / "budget.json"
    if not note.is_file():
        short = plan(args, 40)[0]
        print(f"measuring the speed over {short.steps} steps", flush=True)
        call(train_command(args, short, out / "speed"), out / "speed.log")
        speeds = series(read_metrics(out / "speed"), "images_per_second")[1]
        speed = statistics.median(speeds[len(speeds) // 2 :])
        steps = max(20, round(args.seconds * speed / args.batch_size))
        note.write_text(json.dumps({"steps": steps, "images_per_second": round(speed), "seconds": args.seconds}))
    return int(json.loads(note.read_text())["steps"])


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gave the first time, from the file then written."""
    if not path.is_file():
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(make()))
        partial.replace(path)
    return dict(json.loads(path.read_text()))


def judge(args: Namespace, folder: Path, result: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "transfer.knn", f"--run={folder}", f"--train={args.data}", f"--val={args.val}"]
    return kept(
        result, lambda: json.loads(call([*command, *cache_of(args), *more], folder / "log.txt").splitlines()[-1])
    )


def run(args: Namespace, one: Plan, folder: Path) -> dict[str, Any]:
    """Trains (or goes on training) and judges one, unless that is done."""

    def train() -> dict[str, Any]:
        call(train_command(args, one, folder), folder / "log.txt")
        rows = read_metrics(folder)
        known = ("mechanism", "queue_size", "batch_size", "moco_momentum", "shuffle_bn")
        result: dict[str, Any] = {"name": one.name, "steps": one.steps} | {name: one.flags[name] for name in known}
        result["loss"] = series(rows, "loss")[1][-1]
        result["pretext_accuracy"] = list(zip(*series(rows, "accuracy")))
        result["knn"] = judge(args, folder, folder / "knn.json")["knn"]
        return result

    return kept(folder / "result.json", train) | {"studies": one.studies}


def draw(results: list[dict[str, Any]], path: Path, title: str, untrained: float | None = None) -> None:
    """Three panels: Figure 3, the momentum table as a line over m, and pretext accuracy with and without shuffle BN."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    studies = [s for s in STUDIES if any(s in r["studies"] for r in results)]
    figure = Figure(figsize=(5.2 * len(studies), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for i, study in enumerate(studies, start=1):
        axes = figure.add_subplot(1, len(studies), i)
        mine = [r for r in results if study in r["studies"]]
        if study == "dictionary":
            for mechanism, colour in COLOURS.items():
                points = sorted((r["queue_size"], 100 * r["knn"]) for r in mine if r["mechanism"] == mechanism)
                if points:
                    xs, ys = zip(*points)
                    axes.plot(xs, ys, marker="o", color=colour, label=mechanism.replace("_", "-"))
                    for x, y in points:
                        above = mechanism != "memory_bank"
                        axes.annotate(f"{y:.1f}", (x, y), (0, 6 if above else -13), textcoords="offset points", **SMALL)
            axes.set_xscale("log", base=2)
            axes.set_xlabel("dictionary size K (end-to-end: the batch)")
            axes.set_title("mechanism x dictionary size (Fig. 3)", fontsize=10, loc="left")
        elif study == "momentum":
            values = sorted((r["moco_momentum"], 100 * r["knn"]) for r in mine)
            axes.plot(range(len(values)), [y for _, y in values], marker="o", color=COLOURS["moco"], label="moco")
            for x, (_, y) in enumerate(values):
                axes.annotate(f"{y:.1f}", (x, y), (0, 6), textcoords="offset points", **SMALL)
            axes.set_xticks(range(len(values)), [f"{m:g}" for m, _ in values])
            axes.set_xlabel("momentum m")
            axes.set_title("momentum (section 4.1)", fontsize=10, loc="left")
        else:
            for r in mine:
                label = f"{'shuffle BN' if r['shuffle_bn'] else 'no shuffle BN'}, kNN {100 * r['knn']:.1f} %"
                steps, shares = zip(*r["pretext_accuracy"])
                axes.plot(steps, [100 * s for s in shares], "-" if r["shuffle_bn"] else "--", label=label)
            axes.set_xlabel("step")
            axes.set_title("shuffle BN (appendix A.9)", fontsize=10, loc="left")
        if untrained is not None and study != "shuffle":
            axes.axhline(100 * untrained, color="#7b8794", linestyle=":", label="untrained encoder")
        axes.set_ylabel("pretext accuracy (%)" if study == "shuffle" else "kNN accuracy (%)")
        axes.grid(alpha=0.25)
        axes.margins(y=0.15)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


SMALL: dict[str, Any] = {"fontsize": 8, "ha": "center"}


def table(results: list[dict[str, Any]], untrained: float) -> str:
    lines = [f"untrained encoder: kNN {untrained:.1%}"]
    for study in STUDIES:
        mine = [r for r in results if study in r["studies"]]
        for r in sorted(mine, key=lambda r: (r["mechanism"], r["queue_size"], r["moco_momentum"])):
            last = r["pretext_accuracy"][-1][1] if r["pretext_accuracy"] else float("nan")
            shuffle = "" if r["shuffle_bn"] else "  no shuffle BN"
            lines.append(
                f"{study:10s} {r['mechanism']:11s} K {r['queue_size']:6d}  batch {r['batch_size']:5d}  "
                f"m {r['moco_momentum']:<6g}  steps {r['steps']:6d}  kNN {r['knn']:6.1%}  loss {r['loss']:.3f}  "
                f"pretext accuracy {last:6.1%}{shuffle}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(prog="benchmarks/ablation.py", description="The paper's studies at a small size.")
    add = parser.add_argument
    add("--data", type=str, required=True, help="labelled source to train on, without its labels, and kNN's memory")
    add("--val", type=str, required=True, help="labelled source that kNN classifies")
    add("--out", type=Path, required=True, help="folder of all runs")
    add("--seconds", type=PositiveFloat, default=90.0, help="of training for each run; start and kNN come on top")
    add("--steps", type=PositiveInt | None, help="of --batch_size for each run, instead of --seconds")
    add("--studies", type=list[Literal["dictionary", "momentum", "shuffle"]], default=list(STUDIES))
    add("--sizes", type=list[PositiveInt], default=[128, 512, 2048], help="of the queue and of the bank's draw")
    add("--end_to_end_sizes", type=list[PositiveInt], default=[128, 256, 512], help="batches of end-to-end")
    add("--size", type=PositiveInt, default=2048, help="dictionary of the momentum and shuffle studies")
    add("--momentum", type=float, default=0.99, help="m of all studies but momentum's")
    add("--batch_size", type=PositiveInt, default=128)
    add("--bn_size", type=PositiveInt, default=32, help="images in a batch-norm group")
    add("--lr", type=PositiveFloat, default=0.06, help="at --batch_size")
    add("--arch", type=str, default="timm:test_resnet", help="test_resnet: 0.4M parameters, BN, made for tests")
    add("--small_stem", type=bool, default=False)
    add("--image_size", type=PositiveInt, default=32)
    add("--precision", type=Literal["fp32", "tf32", "bf16", "fp16"], default="fp32")
    add("--seed", type=int, default=0)
    add_cache_flags(parser)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    args.data, args.val = (str(Path(d).resolve()) if Path(d).exists() else d for d in (args.data, args.val))

    steps = reckon_steps(args, out)
    plans = plan(args, steps)
    results: list[dict[str, Any]] = []
    for i, one in enumerate(plans, start=1):
        results.append(run(args, one, out / one.name))
        print(f"[{i}/{len(plans)}] {one.name}: kNN {results[-1]['knn']:.1%}", flush=True)
        untrained = judge(args, out / one.name, out / "untrained.json", "--untrained")["knn"]
        images = steps * args.batch_size
        summary = {"arch": args.arch, "images": images, "untrained": untrained, "results": results}
        (out / "results.json").write_text(json.dumps(summary, indent=1))
        draw(results, out / "ablation.png", f"{args.arch}, {images:,} images a run, one seed", untrained)
    print(table(results, untrained))
    print(out / "ablation.png")


if __name__ == "__main__":
    command(main)
