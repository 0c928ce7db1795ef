"""Several encoders side by side, as in the paper's tables: a row for each start, a column for each protocol.

    python -m transfer.compare runs/photos runs/photos/checkpoints/step_00001000.pt supervised.pth \
        --train shards/in1m/train --val shards/in1m/val --protocols knn,linear,logistic,finetune

1. Each encoder is judged by each protocol with the settings of the flags, over several seeds where there is chance in
   it. A figure that the ledger of its run has already is taken from there; a new one is written there.
2. The rows go into compare.md, compare.csv and compare.json, and a picture of them into compare.png; the report of the
   run shows them.

The same command goes on where it was stopped. Several ranks share the work.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.compare()  # before the imports that take seconds

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from pipeline.command import cache_arguments, command
from pipeline.files import is_remote
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from trainer.joining import Ranks, control_group, joined
from transfer import knn, ledger
from transfer import linear as linear_protocol
from transfer.comparison import Cell, Row, write_comparison
from transfer.embedding import open_embedding
from transfer.extraction import embedding_by
from transfer.features import embed_source
from transfer.finetune import FineTuning, finetune
from transfer.finetune import settings_of as finetune_settings
from transfer.labels import warn_of_overlap
from transfer.ledger import Entry
from transfer.load import CentralCrops, LoadedEncoder, default_resize, load_encoder, weights_hash
from transfer.probing import figures_of, logistic_rows, logistic_settings
from transfer.training import Session, plain, shared

SHARES = [1.0, 0.1, 0.01]  # of the labels, for logistic regression


class Start(NamedTuple):
    """A row of the table."""

    name: str
    run: str
    loaded: LoadedEncoder
    pixels: bool = False


class Sources(NamedTuple):
    train: Source
    val: Source


def main(args: Namespace) -> None:
    started = time.monotonic()
    protocols = [name.strip() for name in args.protocols.split(",") if name.strip()]
    output = args.output
    if output is None:
        if is_remote(args.runs[0]) or not Path(args.runs[0]).is_dir():
            raise ValueError(f"{args.runs[0]} is no run folder here: say with --output where the tables go")
        output = Path(args.runs[0]) / "compare"
    starts = starts_of(args)
    data = Sources(*(open_source(place, **cache_arguments(args)) for place in (args.train, args.val)))
    judged_now = 0
    with joined() as ranks:
        if ranks.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            warn_of_overlap(*data)
        rows = []
        for start in starts:
            cells: list[Cell] = []
            for protocol in ["knn"] if start.pixels else protocols:
                known = shared(lambda: known_of(start, output), ranks)  # noqa: B023 - called at once
                found, new = judge(protocol, start, data, known, output, args, ranks)
                cells += found
                judged_now += new
            rows.append(Row(start.name, start.loaded.start if not start.pixels else "pixels", start.loaded.step, cells))
    if ranks.rank == 0:
        about = {"train": data.train.samples, "val": data.val.samples, "protocols": protocols, "seeds": args.seeds}
        table = write_comparison(rows, output, about)
        result = {"compare": str(output), "rows": table, "judged_now": judged_now} | about
        print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))


def starts_of(args: Namespace) -> list[Start]:
    """The encoder of the first run as it was initialised, raw pixels, and then each that is given."""
    size = args.image_size
    rows = []
    for run in args.runs:
        loaded = load_encoder(run, image_size=size)
        size = size or loaded.image_size  # all of them are fed alike
        rows.append(Start(name_of(run, loaded), run, loaded))
    first = rows[0]
    before = []
    if not args.no_random:
        before.append(Start("random", first.run, load_encoder(first.run, untrained=True, image_size=size)))
    if args.pixels:
        before.append(Start("raw pixels", first.run, first.loaded, pixels=True))
    return before + rows


def name_of(run: str, loaded: LoadedEncoder) -> str:
    """The run and its step, also for a checkpoint in it; a file's own name."""
    if not loaded.is_run:
        return Path(run).name
    place = run if is_remote(run) or Path(run).parent.name != "checkpoints" else str(Path(run).parent.parent)
    return f"{place}, step {loaded.step}"


def known_of(start: Start, output: Path) -> list[Entry]:
    places = [ledger.ledger_of(start.run), str(output / ledger.LEDGER)]
    return [each for place in places if place is not None for each in ledger.read(place)]


def judge(
    protocol: str, start: Start, data: Sources, known: list[Entry], output: Path, args: Namespace, ranks: Ranks
) -> tuple[list[Cell], int]:
    """The cells of one row under one protocol, and how many judgements were made for them now. All ranks call it."""
    jobs = {"knn": knn_jobs, "linear": linear_jobs, "logistic": logistic_jobs, "finetune": finetune_jobs}
    if protocol not in jobs:
        found = cells_of_others(protocol, start, known)
        if not found and ranks.rank == 0:
            print(f"note: no ledger has a figure of protocol {protocol!r} for {start.name}", file=sys.stderr)
        return found, 0
    cells, new = list[Cell](), 0
    for settings, run in jobs[protocol](start, data, output, args, ranks):
        about = ledger.judged(start.loaded) | ({"start": "pixels", "step": 0} if start.pixels else {})
        wanted = ledger.entry(protocol, settings, {}, **about)
        entry = ledger.latest(known, wanted)
        if entry is None:
            if ranks.rank == 0:
                print(f"{protocol} of {start.name}", file=sys.stderr, flush=True)
            entry, new = wanted | {"figures": plain(run())}, new + 1
            if ranks.rank == 0:
                ledger.record(entry, start.run, output)
        for title, value, spread in cells_of(protocol, entry):
            same = next((cell for cell in cells if cell.title == title), None)
            if same is None:
                cells.append(Cell(title, [value], spread))
            else:
                same.values.append(value)
    return cells, new


def cells_of(protocol: str, entry: Entry) -> list[tuple[str, float, float | None]]:
    """(title, figure, spread if the entry has one) of the columns that an entry fills."""
    figures, settings = entry["figures"], entry["settings"]
    if protocol == "knn":
        return [(f"kNN, k {settings['k']}", figures["knn"], None)]
    if protocol == "linear":
        return [("linear", figures["top1"], None)]
    if protocol == "finetune":
        return [(f"fine-tuned, {100 * settings['fraction']:g} % of the labels", figures["top1"], None)]
    names = [name for name in figures if not name.endswith(", spread")]
    return [(f"logistic, {name}", figures[name], figures.get(f"{name}, spread")) for name in names]


def cells_of_others(protocol: str, start: Start, known: list[Entry]) -> list[Cell]:
    """Whatever the ledger has of a protocol that is another command's: the figures that count, by data judged on."""
    encoder = weights_hash(start.loaded.encoder.backbone)
    cells: dict[str, Cell] = {}
    for entry in known:
        name, value = next(iter(entry["figures"].items()))
        if entry["protocol"] == protocol and entry.get("encoder") == encoder and isinstance(value, int | float):
            title = f"{protocol}, {name}, on {str(entry.get('val'))[:8]}"
            cells.setdefault(title, Cell(title, [], None)).values.append(float(value))
    return list(cells.values())


# --- a protocol's judgements: (settings for the ledger, what makes the figures) ---------------------------------------

Job = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def crops_of(start: Start, args: Namespace, ranks: Ranks) -> CentralCrops:
    how = {"batch_size": args.batch_size, "num_threads": args.num_threads, "ranks": ranks}
    return CentralCrops(start.loaded.image_size, start.loaded.mean_std, **how)


def knn_jobs(start: Start, data: Sources, output: Path, args: Namespace, ranks: Ranks) -> list[Job]:
    crops, loaded = crops_of(start, args, ranks), start.loaded
    part: Any = "pixels" if start.pixels else "backbone"

    def run() -> dict[str, Any]:
        module = loaded.encoder.backbone.to(ranks.device).to(memory_format=torch.channels_last)
        embed = knn.raw_pixels if start.pixels else embedding_by(module, ranks.device, args.precision)
        found = knn.evaluate(embed, *data, crops, k=args.k, progress=True)
        return {"knn": found["knn"], "rankme": found["rankme"]}

    return [(knn.settings_of(loaded, *data, crops, part, args.k, 0.1, args.precision), run)]


def linear_jobs(start: Start, data: Sources, output: Path, args: Namespace, ranks: Ranks) -> list[Job]:
    def job(seed: int) -> Job:
        lrs = [float(lr) for lr in args.linear_lr]
        protocol = linear_protocol.Protocol(lrs, args.linear_epochs, args.batch_size, seed=seed)
        settings = linear_protocol.settings_of(start.loaded, *data, protocol)
        how = {"precision": args.precision, "num_threads": args.num_threads, "ranks": ranks, "progress": True}
        out = output / "trainings" / f"linear-{settings['encoder']}-seed{seed}"

        def run() -> dict[str, Any]:
            return linear_protocol.best_figures(linear_protocol.linear(start.loaded, *data, out, protocol, **how))

        return settings | {"precision": args.precision}, run

    return [job(seed) for seed in range(args.seeds)]


def finetune_jobs(start: Start, data: Sources, output: Path, args: Namespace, ranks: Ranks) -> list[Job]:
    epochs = args.finetune_epochs
    milestones = (round(0.6 * epochs), round(0.8 * epochs))

    def job(fraction: float, seed: int) -> Job:
        how = FineTuning(
            float(args.finetune_lr), args.finetune_lr_head, epochs, args.batch_size, milestones=milestones,
            fraction=fraction, precision=args.precision, seed=seed,
        )  # fmt: skip
        settings = finetune_settings(start.loaded, *data, how)
        out = output / "trainings" / f"finetune-{settings['encoder']}-{fraction:g}-seed{seed}"

        def run() -> dict[str, Any]:
            at = Session(out, ranks, control_group())
            found = finetune(start.loaded, *data, at, how, num_threads=args.num_threads, progress=True)
            assert found is not None  # nothing tells it to stop
            return found

        return settings, run

    return [
        job(float(fraction), seed) for fraction in sorted(args.fraction, reverse=True) for seed in range(args.seeds)
    ]


def logistic_jobs(start: Start, data: Sources, output: Path, args: Namespace, ranks: Ranks) -> list[Job]:
    """One: the draws of few labels are its seeds."""
    loaded = start.loaded
    encoder = weights_hash(loaded.encoder.backbone)
    fed = {"encoder": encoder, "features": "backbone", "image_size": loaded.image_size, "precision": args.precision}
    fed |= {"resize": default_resize(loaded.image_size), "mean_std": loaded.mean_std}
    few: dict[str, Any] = {"shares": SHARES, "seeds": args.seeds, "cost": 1.0}

    def run() -> dict[str, Any]:
        folders = [output / "features" / f"{encoder}-{source.fingerprint[:16]}" for source in data]
        for folder, source, place in zip(folders, data, (args.train, args.val)):
            notes = {"run": loaded.name, "step": loaded.step, "data": place, "untrained": loaded.start == "untrained"}
            embed_source(
                loaded, source, folder, batch_size=args.batch_size, precision=args.precision,
                num_threads=args.num_threads, notes=notes, ranks=ranks, progress=True,
            )  # fmt: skip
        if ranks.rank:
            return {}  # rank 0 alone writes
        train, val = map(open_embedding, folders)
        return figures_of(logistic_rows(train, val, shots_of_class=[], **few, progress=True))

    settings = logistic_settings(plain(fed), data.train.fingerprint, data.val.fingerprint, shots=[], **few)
    return [(settings, lambda: shared_figures(run, ranks))]


def shared_figures(run: Callable[[], dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    found = run()
    return dict(shared(lambda: found, ranks))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS), resumes=True)
