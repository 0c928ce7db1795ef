"""The ledger of a run: a line for every judgement of it, in RUN/evaluations.jsonl.

An entry is one JSON object: `protocol` (knn, linear, logistic, probe, finetune, ...); what was judged (`encoder`, the
hash of its weights; `run`, `step`, `start`: trained, untrained or pixels); on what (`train`, `val`: fingerprints);
`settings`; `figures`, the first of which is the one that counts; `version` of this program and `date`. A bare file has
no run folder: its entries go to the command's output folder, or nowhere.
"""

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from pipeline import files
from transfer.load import LoadedEncoder
from transfer.training import plain

LEDGER = "evaluations.jsonl"
IDENTITY = (
    "protocol",
    "encoder",
    "train",
    "val",
    "settings",
)  # of two entries that are alike in these, the later holds
Entry = dict[str, Any]


def entry(
    protocol: str, settings: dict[str, Any], figures: dict[str, Any], *, run: str, step: int, start: str = "trained"
) -> Entry:
    """settings: with "encoder", "train" and "val", which become the entry's own. figures: the one that counts first."""
    settings = {name: value for name, value in settings.items() if name != "protocol"}
    about = {"protocol": protocol, "run": run, "step": step, "start": start}
    about |= {name: settings.pop(name) for name in ("encoder", "train", "val")}
    about |= {"settings": settings, "figures": figures}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return plain(about | {"version": version(), "date": now})


def judged(loaded: LoadedEncoder) -> dict[str, Any]:
    """The arguments of `entry` that say what was judged."""
    return {"run": loaded.name, "step": loaded.step, "start": loaded.start}


def version() -> str:
    try:
        return importlib.metadata.version("moco-pipeline")
    except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
        return "not installed"


def ledger_of(run: str) -> str | None:
    """The ledger of a run folder or its URL, or of the run that a checkpoint lies in; None for a bare file."""
    if files.is_remote(run):
        return files.join(run, LEDGER)
    path = files.local_path(run)
    folder = path if path.is_dir() else path.absolute().parent.parent
    is_run = (folder / "recipe.yaml").is_file() and (path.is_dir() or path.parent.name == "checkpoints")
    return str(folder / LEDGER) if is_run else None


def record(found: Entry, run: str, output: str | Path | None = None) -> str | None:
    """Writes the entry into the ledger of `run`, else of the folder `output`. Returns where it is now; None, after a
    note on standard error, when neither can keep it. An entry that is there already is not written again."""
    own = ledger_of(run)
    problem = f"{run} is no run folder" if own is None else ""
    for place in (own, None if output is None else files.join(str(output), LEDGER)):
        if place is None:
            continue
        try:
            if not any(same(found, other) and other.get("figures") == found["figures"] for other in read(place)):
                files.make_folder_of(place)
                files.append_line(place, json.dumps(found).encode())
        except (OSError, ValueError) as error:
            problem = problem or f"{place} cannot be written to ({error})"
            continue
        if problem:
            print(f"note: {problem}: the figure is kept in {place}", file=sys.stderr)
        return place
    print(f"note: {problem}: the figure is kept nowhere but in the line above or below", file=sys.stderr)
    return None


def read(place: str) -> list[Entry]:
    """The entries of a ledger, in order; empty when there is none. Pieces of lines, which a kill leaves, and lines that
    are no entries are passed over, so that whoever reads them need not look."""
    try:
        content = files.read(place)
    except FileNotFoundError:
        return []
    entries = []
    for line in content.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_entry(found):
            entries.append(found)
    return entries


def is_entry(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("protocol"), str):
        return False
    figures = found.get("figures")
    return isinstance(found.get("settings", {}), dict) and isinstance(figures, dict) and bool(figures)


def same(one: Entry, other: Entry) -> bool:
    """Whether both are the same judgement of the same encoder."""
    return all(one.get(name) == other.get(name) for name in IDENTITY)


def latest(entries: list[Entry], wanted: Entry) -> Entry | None:
    """The newest of `entries` that is the same judgement as `wanted`."""
    return next((each for each in reversed(entries) if same(each, wanted)), None)
