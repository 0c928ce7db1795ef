"""Parquet tables that hold the images themselves, as the Hugging Face hub keeps them and img2dataset writes them.

A row's bytes cannot be reached without decoding those before it, and packing wants the images in any order. So they are
written once, one behind the other, into files in DEST/.make_shards (`unpacked-000000.bin`), from where they are packed
as members of an archive are. This takes as much room as the images, until DEST is complete.
"""

import contextlib
import json
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline import files
from pipeline.files import is_remote
from pipeline.packing.lists import LABELS, as_label, missing_column
from pipeline.packing.parquet import opened_parquet
from pipeline.packing.survey import ListedImage, Survey
from pipeline.sources import remote

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")  # columns, in any case; the earliest counts
PIECE = 1 << 30  # bytes of one unpacked file
ROWS = 64  # in memory at a time


class Columns(NamedTuple):
    """Which columns of a table are what."""

    image: str  # "": it holds no images
    label: str  # "": none
    class_names: list[str]  # of the label's numbers, where the table says so
    others: list[str]  # kept as key.json
    left_out: list[str]  # bytes, which JSON cannot hold: a second image, a sound


class Unpacked:
    """The files that images of tables are written to, in a folder or at a URL; each appears when it is whole."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._number = self._size = 0
        self._place = ""
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, data: bytes) -> tuple[str, int]:
        """Where the bytes lie: the file, and the offset of the first."""
        if self._file is None or self._size + len(data) > PIECE:
            self._stack.close()
            files.make_folder(self._folder)
            self._place = files.join(self._folder, f"unpacked-{self._number:06d}.bin")
            self._file = self._stack.enter_context(files.writing(self._place))
            self._number, self._size = self._number + 1, 0
        offset = self._size
        self._file.write(data)
        self._size += len(data)
        return self._place, offset


def columns_of(place: str, *, image_key: str = "", label_key: str = "") -> Columns:
    """Reads the table's schema. ValueError when `image_key` or `label_key` is no fitting column of a table with
    images, or when none of several images is the one."""
    import pyarrow

    with opened_parquet(place) as file:
        schema = file.schema_arrow
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    blobs = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)

    def is_bytes(kind: Any) -> bool:
        return any(test(kind) for test in blobs)

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return holds_bytes(kind.value_type)
        return is_bytes(kind)

    def is_image(field: Any) -> bool:
        kind, said = field.type, features.get(field.name, {}).get("_type", "Image")  # an Audio has bytes too
        if pyarrow.types.is_struct(kind):
            return said == "Image" and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return is_bytes(kind) and (field.name.lower() in IMAGES or field.name == image_key)

    found = [field.name for field in schema if is_image(field)]
    if not found:
        return Columns("", "", [], [], [])
    named = sorted((name for name in found if name.lower() in IMAGES), key=lambda name: IMAGES.index(name.lower()))
    image = image_key or (named[0] if named else found[0] if len(found) == 1 else "")
    if not image:
        raise ValueError(f"{place} has several columns of images ({', '.join(found)}): name one by --image_key")
    if image not in found:
        raise ValueError(f"{place} has no images in `{image}` (--image_key); there are some in {', '.join(found)}")
    if label_key and label_key not in schema.names:
        raise ValueError(missing_column(place, label_key, schema.names))
    classes = {name: _class_names(feature) for name, feature in features.items()}
    known = {name.lower(): name for name in reversed(schema.names)}
    only = [name for name, names in classes.items() if names]
    label = label_key or next((known[name] for name in LABELS if name in known), only[0] if len(only) == 1 else "")
    rest = [field for field in schema if field.name not in (image, label)]
    left_out = [field.name for field in rest if holds_bytes(field.type)]
    others = [field.name for field in rest if field.name not in left_out]
    return Columns(image, label, classes.get(label, []), others, left_out)


def _class_names(feature: Any) -> list[str]:
    """The names of a ClassLabel, or of a list of them; [] of anything else."""
    if isinstance(feature, list):  # as older versions wrote lists
        feature = {"feature": feature[0]} if feature else {}
    if not isinstance(feature, dict):
        return []
    inside = feature.get("feature", feature)
    is_label = isinstance(inside, dict) and inside.get("_type") == "ClassLabel"
    return list(map(str, inside.get("names") or [])) if is_label else []


def entries(place: str, columns: Columns, survey: Survey, unpacked: Unpacked | None) -> Iterator[ListedImage]:
    """The images of a table, in its order, with its other columns.

    Without `unpacked` the images have neither place nor size: enough to know whether they are the same as before, for
    which bytes are read only where a row may have none. A row without an image is counted as a remark.
    """
    base = posixpath.basename(place)
    if columns.class_names:
        if survey.classes and survey.classes != columns.class_names:
            raise ValueError(f"{place} numbers its classes otherwise than the tables before it: pack them one by one")
        survey.classes = columns.class_names
    if columns.left_out:
        survey.remark("tables have columns of bytes, which are left out", f"{', '.join(columns.left_out)} in {base}")
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(_fetched(place)) if unpacked is not None and is_remote(place) else place
        file = stack.enter_context(opened_parquet(here))
        group_bytes = [_bytes_column(file.metadata.row_group(i), columns.image) for i in range(file.num_row_groups)]
        survey.tables.append(f"{base} {file.metadata.num_rows} {sum(size for size, _ in group_bytes)}")
        number = 0
        for group, (_, whole) in enumerate(group_bytes):
            reads_bytes = unpacked is not None or not whole
            for row in _rows(file, group, columns, reads_bytes):
                value = row.pop(columns.image, None)
                data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                name = posixpath.basename(str(path or row.get("key") or "")) or f"{base[:-8]}-{number:09d}"
                number += 1
                survey.progress.advance()
                if reads_bytes and data is None:
                    survey.remark("rows have no image", f"{name} in {base}")
                    continue
                found = row.pop(columns.label, None) if columns.label else None
                label = as_label(None if columns.class_names and found == -1 else found, f"{name} in {base}")
                others = {key: value for key, value in row.items() if value is not None} or None
                if unpacked is None or data is None:  # the latter where the bytes were not read
                    yield ListedImage(place, -1, -1, name, label, others)
                else:
                    where, offset = unpacked.add(data)
                    yield ListedImage(where, offset, len(data), name, label, others)


def _bytes_column(group: Any, image: str) -> tuple[int, bool]:
    """Bytes of the images in a row group, as stored, and whether every row is known to have some."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema in (image, f"{image}.bytes"):
            statistics = column.statistics
            whole = statistics is not None and statistics.has_null_count and statistics.null_count == 0
            return int(column.total_compressed_size), whole
    return 0, False


def _rows(file: Any, group: int, columns: Columns, reads_bytes: bool) -> Iterator[dict[str, Any]]:
    wanted = [*columns.others, *([columns.label] if columns.label else [])]
    is_struct = f"{columns.image}.path" in {file.schema.column(i).path for i in range(len(file.schema.names))}
    if reads_bytes:
        wanted.append(columns.image)
    elif is_struct:
        wanted.append(f"{columns.image}.path")
    if not wanted:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(ROWS, row_groups=[group], columns=wanted, use_threads=False):
        for row in batch.to_pylist():
            # Not a number: how pandas marks what is missing.
            yield {key: None if value != value else value for key, value in row.items()}


@contextlib.contextmanager
def _fetched(url: str) -> Iterator[str]:
    """A local copy, fetched in ranges that are tried again, until the block ends."""
    size, _ = remote.stat(url)
    with files.naming(tempfile.gettempdir()), tempfile.NamedTemporaryFile(prefix="make_shards-") as copy:
        fetcher = remote.Fetcher()
        try:
            fetcher.fetch(url, size, copy.fileno())
        finally:
            fetcher.close()
        yield str(Path(copy.name))
