"""The images behind a folder of features, and images from elsewhere brought to the same features."""

import csv
import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.command import CacheArguments
from pipeline.files import writing_beside
from pipeline.pixels.decode import BadImage, picture
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import storage_for
from transfer.embedding import Embedding, read_table
from transfer.extraction import embedding_by, feature_batches
from transfer.gallery import original
from transfer.load import CentralCrops, load_encoder, weights_hash
from transfer.similar import Pairs


class Pictures:
    """The images behind the rows of a folder of features, and what its table says of them. Without the source they are
    white."""

    def __init__(self, embedding: Embedding, source: Source | None) -> None:
        self.embedding, self.source = embedding, source
        self.storage = storage_for(source) if source is not None else None
        columns = read_table(embedding.folder, ["shard", "key"])
        self.shards, self.keys = columns["shard"], columns["key"]

    def of(self, row: int) -> Image.Image:
        if self.source is None or self.storage is None:
            return Image.new("RGB", (1, 1), "#ffffff")
        return original(self.source, self.storage, int(self.embedding.sample_ids[row]))

    def class_name(self, label: int) -> str:
        classes = self.embedding.about["classes"]
        return classes[label] if label < len(classes) else str(label)

    def label(self, row: int) -> str:
        label, several = int(self.embedding.labels[row]), self.embedding.label_lists
        if several is not None and label < 0:
            return ", ".join(map(self.class_name, several[row]))
        return self.class_name(label) if label >= 0 else ""

    def name(self, row: int) -> str:
        return self.label(row) or self.keys[row]

    def about(self, row: int) -> dict[str, Any]:
        about = {"row": row, "sample_id": int(self.embedding.sample_ids[row]), "shard": self.shards[row]}
        return about | {"key": self.keys[row], "label": self.label(row)}


def source_of(embedding: Embedding, data: str | None, cache: CacheArguments) -> Source | None:
    """Where the images of a folder of features lie; None, with a note, when they are not there any more. ValueError or
    OSError when `data`, which the user names, is not the place."""
    place = data or embedding.about["data"]
    try:
        source = open_source(place, **cache)
        if source.fingerprint != embedding.about["fingerprint"]:
            raise ValueError(f"{place} is not the source that {embedding.folder} was made from")
    except (ValueError, OSError) as error:
        if data:
            raise
        print(f"note: no pictures: {error}; name the source with --data", file=sys.stderr)
        return None
    return source


def write_picture(page: Image.Image, path: Path) -> None:
    with writing_beside(path) as file:
        page.save(file, format="PNG")


def queries_of(
    here: Embedding,
    pictures: Pictures,
    images: Sequence[Path],
    rows: Sequence[int],
    run: str | None,
) -> tuple[torch.Tensor, list[Image.Image], list[str]]:
    """(vectors [M, D], pictures, names) of image files and then of rows. ValueError for one that is not there."""
    if beyond := [row for row in rows if row >= len(here.features)]:
        raise ValueError(f"--rows {beyond[0]}: {here.folder} has the rows 0 to {len(here.features) - 1}")
    drawn = []
    for path in images:
        try:
            drawn.append(picture(np.frombuffer(path.read_bytes(), np.uint8), grey16=here.about.get("grey16_range")))
        except BadImage as error:
            raise ValueError(f"{path} cannot be decoded: {error}") from None
    vectors = [torch.tensor(np.asarray(here.features[row])) for row in rows]
    if images:
        vectors = [*embed_files(images, here.about, run), *vectors]
    drawn += [pictures.of(row) for row in rows]
    return torch.stack(vectors), drawn, [*map(str, images), *(f"row {row}: {pictures.name(row)}" for row in rows)]


def embed_files(images: Sequence[Path], about: dict[str, Any], run: str | None) -> list[torch.Tensor]:
    """Features [D] of each image file, made as those of the folder were: from a shard, by the same pipeline.

    ValueError when the encoder is not the one that made them.
    """
    mean, std = (tuple(each) for each in about["mean_std"])
    size = about["image_size"]
    loaded = load_encoder(run or about["run"], untrained=about["untrained"], image_size=size, mean_std=(mean, std))
    module = loaded.part(about["features"])
    if weights_hash(module) != about["encoder"]:
        raise ValueError(
            f"{loaded.name} at step {loaded.step} is not the encoder of these features, which was {about['run']} at "
            f"step {about['step']}: name its checkpoint with --run, or embed again"
        )

    embed = embedding_by(module, torch.device("cpu"), about["precision"])
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(Path(folder) / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, path in enumerate(images):
                member = tarfile.TarInfo(f"{number:06d}.jpg")  # what it really is, its content says
                content = path.read_bytes()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        source = open_source(folder, cache_dir=folder)
        manifests = [replace(m, grey16_range=about.get("grey16_range")) for m in source.manifests]
        source = replace(source, manifests=tuple(manifests))
        batches = feature_batches(embed, source, CentralCrops(size, (mean, std), about["resize"]))
        vectors = [vector for batch in batches for vector in batch.features]
    if len(vectors) != len(images):
        raise ValueError(f"{len(images) - len(vectors)} of the {len(images)} --images cannot be read as training would")
    return vectors


def pairs_table(pairs: Pairs, one: Pictures, other: Pictures) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("row", "sample_id", "shard", "key", "label")
    writer.writerow(["similarity", *names, *(f"other_{name}" for name in names)])
    for similarity, a, b in zip(pairs.similarities.tolist(), pairs.first.tolist(), pairs.second.tolist()):
        writer.writerow([f"{similarity:.6f}", *one.about(a).values(), *other.about(b).values()])
    return text.getvalue()
