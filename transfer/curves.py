"""Loss, learning rate, kNN and speed of a run as one picture: `python -m transfer.curves runs/photos` writes
runs/photos/curves.png."""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.curves()  # before the imports that take seconds

import functools
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from pipeline import files
from pipeline.command import command
from trainer.mirror import bring

RISES = "rises at first, while real keys replace the queue's random ones"
PANELS = (  # field of metrics.jsonl, title; a panel without a value is left out
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("knn", "kNN accuracy"),
    ("top1", "top-1 accuracy"),
    ("rankme", "RankMe"),
    ("AP", "AP of boxes, %"),
    ("mask_AP", "AP of masks, %"),
    ("keypoint_AP", "AP of keypoints, %"),
    ("mIoU", "mIoU, %"),
    ("images_per_second", "images per second"),
)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The objects of RUN/metrics.jsonl in order of steps, one a step: where a run was killed and went on, the later
    line holds.

    A last line that a kill cut short is left out. Raises FileNotFoundError when the run logged nothing yet.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder that train.py wrote (--out)")
    steps: dict[int, dict[str, Any]] = {}
    for row in read_objects(path, field="step"):
        # kNN may be logged on a line of its own for the same step.
        step = int(row["step"])
        steps[step] = steps.get(step, {}) | row
    return [steps[step] for step in sorted(steps)]


def read_objects(path: Path, *, field: str = "") -> list[dict[str, Any]]:
    """The JSON objects of a file of one a line, each with a number as `field` if given; a last line that a kill cut
    short is left out. ValueError that names the file and the first strange line.
    """
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and (not field or is_number(row.get(field))):
            rows.append(row)
        elif number < len(lines):
            what = f"JSON object with a {field}" if field else "JSON object"
            raise ValueError(f"line {number} of {path} is no {what}: {line[:80].decode(errors='replace')!r}")
    return rows


def is_number(value: object) -> bool:
    """A finite number that a float can hold."""
    return isinstance(value, int | float) and abs(value) < 1e300


def series(rows: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one field; lines without it, and values that are not finite, are left out."""
    pairs = [(row["step"], row[field]) for row in rows if is_number(row.get(field))]
    return [int(step) for step, _ in pairs], [float(value) for _, value in pairs]


def draw(run: str | Path, output: str | Path | None = None) -> str | Path:
    """Draws the curves of one run; returns where, RUN/curves.png unless told another file or URL. Errors as
    `read_metrics`."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # no pyplot: it would pick a display and keep global state
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    panels = [(title, *series(rows, field)) for field, title in PANELS]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError(f"nothing to draw in {run}/metrics.jsonl yet: {len(rows)} lines without loss, lr or kNN")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, steps, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, i)
        few = len(steps) < 40
        axes.plot(steps, values, color="#2a6f97", linewidth=1.6, marker="o" if few else "", markersize=3.5)
        axes.set_title(f"{title}, last {values[-1]:.4g}", fontsize=10, loc="left")
        axes.set_xlabel(f"step; {RISES}" if title == "loss" else "step", fontsize=9)
        axes.set_xlim(0, rows[-1]["step"] * 1.02)  # the same for all panels, so that they can be read together
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if title in ("learning rate", "images per second"):
            axes.set_ylim(bottom=0)
    place = Path(run) / "curves.png" if output is None else output
    with files.writing(str(place)) as file:
        figure.savefig(file, dpi=120, format="png")
    return place


def main(args: Namespace) -> None:
    print(draw(bring(args.run), args.output or files.join(args.run, "curves.png")))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
