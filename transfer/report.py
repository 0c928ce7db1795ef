"""One HTML page about one run or several side by side, with everything in it: it opens without a network, in years,
from a mail.

    python -m transfer.report runs/photos [runs/other ...] --output report.html

Every judgement in the runs' ledgers, curves as SVG, the recipe, what the encoder saw, what it holds alike, maps of
folders of features, and which images were left out. The page has no script.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.report()  # before the imports that take seconds

import base64
import collections
import functools
import html
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from jsonargparse import Namespace

import recipe as recipes
from pipeline import files
from pipeline.command import CacheArguments, cache_arguments, command
from pipeline.preview import preview
from pipeline.sources.opening import open_source
from recipe import Recipe
from trainer.mirror import bring
from trainer.run_views import comparable, run_views, views_in_words
from transfer.chart import COLOURS, Line, line_chart, short
from transfer.comparison import as_html
from transfer.curves import read_metrics, read_objects, series
from transfer.evaluations import drawn_map, evaluations_table, first_figure, newest
from transfer.gallery import make_gallery
from transfer.load import load_encoder

RISING = "It rises at first: the queue begins as random keys, and real ones, which are harder, replace them."
CHARTS = (  # field of metrics.jsonl, title, what to know about it, axis from zero, percent
    ("loss", "Loss", f"InfoNCE; ln(1 + queue) is chance. {RISING}", False, False),
    ("knn", "kNN accuracy", "weighted, in training", False, True),
    ("rankme", "RankMe", "dimensions that the features use; a fall to 1 is collapse", True, False),
    ("lr", "Learning rate", "", True, False),
    (
        "accuracy",
        "Pretext accuracy",
        "of picking the positive; near 100 % is the batch-norm shortcut, but not in the first steps, whose queue is "
        "still random",
        True,
        True,
    ),
    ("images_per_second", "Images per second", "all ranks", True, False),
    ("data_wait", "Data wait", "share of the time that training waits for images", True, True),
    ("positive_logit", "Positive logit", "cosine of a query and its key, over the temperature", False, False),
    ("negative_logit", "Negative logit", f"mean over the dictionary, over the temperature. {RISING}", False, False),
    ("gradient_norm", "Gradient norm", "", True, False),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #68737d; --line: #e1e5ea; --paper: #ffffff; --card:
#f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --faint: #9aa5b1; --line: #333c47; --paper: #14181d; --card: #1c2229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 12px; } h3 { font-size: 15px; margin: 0 0 2px; }
p, figcaption { margin: 4px 0; color: var(--faint); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
th { font-weight: 600; } thead th { color: var(--faint); font-weight: 500; }
tr.differs td { font-weight: 600; } tr.default { color: var(--faint); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0 12px; font-size: 14px; }
section.card { margin-bottom: 16px; }
.pictures { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; margin-top: 8px; }
figure { margin: 0; flex: 1 1 300px; } figure + figure { flex: 2 1 560px; }
figure img { width: 100%; max-width: 900px; height: auto; border-radius: 4px; }
.maps img { max-width: 100%; }
.summary td, .summary th { white-space: nowrap; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--faint); }
"""


@dataclass(frozen=True)
class Run:
    folder: Path
    name: str
    colour: str
    recipe: Recipe
    rows: list[dict[str, Any]]  # metrics.jsonl
    quarantine: list[dict[str, Any]]


def read_run(folder: Path, name: str, colour: str) -> Run:
    """Raises FileNotFoundError when `folder` is not a run that logged something, ValueError that names the file when
    one of its files is not what train.py writes."""
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run: no recipe.yaml in it; give the folder that train.py wrote (--out)"
        )
    bad = folder / "quarantine.jsonl"
    # Several passes meet the same bad sample again.
    unique = {
        tuple(str(q.get(name)) for name in ("source", "shard", "key", "sample_id")): q
        for q in (read_objects(bad) if bad.is_file() else [])
    }
    return Run(folder, name, colour, recipes.load(recipe_file), read_metrics(folder), list(unique.values()))


def linear_accuracy(run_dir: Path) -> float | None:
    """Top-1 of the newest entry of transfer.linear in the ledger; of the folder that it left, from before there was a
    ledger; None where it has not run."""
    if (found := first_figure(newest(run_dir, "linear"))) is not None:
        return found
    metrics = run_dir / "linear" / "metrics.jsonl"
    rows = read_objects(metrics, field="top1") if metrics.is_file() else []
    return max((row["top1"] for row in rows if row.get("epoch") == rows[-1].get("epoch")), default=None)


def names_of(folders: list[Path]) -> list[str]:
    """The folders' own names, with as much of the path before them as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run is named twice")


def _last(run: Run, field: str) -> float | None:
    values = series(run.rows, field)[1]
    return values[-1] if values else None


def _number(value: float | None, percent: bool = False) -> str:
    return "–" if value is None else f"{100 * value:.1f} %" if percent else short(value)


def _swatch(run: Run) -> str:
    return f'<span class="swatch" style="background:{run.colour}"></span>{html.escape(run.name)}'


def summary(runs: list[Run]) -> str:
    head = (
        "run",
        "step",
        "epoch",
        "loss",
        "kNN now",
        "kNN best",
        "linear",
        "fine-tuned",
        "images/s (median)",
        "data wait (median)",
        "left out",
    )
    lines = []
    for run in runs:
        knn, speed, wait = (series(run.rows, field)[1] for field in ("knn", "images_per_second", "data_wait"))
        cells = [
            _number(_last(run, "step")),
            _number(_last(run, "epoch")),
            _number(_last(run, "loss")),
            _number(knn[-1] if knn else first_figure(newest(run.folder, "knn")), percent=True),
            _number(max(knn, default=None), percent=True),
            _number(linear_accuracy(run.folder), percent=True),
            _number(first_figure(newest(run.folder, "finetune")), percent=True),
            _number(statistics.median(speed) if speed else None),
            _number(statistics.median(wait) if wait else None, percent=True),
            f"{len(run.quarantine)} images",
        ]
        lines.append(f"<tr><th>{_swatch(run)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll summary"><table>{body}</table></div>'


def charts(runs: list[Run]) -> str:
    cards = []
    for field, title, note, from_zero, percent in CHARTS:
        lines = [Line(run.name, run.colour, *series(run.rows, field)) for run in runs]
        if any(line.steps for line in lines):
            svg = line_chart(lines, title, from_zero=from_zero, percent=percent)
            cards.append(f'<div class="card" id="chart-{field}"><h3>{title}</h3><p>{note}</p>{svg}</div>')
    legend = "".join(f"<span>{_swatch(run)}</span>" for run in runs)
    return f'<div class="legend">{legend}</div><div class="charts">{"".join(cards)}</div>'


def recipe_table(runs: list[Run]) -> str:
    """Every field, a column a run; what differs between the runs in bold, what is the default in grey."""
    values = [_every_field(run.recipe) for run in runs]
    usual = _every_field(Recipe())
    lines = []
    for field in {name: None for fields in (usual, *values) for name in fields}:
        column = [v.get(field, "") for v in values]
        differs = any(v != column[0] for v in column)
        kind = "differs" if differs else "default" if column[0] == usual.get(field) else ""
        cells = "".join(f"<td>{html.escape(str(v))}</td>" for v in column)
        lines.append(f'<tr class="{kind}"><td>{field}</td>{cells}</tr>')
    header = "".join(f"<th>{_swatch(run)}</th>" for run in runs)
    return (
        f'<div class="scroll"><table><thead><tr><th>field</th>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _every_field(r: Recipe) -> dict[str, Any]:
    return recipes.to_dict(r) | {"views": views_in_words(r), "key_views": ""} | comparable(r)


def quarantine_table(runs: list[Run]) -> str:
    """Counts by reason, then the images themselves, folded away."""
    parts = []
    for run in runs:
        if not run.quarantine:
            parts.append(f"<p>{_swatch(run)}: none</p>")
            continue
        reasons = collections.Counter(str(q.get("reason", "?")) for q in run.quarantine).most_common(12)
        counts = "".join(f"<tr><td>{n}</td><td>{html.escape(reason)}</td></tr>" for reason, n in reasons)
        some = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(q.get(f, '')))}</td>" for f in ("shard", "key", "reason")) + "</tr>"
            for q in run.quarantine[:100]
        )
        parts.append(
            f"<h3>{_swatch(run)}: {len(run.quarantine)} images</h3>"
            f'<div class="scroll"><table><tbody>{counts}</tbody></table>'
            f"<details><summary>which</summary><table><tbody>{some}</tbody></table></details></div>"
        )
    return "".join(parts)


def picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def pictures(run: Run, images: int, cache: CacheArguments) -> str:
    """Two views and neighbours. A picture that cannot be drawn, as the data has moved, leaves a line."""
    parts = []
    cache = cache_arguments(run.recipe) | cache
    views = run.folder / "views.png"
    neighbours = run.folder / "neighbours.png"
    try:
        if not views.is_file():
            r = run.recipe
            query, key = run_views(r)
            preview(r.data, views, views=query, key_views=key, image_size=r.image_size, count=4, seed=r.seed, **cache)
        words = views_in_words(run.recipe)
        parts.append(picture(views, f"The encoder's input: originals and their two views, recipe {words}"))
    except (ValueError, OSError, RuntimeError) as error:
        parts.append(f"<p>Views not drawn: {html.escape(str(error))}</p>")
    try:
        data = run.recipe.knn_data or run.recipe.data
        newest = max((p.stat().st_mtime for p in (run.folder / "checkpoints").glob("*.pt")), default=0.0)
        if images and not (neighbours.is_file() and neighbours.stat().st_mtime > newest):
            make_gallery(load_encoder(run.folder), open_source(data, **cache), neighbours, images=images, queries=6)
        if neighbours.is_file():
            parts.append(
                picture(neighbours, "Nearest neighbours: the query left, green frame for its class, red for others")
            )
    except (ValueError, OSError, RuntimeError) as error:
        parts.append(f"<p>Neighbours not drawn: {html.escape(str(error))}</p>")
    return f'<section class="card"><h3>{_swatch(run)}</h3><div class="pictures">{"".join(parts)}</div></section>'


def maps(folders: Sequence[Path], cache: CacheArguments) -> str:
    """The maps of folders of features; nothing without any. One that cannot be drawn leaves a line."""
    parts = []
    for folder in folders:
        try:
            parts.append(picture(drawn_map(folder, cache), f"Images of {folder} where their features lie"))
        except (ValueError, OSError) as error:
            parts.append(f"<p>Map not drawn: {html.escape(str(error))}</p>")
    return f'<h2>Maps</h2><div class="maps">{"".join(parts)}</div>' if parts else ""


def comparisons(runs: list[Run]) -> str:
    """The tables that transfer.compare left in the run folders, with their pictures."""
    parts = []
    for run in runs:
        folder = run.folder / "compare"
        if table := as_html(folder):
            drawn = folder / "compare.png"
            bars = picture(drawn, "The same as bars: trained encoders blue") if drawn.is_file() else ""
            parts.append(f'<h3>{_swatch(run)}</h3>{table}<div class="maps">{bars}</div>')
    return f"<h2>Side by side</h2>{''.join(parts)}" if parts else ""


def write_report(
    folders: list[Path],
    output: str | Path,
    *,
    images: int = 1000,
    features: Sequence[Path] = (),
    **cache: Unpack[CacheArguments],
) -> str | Path:
    """Writes the page. images: how many of a run's images are searched for neighbours; 0: no such picture. features:
    folders of transfer.embed whose maps are shown. cache: for remote shards; each run's own unless given.

    Raises FileNotFoundError for a folder that is not a run, ValueError when more runs are given than can be told apart.
    """
    if not 1 <= len(folders) <= len(COLOURS):
        raise ValueError(f"{len(folders)} runs; between 1 and {len(COLOURS)} can be told apart by colour on one page")
    runs = [read_run(*item) for item in zip(folders, names_of(folders), COLOURS)]
    title = html.escape(" · ".join(run.name for run in runs))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MoCo pre-training: {title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1><p>MoCo pre-training, as of {time.strftime("%Y-%m-%d %H:%M")}</p>
<h2>Where it stands</h2>{summary(runs)}
<h2>Evaluations</h2>{evaluations_table([(_swatch(run), run.folder) for run in runs])}
{comparisons(runs)}
<h2>Curves</h2>{charts(runs)}
<h2>Pictures</h2>{"".join(pictures(run, images, cache) for run in runs)}
{maps(features, cache)}
<h2>Images left out</h2>{quarantine_table(runs)}
<h2>Recipe</h2>{recipe_table(runs)}
</body></html>
"""
    files.make_folder_of(str(output))
    files.write(str(output), page.encode())
    return output


def main(args: Namespace) -> None:
    output = args.output or files.join(args.runs[0], "report.html")
    folders = [Path(bring(run)) for run in args.runs]
    print(write_report(folders, output, images=args.images, features=args.features, **cache_arguments(args)))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
