"""A report card from two folders of features, without looking at an image again.

    python -m transfer.probe --train features/in1m_train --val features/in1m_val

1. kNN for several numbers of neighbours and temperatures, as transfer.knn has it.
2. Logistic regression on all labels, on 10 and 1 % of them, and on 1, 5 and 10 images of each class, each few-label
   figure over five draws. Where images have lists of labels: linear SVMs, mean average precision.
3. Without any label: RankMe, and LiDAR where the folder has augmented views.

The same rows go into probe.md, probe.csv and probe.json, and a picture of them into probe.png.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.probe()  # before the imports that take seconds

import csv
import functools
import io
import json
import sys
import time
from typing import Any

import torch
from jsonargparse import Namespace

from pipeline.command import command
from pipeline.files import write_atomically
from transfer import ledger
from transfer.effective_rank import lidar, rankme
from transfer.embedding import Embedding, open_embedding
from transfer.probe_picture import draw_probe
from transfer.probing import LOGISTIC, figures_of, knn_rows, logistic_rows, logistic_settings, row, svm_rows


def main(args: Namespace) -> None:
    started = time.monotonic()
    train, val = open_embedding(args.train), open_embedding(args.val)
    check_pair(train, val)
    few = {"shots_of_class": args.shots, "seeds": args.seeds, "cost": args.cost, "progress": True}
    rows: list[dict[str, Any]] = []
    if (train.labels >= 0).any():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows += knn_rows(train, val, args.k, args.temperature, device=device)
        rows += logistic_rows(train, val, shares=args.shares, **few)
    if train.label_lists is not None and val.label_lists is not None:
        rows += svm_rows(train, val, **few)
    for name, embedding in (("train", train), ("val", val)):
        images = len(embedding.features)
        rows.append(row("RankMe", name, "rank", [rankme(embedding.features)], images=images))
        if embedding.views is not None and embedding.views.shape[1] > 1:
            rows.append(row("LiDAR", name, "rank", [lidar(embedding.views)], images=images))
    output = args.output or args.val / "probe"
    output.mkdir(parents=True, exist_ok=True)
    about = {name: val.about[name] for name in ("run", "step", "features", "dimensions")}
    about |= {"train": len(train.features), "val": len(val.features), "cost": args.cost}
    write_atomically(output / "probe.md", markdown(rows, about).encode())
    write_atomically(output / "probe.csv", table(rows).encode())
    write_atomically(output / "probe.json", json.dumps(about | {"rows": rows}, indent=1).encode())
    keep(rows, train, val, args)
    draw_probe(rows, output / "probe.png", title=f"{about['features']} of {about['run']}, step {about['step']}")
    result: dict[str, Any] = {}
    if knn := [each for each in rows if each["protocol"] == "kNN"]:
        best = max(knn, key=lambda each: each["mean"])
        result = {"knn_best": best["mean"], "k": best["k"], "temperature": best["temperature"]}
    for each in rows:
        if each["protocol"] != "kNN":
            result[f"{each['protocol']}, {each['setting']}"] = each["mean"]
    print(json.dumps(result | about | {"output": str(output), "seconds": round(time.monotonic() - started, 1)}))


def keep(rows: list[dict[str, Any]], train: Embedding, val: Embedding, args: Namespace) -> None:
    """Two lines in the ledger of the run that the features are of: logistic regression, and the rest."""
    about = val.about
    at: dict[str, Any] = {
        "run": about["run"],
        "step": about["step"],
    }
    at["start"] = "untrained" if about.get("untrained") else "trained"
    output = args.output or args.val / "probe"
    few: dict[str, Any] = {"shares": args.shares, "shots": args.shots, "seeds": args.seeds, "cost": args.cost}
    settings = logistic_settings(val.about, train.about["fingerprint"], val.about["fingerprint"], **few)
    logistic = [each for each in rows if each["protocol"] == LOGISTIC]
    if logistic:
        found = ledger.entry("logistic", settings, figures_of(logistic), **at)
        ledger.record(found, about["run"], output)
    others = {f"{r['protocol']}, {r['setting']}": r["mean"] for r in rows if r["protocol"] not in ("kNN", LOGISTIC)}
    if knn := [each["mean"] for each in rows if each["protocol"] == "kNN"]:
        others = {"knn_best": max(knn)} | others
    settings = settings | {"k": args.k, "temperature": args.temperature}
    ledger.record(ledger.entry("probe", settings, others, **at), about["run"], output)


def check_pair(train: Embedding, val: Embedding) -> None:
    """ValueError when the two folders cannot be compared: other encoder or pixels, other classes, labels
    missing."""
    names = ("encoder", "features", "image_size", "resize", "mean_std", "precision", "classes")
    if differ := [name for name in names if train.about.get(name) != val.about.get(name)]:
        raise ValueError(
            f"{train.folder} and {val.folder} do not belong together, their {', '.join(differ)} differ: embed both "
            "with the same --run and settings"
        )
    if train.about["fingerprint"] == val.about["fingerprint"]:
        print("note: train and val are the same images: each one finds itself", file=sys.stderr)
    for name, here in (("train", train), ("val", val)):
        missing, others = int((here.labels < 0).sum()), (val if here is train else train).labels
        if missing and (missing < len(here.labels) or (others >= 0).any()):
            raise ValueError(
                f"{missing:,} of {len(here.labels):,} images of the {name} folder {here.folder} have no label, and the "
                "others have: make the shards from class folders, or embed a labelled source"
            )


def figure(each: dict[str, Any]) -> str:
    percent = each["metric"] != "rank"
    mean, spread = (None if v is None else 100 * v if percent else v for v in (each["mean"], each["spread"]))
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "") + (" %" if percent else "")


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    head = f"{about['features']} of {about['run']}, step {about['step']}: {about['dimensions']} dimensions, "
    head += (
        f"{about['train']:,} training and {about['val']:,} validation images. Spread: standard deviation over draws."
    )
    lines = ["| protocol | setting | metric | figure | draws |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r['protocol']} | {r['setting']} | {r['metric']} | {figure(r)} | {r['seeds']} |" for r in rows]
    return "\n".join([head, "", *lines, ""])


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for each in rows for name in each)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
