"""The rows of transfer.probe as one picture: kNN over its neighbours, few-label accuracy over the labels of a class."""

from pathlib import Path
from typing import Any

from pipeline.files import writing_beside
from transfer.chart import COLOURS


def draw_probe(rows: list[dict[str, Any]], output: Path, *, title: str) -> None:
    """Writes a PNG; a panel without rows is left out. The ranks stand in the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    knn = [each for each in rows if each["protocol"] == "kNN"]
    few = [each for each in rows if each.get("labels_of_class")]
    panels = [panel for panel in (knn, few) if panel]
    figure = Figure(figsize=(5.6 * max(1, len(panels)), 4.0 if panels else 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    ranks = ", ".join(f"{r['protocol']} {r['setting']} {r['mean']:.1f}" for r in rows if r["metric"] == "rank")
    figure.suptitle(f"{title}\n{ranks}", fontsize=10)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        if panel is knn:
            for colour, temperature in zip(COLOURS * len(knn), sorted({each["temperature"] for each in knn})):
                line = [(r["k"], 100 * r["mean"]) for r in knn if r["temperature"] == temperature]
                axes.plot(*zip(*line), color=colour, marker="o", markersize=3.5, label=f"temperature {temperature:g}")
            axes.set_xlabel("neighbours", fontsize=9)
            axes.set_title("kNN, top-1 in %", fontsize=10, loc="left")
            axes.legend(fontsize=8, frameon=False)
        else:
            few = sorted(few, key=lambda each: each["labels_of_class"])
            x, y = [each["labels_of_class"] for each in few], [100 * each["mean"] for each in few]
            spread = [100 * (each["spread"] or 0) for each in few]
            axes.errorbar(x, y, yerr=spread, color=COLOURS[0], marker="o", markersize=3.5, capsize=3)
            axes.set_xlabel("labelled images of each class", fontsize=9)
            axes.set_title(f"{few[0]['protocol']}, {few[0]['metric']} in %, spread over draws", fontsize=10, loc="left")
        axes.set_xscale("log")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with writing_beside(output) as file:
        figure.savefig(file, dpi=120, format="png")
