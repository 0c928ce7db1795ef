"""The part of the report about what was measured: every judgement in the ledgers of runs, and maps of features."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.command import CacheArguments
from transfer import ledger
from transfer.embedding import ABOUT, open_embedding
from transfer.ledger import Entry
from transfer.map_picture import MAP, map_of
from transfer.pictures import Pictures, source_of, write_picture

SHOWN = 100  # judgements of a run on a page
HEAD = ("protocol", "start", "step", "figures", "settings", "judged on", "date")


def newest(run: Path, protocol: str) -> Entry | None:
    """The last judgement of a trained encoder in the run's ledger."""
    entries = ledger.read(str(run / ledger.LEDGER))
    return next((e for e in reversed(entries) if e["protocol"] == protocol and e.get("start") == "trained"), None)


def first_figure(entry: Entry | None) -> float | None:
    value = next(iter(entry["figures"].values())) if entry else None
    return float(value) if isinstance(value, int | float) else None


def shown(figures: dict[str, Any]) -> str:
    written = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    return ", ".join(f"{name} {value}" for name, value in written.items())


def evaluations_table(runs: Sequence[tuple[str, Path]]) -> str:
    """(heading as HTML, run folder) of each run -> a table for each, the newest first."""
    parts = []
    for heading, folder in runs:
        entries = ledger.read(str(folder / ledger.LEDGER))
        if not entries:
            parts.append(f"<p>{heading}: none yet</p>")
            continue
        lines = []
        for e in reversed(entries[-SHOWN:]):
            on = f"train {str(e.get('train'))[:8]}, val {str(e.get('val'))[:8]}"
            what = (e["protocol"], e.get("start"), e.get("step"))
            cells = (*what, shown(e["figures"]), shown(e.get("settings", {})), on, e.get("date"))
            lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in HEAD)
        parts.append(
            f'<h3>{heading}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    return "".join(parts)


def drawn_map(features: Path, cache: CacheArguments) -> Path:
    """The map of a folder of features, drawn where transfer.neighbours leaves it unless it is there. ValueError when
    the images are not where they were; FileNotFoundError for another folder."""
    output = features / "neighbours" / MAP
    embedding = open_embedding(features)
    if output.is_file() and output.stat().st_mtime >= (features / ABOUT).stat().st_mtime:
        return output
    source = source_of(embedding, None, cache)
    if source is None:
        raise ValueError(f"the images of {features} are not where they were")
    output.parent.mkdir(exist_ok=True)
    write_picture(map_of(embedding, Pictures(embedding, source))[0], output)
    return output
