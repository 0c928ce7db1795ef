"""Neighbours in a folder of features: those of given images, near-duplicates, a map.

    python -m transfer.neighbours --features features/train --images a.jpg b.jpg
    python -m transfer.neighbours --features features/train --val features/val --duplicates_above 0.95

1. `--images` and `--rows` are shown beside their nearest neighbours: neighbours.png, neighbours.json.
2. `--duplicates_above` lists pairs of images that are more similar than that, the most similar first: duplicates.csv,
   duplicates.png. Within the folder; with `--val` between the two: a validation image that was trained on is the
   first thing to know about a figure.
3. map.png shows pictures from all over the folder where they lie on the plane of most variance.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.neighbours()  # before the imports that take seconds

import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image

from pipeline.command import cache_arguments, command
from pipeline.files import write_atomically
from transfer.embedding import open_embedding
from transfer.gallery import draw
from transfer.map_picture import MAP, map_of
from transfer.pictures import Pictures, pairs_table, queries_of, source_of, write_picture
from transfer.similar import near_duplicates, search

DRAWN_PAIRS = 12  # from the most similar to the least


def main(args: Namespace) -> None:
    started, cache = time.monotonic(), cache_arguments(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = open_embedding(args.features)
    val = open_embedding(args.val) if args.val else None
    output = args.output or args.features / "neighbours"
    output.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(here, source_of(here, args.data, cache))
    result: dict[str, Any] = {"features": str(args.features), "images": len(here.features), "output": str(output)}

    if args.images or args.rows:
        vectors, drawn, names = queries_of(here, pictures, args.images, args.rows, args.run)
        similarities, found = search(here.features, vectors, args.neighbours + 1, device=device)
        own = [-1] * len(args.images) + list(args.rows)
        rows = []
        for query, near, scores in zip(own, found.tolist(), similarities.tolist()):
            others = [(i, s) for i, s in zip(near, scores) if i != query][: args.neighbours]
            rows.append([{**pictures.about(i), "similarity": round(s, 6)} for i, s in others])
        result["neighbours"] = dict(zip(names, rows))
        write_atomically(output / "neighbours.json", json.dumps(result["neighbours"], indent=1).encode())
        lines = [[(image, name)] for image, name in zip(drawn, [Path(name).name for name in names])]
        for line, near in zip(lines, rows):
            line += [(pictures.of(r["row"]), f"{r['label']} ({r['similarity']:.2f})".strip()) for r in near]
        draw_lines(lines, output / "neighbours.png", f"Nearest among {len(here.features):,} images of {args.features}")

    if args.duplicates_above is not None:
        if val is not None and (differ := [n for n in ("encoder", "features") if val.about[n] != here.about[n]]):
            raise ValueError(f"{args.features} and {args.val} differ in {', '.join(differ)}: embed both alike")
        other = None if val is None else val.features
        pairs = near_duplicates(here.features, other, args.duplicates_above, device=device, progress="comparing")
        theirs = pictures if val is None else Pictures(val, source_of(val, None, cache))
        write_atomically(output / "duplicates.csv", pairs_table(pairs, pictures, theirs).encode())
        result |= {"duplicates": pairs.found, "above": args.duplicates_above, "listed": len(pairs.first)}
        step = max(1, len(pairs.first) // DRAWN_PAIRS)
        some = list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.similarities.tolist()))[::step][:DRAWN_PAIRS]
        lines = [
            [(pictures.of(a), pictures.name(a)), (theirs.of(b), f"({s:.3f}) {theirs.name(b)}")] for a, b, s in some
        ]
        title = f"{pairs.found:,} pairs of similarity {args.duplicates_above:g} or more"
        draw_lines(lines, output / "duplicates.png", title)

    page, share = map_of(here, pictures)
    if pictures.source is not None:
        write_picture(page, output / MAP)
    result |= {"variance_on_map": round(share, 4), "pictures": pictures.source is not None}
    print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))


def draw_lines(lines: list[list[tuple[Image.Image, str]]], output: Path, title: str) -> None:
    if lines:
        write_picture(draw([[(image, text, "") for image, text in line] for line in lines], title), output)


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
