"""A folder of features, as `transfer.embed` leaves it and the other commands read it.

    features.npy      float32 [N, D], as the encoder gives them; numpy.load(..., mmap_mode="r") takes no memory
    views.npy         float32 [N, V, D], those of augmented views, where asked for
    samples.parquet   a row for each of the N: sample_id, shard, key, label (empty for none), and labels (a list) where
                      the images have several; samples.csv where pyarrow is not installed
    embedding.json    what was embedded and how; written last, so that a folder that has it is whole

While it is being made, `parts/` holds a file for each range of ids that is done.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.files import write_atomically, writing_beside
from pipeline.reading.table import Row
from pipeline.sources.manifest import Source

ABOUT = "embedding.json"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embedding:
    """N images' features and what is known of each. The arrays of floats are mapped, not read."""

    folder: Path
    features: Floats  # [N, D]
    views: Floats | None  # [N, V, D]
    sample_ids: NDArray[np.int64]  # [N], ascending
    labels: NDArray[np.int64]  # [N], -1 for none
    label_lists: list[list[int]] | None  # of all N, where any has one
    about: dict[str, Any]  # embedding.json


class Part(NamedTuple):
    """The features of one range of ids, of the n images in it that decode."""

    features: Floats  # [n, D]
    views: Floats  # [n, V, D]
    sample_ids: NDArray[np.int64]  # [n]
    labels: NDArray[np.int64]  # [n], -1 for none
    shards: list[str]
    rows: list[Row]


# --- making one -------------------------------------------------------------------------------------------------------


def part_path(folder: Path, number: int) -> Path:
    return folder / "parts" / f"{number:08d}.npz"


def save_part(path: Path, part: Part) -> None:
    several = [json.dumps(row.labels) if row.labels is not None else "" for row in part.rows]
    with writing_beside(path) as file:
        np.savez(
            file,
            features=part.features,
            views=part.views,
            sample_ids=part.sample_ids,
            labels=part.labels,
            shards=np.array(part.shards, dtype=str),
            keys=np.array([readable(row.key) for row in part.rows], dtype=str),
            label_lists=np.array(several, dtype=str),
        )


def readable(name: str) -> str:
    """A name whose bytes are no UTF-8 cannot stand in a table as it is."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def shard_name(source: Source, m: int, shard: int) -> str:
    path = readable(source.manifests[m].shards[shard].path)
    return path if len(source.manifests) == 1 else f"{source.names[m]}/{path}"


def assemble(folder: Path, parts: int, about: dict[str, Any]) -> dict[str, Any]:
    """Makes one array and one table of all parts, then removes these. Needs the memory of one part. Returns what
    embedding.json says: `about` with samples and dimensions."""
    paths = [part_path(folder, number) for number in range(parts)]
    count, shapes, several = 0, set(), False
    for path in paths:
        with np.load(path) as part:
            count += len(part["sample_ids"])
            several = several or bool((part["label_lists"] != "").any())
            if len(part["sample_ids"]):
                shapes.add(part["views"].shape[1:])
    if not shapes:
        raise ValueError(f"nothing to keep in {folder}: none of the images decodes")
    views, dimensions = shapes.pop()
    assert not shapes, f"parts of different shapes: {shapes}"
    _join(paths, "features", folder / "features.npy", (count, dimensions))
    if views:
        _join(paths, "views", folder / "views.npy", (count, views, dimensions))
    _write_table(folder, paths, several)
    about = about | {"samples": count, "dimensions": dimensions}
    write_atomically(folder / ABOUT, json.dumps(about, indent=1).encode() + b"\n")
    cut_short = (folder / "parts").glob(".*.npz.*.tmp")  # by a kill, while they were written
    for path in [*paths, *cut_short, folder / "parts" / "settings.json"]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something of somebody else's lies in it
        (folder / "parts").rmdir()
    return about


def _join(paths: Sequence[Path], name: str, output: Path, shape: tuple[int, ...]) -> None:
    with writing_beside(output) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            with np.load(path) as part:
                if len(part["sample_ids"]):
                    file.write(np.ascontiguousarray(part[name], "<f4").data)


def _write_table(folder: Path, paths: Sequence[Path], several: bool) -> None:
    tables = _tables(paths, several)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        with writing_beside(folder / "samples.csv") as file:
            _write_csv(file, tables)
        return
    types = {"sample_id": pa.int64(), "shard": pa.string(), "key": pa.string(), "label": pa.int64()}
    schema = pa.schema(types | ({"labels": pa.list_(pa.int64())} if several else {}))
    with writing_beside(folder / "samples.parquet") as file, pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(pa.table(table, schema=schema))


def _tables(paths: Sequence[Path], several: bool) -> Iterator[dict[str, list[Any]]]:
    for path in paths:
        with np.load(path) as part:
            table: dict[str, list[Any]] = {
                "sample_id": part["sample_ids"].tolist(),
                "shard": part["shards"].tolist(),
                "key": part["keys"].tolist(),
                "label": [label if label >= 0 else None for label in part["labels"].tolist()],
            }
            if several:
                table["labels"] = [json.loads(text) if text else None for text in part["label_lists"].tolist()]
            yield table


def _write_csv(file: BinaryIO, tables: Iterator[dict[str, list[Any]]]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    for number, table in enumerate(tables):
        if not number:
            writer.writerow(table)
        writer.writerows(zip(*table.values()))
    text.detach()


# --- reading one ------------------------------------------------------------------------------------------------------


def open_embedding(folder: str | Path) -> Embedding:
    """Reads what `transfer.embed` wrote. FileNotFoundError when there is none or it is not whole yet, ValueError when
    its files do not belong together."""
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        begun = "is not whole yet: run the same `transfer.embed` again" if (folder / "parts").is_dir() else "is none"
        raise FileNotFoundError(
            f"{folder}, given as a folder of features, {begun}; `python -m transfer.embed --run RUN --data D "
            "--output DIR` makes one"
        )
    about = json.loads((folder / ABOUT).read_text())
    features = np.load(folder / "features.npy", mmap_mode="r")
    views = np.load(folder / "views.npy", mmap_mode="r") if (folder / "views.npy").is_file() else None
    columns = read_table(folder, ["sample_id", "label", "labels"])
    if not len(features) == len(columns["sample_id"]) == about["samples"]:
        raise ValueError(
            f"{folder}: {len(features):,} rows in features.npy, {len(columns['sample_id']):,} in the table, "
            f"{about['samples']:,} in {ABOUT}: files of different runs; embed again into an empty folder"
        )
    several = columns.get("labels")
    return Embedding(
        folder,
        features,
        views,
        np.array(columns["sample_id"], np.int64),
        np.array([-1 if label is None else label for label in columns["label"]], np.int64),
        None if several is None else [labels or [] for labels in several],
        about,
    )


def read_table(folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of the table of samples, those of `names` that it has; None for what is empty."""
    if (folder / "samples.parquet").is_file():
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise ValueError(
                f"{folder / 'samples.parquet'} needs pyarrow: pip install -e '.[parquet]' in the clone"
            ) from None
        with pq.ParquetFile(folder / "samples.parquet") as file:
            there = [name for name in names if name in file.schema_arrow.names]
            return dict(file.read(columns=there).to_pydict())
    with (folder / "samples.csv").open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        there = [name for name in names if name in header]
        columns: dict[str, list[Any]] = {name: [] for name in there}
        for row in reader:
            for name, cell in zip(header, row):
                if name in columns:
                    text = name in ("shard", "key")
                    columns[name].append(cell if text else json.loads(cell) if cell else None)
    return columns
