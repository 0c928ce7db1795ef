"""A table of encoders and protocols: as Markdown, CSV, JSON, a picture, and for the report."""

import csv
import html
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.files import write_atomically, writing_beside


class Cell(NamedTuple):
    """Accuracies of one row under one heading, of a training or draw each; `spread`, if that is known already."""

    title: str
    values: list[float]
    spread: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else self.spread


class Row(NamedTuple):
    name: str
    start: str  # trained, untrained or pixels
    step: int
    cells: list[Cell]


def write_comparison(rows: Sequence[Row], output: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes compare.md, compare.csv, compare.json and compare.png. Returns an object for each row."""
    titles = list(dict.fromkeys(cell.title for row in rows for cell in row.cells))
    table = [
        {"name": row.name, "start": row.start, "step": row.step, "cells": {
            cell.title: {"mean": cell.mean, "spread": cell.deviation, "values": cell.values} for cell in row.cells
        }} for row in rows
    ]  # fmt: skip
    content = about | {"titles": titles, "rows": table}
    write_atomically(output / "compare.md", markdown(content).encode())
    write_atomically(output / "compare.csv", as_csv(content).encode())
    write_atomically(output / "compare.json", json.dumps(content, indent=1).encode())
    draw_comparison(content, output / "compare.png")
    return table


def figure(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    spread = cell["spread"]
    return f"{100 * cell['mean']:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def markdown(content: dict[str, Any]) -> str:
    titles = content["titles"]
    head = f"Top-1 in %, {content['train']:,} training and {content['val']:,} validation images. Spread: standard "
    head += f"deviation over {content['seeds']} seeds."
    lines = ["| start | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    lines += [
        f"| {r['name']} | " + " | ".join(figure(r["cells"].get(t)) for t in titles) + " |" for r in content["rows"]
    ]
    return "\n".join([head, "", *lines, ""])


def as_csv(content: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "start", "step", "column", "mean", "spread", "n"])
    for row in content["rows"]:
        for title, cell in row["cells"].items():
            about = [row["name"], row["start"], row["step"], title]
            writer.writerow([*about, cell["mean"], cell["spread"], len(cell["values"])])
    return text.getvalue()


def as_html(folder: Path) -> str:
    """The table of a folder that `write_comparison` filled; "" when there is none, or it cannot be read."""
    try:
        content = json.loads((folder / "compare.json").read_bytes())
        head = "".join(f"<th>{html.escape(str(title))}</th>" for title in content["titles"])
        lines = [
            f"<tr><th>{html.escape(str(r['name']))}</th>"
            + "".join(f"<td>{figure(r['cells'].get(title))}</td>" for title in content["titles"])
            for r in content["rows"]
        ]
        note = markdown(content).split("\n")[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    body = f"<thead><tr><th>start</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<p>{html.escape(note)}</p><div class="scroll"><table>{body}</table></div>'


def draw_comparison(content: dict[str, Any], path: Path) -> None:
    """A panel for each heading, a bar for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot, as in transfer/curves.py
    from matplotlib.figure import Figure

    titles, rows = content["titles"], content["rows"]
    columns = min(3, max(1, len(titles)))
    lines = max(1, -(-len(titles) // columns))
    page = Figure(figsize=(4.6 * columns, (0.9 + 0.42 * len(rows)) * lines), layout="constrained")
    FigureCanvasAgg(page)
    for i, title in enumerate(titles, start=1):
        axes = page.add_subplot(lines, columns, i)
        cells = [row["cells"].get(title) for row in rows]
        means = [100 * cell["mean"] if cell else 0.0 for cell in cells]
        spreads = [100 * (cell["spread"] or 0.0) if cell else 0.0 for cell in cells]
        colours = ["#2a6f97" if row["start"] == "trained" else "#a9b4bf" for row in rows]
        axes.barh(range(len(rows)), means, xerr=spreads, color=colours, ecolor="#1f2933", capsize=2)
        for at, (end, cell) in enumerate(zip(map(sum, zip(means, spreads)), cells)):
            axes.annotate(figure(cell), (end, at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        leftmost = (i - 1) % columns == 0
        axes.set_yticks(range(len(rows)), [str(row["name"])[-34:] if leftmost else "" for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45 * max([*means, 1.0]))
        axes.set_title(f"{title}, %", fontsize=10, loc="left")
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with writing_beside(path) as file:
        page.savefig(file, dpi=120, format="png")
