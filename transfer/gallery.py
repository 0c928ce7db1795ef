"""Images that the encoder holds alike: query images with their nearest neighbours by cosine similarity, one PNG.

    python -m transfer.gallery --run runs/photos --data shards/photos --output gallery.png

A row is one query and then its neighbours, the nearest first, with similarity and label in small print. Where there are
labels, neighbours of the query's class have a green frame, the others a red one.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.gallery()  # before the imports that take seconds

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from pipeline import files
from pipeline.command import cache_arguments, command
from pipeline.pixels.decode import picture
from pipeline.preview import fitted
from pipeline.reading.order import draw_of_ids
from pipeline.sources.index import read_index
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage, storage_for
from trainer.joining import Ranks
from transfer.arguments import encoder_arguments
from transfer.knn import extract, nearest
from transfer.load import CentralCrops, LoadedEncoder, load_encoder

CELL = 104  # pixels: side of a picture in the gallery
PRINT = 18  # pixels of small print under it
GAP = 8
INK, FAINT, PAPER, SAME, OTHER = "#1f2933", "#7b8794", "#ffffff", "#2f9e44", "#e03131"


def original(source: Source, storage: Storage, sample_id: int) -> Image.Image:
    """The sample's image as it lies in its shard, upright, RGB."""
    place = draw_of_ids(source, np.array([sample_id], np.int64))
    manifest, shard, row = source.manifests[int(place.manifest[0])], int(place.shard[0]), int(place.row[0])
    index = read_index(read_index_text(manifest, shard, storage))
    start, size = int(index.offsets[row]), int(index.sizes[row])
    encoded = storage.open(manifest.shard_url(shard))[start : start + size]
    return picture(encoded, grey16=manifest.grey16_range)


def choose_queries(labels: Tensor, queries: int, seed: int) -> list[int]:
    """Positions of random samples, of as many different classes as there are."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    seen: dict[int, int] = {}
    turn = []  # how many of its class came before
    for i in order:
        label = int(labels[i])
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    by_turn = sorted(range(len(order)), key=lambda j: turn[j])  # stable: random within a turn
    return [order[j] for j in by_turn[:queries]]


def draw(rows: list[list[tuple[Image.Image, str, str]]], title: str) -> Image.Image:
    """Rows of (picture, small print, colour of its frame, "" for none); the first of a row is the query."""
    font = ImageFont.load_default(size=11)
    columns = max(len(row) for row in rows)
    step_x, step_y = CELL + GAP, CELL + PRINT + GAP
    page = Image.new("RGB", (GAP + columns * step_x + 2 * GAP, 34 + len(rows) * step_y + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    large = ImageFont.load_default(size=13)
    pen.text((GAP, 10), fitted(title, page.width - 2 * GAP, large), fill=INK, font=large)
    for r, row in enumerate(rows):
        for c, (image, text, frame) in enumerate(row):
            x, y = GAP + c * step_x + (2 * GAP if c else 0), 34 + r * step_y
            # Whole pixels for tiny pictures; a smooth blow-up hides what the encoder saw.
            method = Image.Resampling.NEAREST if min(image.size) <= CELL // 2 else Image.Resampling.BICUBIC
            page.paste(ImageOps.fit(image, (CELL, CELL), method=method), (x, y))
            if frame:
                pen.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=frame, width=2)
            pen.text((x, y + CELL + 3), fitted(text, CELL, font), fill=FAINT if c else INK, font=font)
    return page


def make_gallery(
    loaded: LoadedEncoder,
    source: Source,
    output: str | Path,
    *,
    queries: int = 8,
    neighbours: int = 8,
    features: Literal["backbone", "head"] = "backbone",
    images: int | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> str | Path:
    """Draws `queries` random samples with their nearest neighbours among the first `images` of source (None: all) to
    a PNG, a file or its URL. Returns `output`."""
    vectors, labels, sample_ids = extract(
        loaded.part(features).to(device),
        source,
        CentralCrops(
            loaded.image_size, loaded.mean_std, batch_size=batch_size, ranks=Ranks(0, 1, torch.device(device))
        ),
        limit=images,
        progress="features" if progress else "",
    )
    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} image is too few for neighbours; use a larger source or --images")
    chosen = choose_queries(labels, queries, seed)
    neighbours = min(neighbours, len(vectors) - 1)
    # One more than asked: each query finds itself, and twins of equal features may come before it.
    similarities, indices = nearest(vectors, vectors[chosen], neighbours + 1, device=device)
    storage = storage_for(source)

    def label(i: int) -> str:
        return source.class_name(int(labels[i])) if labels[i] >= 0 else ""

    rows = []
    for query, near, scores in zip(chosen, indices.tolist(), similarities.tolist()):
        row = [(original(source, storage, int(sample_ids[query])), label(query) or f"#{int(sample_ids[query])}", "")]
        for i, score in [(i, s) for i, s in zip(near, scores) if i != query][:neighbours]:
            known = labels[query] >= 0 and labels[i] >= 0
            frame = (SAME if labels[i] == labels[query] else OTHER) if known else ""
            image = original(source, storage, int(sample_ids[i]))
            row.append((image, f"{label(i)} ({score:.2f})".strip(), frame))
        rows.append(row)
    storage.close()
    where = f"{len(vectors):,} images of {', '.join(source.names)}"
    page = draw(rows, f"Nearest neighbours among {where}, {features} of {Path(loaded.name).name}, step {loaded.step}")
    files.make_folder_of(str(output))
    with files.writing(str(output)) as file:
        page.save(file, format="PNG")
    return output


def main(args: Namespace) -> None:
    path = make_gallery(
        load_encoder(args.run, **encoder_arguments(args)),
        open_source(args.data, **cache_arguments(args)),
        args.output,
        queries=args.queries,
        neighbours=args.neighbours,
        features=args.features,
        images=args.images,
        batch_size=args.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=args.seed,
    )
    print(path)


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
