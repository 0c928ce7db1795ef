"""Lists of images (text, CSV, Parquet) and files of labels. Both are read row by row."""

import codecs
import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from pipeline import files
from pipeline.files import is_remote, local_path
from pipeline.packing.parquet import opened_parquet
from pipeline.packing.survey import ListedImage, Survey, extension, file_size, is_image_name

# Names of columns, in any case; the earliest in the list that is there is taken.
PATHS = """path file filename file_name filepath file_path image image_path url uri name image_id imageid""".split()  # noqa: SIM905
LABELS = """label class target cls category synset class_name label_name predictionstring""".split()  # noqa: SIM905

LONGEST_CELL = 1 << 24  # characters; Python's own limit is less than some captions
Row = dict[str, Any]


def entries(place: str, survey: Survey, label_key: str = "", image_key: str = "") -> Iterator[ListedImage]:
    """The images of a list, in its order, with its other columns. Relative paths begin in the list's folder.

    `label_key` names the column of labels, `image_key` that of paths. A file that is not there has the size -1: it is
    counted, and rejected when it is packed.
    """
    folder = place.rpartition("/")[0] if is_remote(place) else str(local_path(place).resolve().parent)
    for row, path_column, label_column in rows(place, image_key):
        if label_key and label_key not in row:
            raise ValueError(missing_column(place, label_key, row))
        survey.progress.advance()
        label_column = label_key or label_column
        path = row.pop(path_column) or ""
        if not isinstance(path, str):
            raise ValueError(f"{place}: `{path_column}` holds {type(path).__name__}, neither paths nor images")
        label = row.pop(label_column, None) if label_column else None
        if path.startswith(("~/", "file://")):
            path = str(local_path(path))
        full = path if is_remote(path) or path.startswith("/") else f"{folder}/{path}"
        size = -1 if is_remote(full) else file_size(full)
        columns = {name: value for name, value in row.items() if value is not None} or None
        if label_key and isinstance(label, str) and label.startswith("["):  # a list in a text file
            with contextlib.suppress(ValueError):
                label = json.loads(label)
        yield ListedImage(full, -1, size, path, as_label(label, full), columns)


def missing_column(place: str, label_key: str, names: Iterable[str]) -> str:
    return f"{place} has no column `{label_key}` (--label_key); it has {', '.join(names)}"


def as_label(value: Any, where: str) -> str | list[str] | None:
    """A value of a table or of JSON as a label, or as a list of labels; None when it is missing.

    ValueError for what is neither.
    """
    if isinstance(value, list):
        return [str(label) for each in value if (label := as_label(each, where)) is not None]
    if isinstance(value, dict):
        raise ValueError(f"the label of {where} is {str(value)[:60]}: a text, a number or a list of them is needed")
    if isinstance(value, float) and value.is_integer():  # whole numbers beside missing ones, as pandas writes them
        value = int(value)
    return None if value in (None, "") else str(value)


def rows(place: str, image_key: str = "") -> Iterator[tuple[Row, str, str]]:
    """The rows of a list, with the names of the columns that hold path and label ("" when there is no label)."""
    if place.lower().endswith(".parquet"):
        yield from _parquet(place, image_key)
        return
    with _opened(place) as file:
        if place.lower().endswith(".txt"):
            for line in file:
                if line.strip():
                    path, label = _split(line.rstrip("\r\n"))
                    yield {"path": path, "label": label}, "path", "label"
            return
        reader = csv.reader(file, delimiter="\t" if place.lower().endswith(".tsv") else ",")
        lines = _lines(reader, place)
        first = next(lines, None)
        if first is None:
            return
        if any(is_image_name(cell) for cell in first):  # no header
            path_at = next(i for i, cell in enumerate(first) if is_image_name(cell))
            header = [f"column_{i}" for i in range(len(first))]
            header[path_at] = "path"
            if len(first) > 1:
                header[1 if path_at == 0 else 0] = "label"
            lines = itertools.chain([first], lines)
        else:
            header = first
        path_column, label_column = _columns(header, place, image_key)
        for cells in lines:
            if len(cells) != len(header):
                where = f"{place}, line {reader.line_num}"
                raise ValueError(f"{where}: {len(cells)} columns, {len(header)} in the first line")
            yield dict(zip(header, cells)), path_column, label_column


def _lines(reader: Any, place: str) -> Iterator[list[str]]:
    csv.field_size_limit(LONGEST_CELL)
    try:
        yield from (cells for cells in reader if any(map(str.strip, cells)))
    except csv.Error as error:
        raise ValueError(f"{place}, line {reader.line_num}: {error}") from None


def _split(line: str) -> tuple[str, str | None]:
    """`path`, `path<tab>label`, or, as Caffe's lists have it, `path.jpg 65`."""
    if "\t" in line:
        path, _, label = line.partition("\t")
        return path, label.strip()
    path, _, label = line.rpartition(" ")
    if label.isdecimal() and is_image_name(path):
        return path, label
    return line.strip(), None


def _columns(names: Sequence[str], place: str, image_key: str) -> tuple[str, str]:
    lower = {name.strip().lower(): name for name in reversed(names)}
    if image_key:
        path = image_key if image_key in names else None
    else:
        path = next((lower[name] for name in PATHS if name in lower), None)
    if path is None:
        wanted = f"no column `{image_key}` (--image_key)" if image_key else "no column of paths: name it by --image_key"
        raise ValueError(f"{place} has {wanted}; it has {', '.join(names)}")
    return path, next((lower[name] for name in LABELS if name in lower), "")


def _parquet(place: str, image_key: str) -> Iterator[tuple[Row, str, str]]:
    with opened_parquet(place) as file:
        path_column, label_column = _columns(file.schema_arrow.names, place, image_key)
        for batch in file.iter_batches(8192):
            for row in batch.to_pylist():
                # Not a number: how pandas marks what is missing.
                yield {k: None if v != v else v for k, v in row.items()}, path_column, label_column


def _opened(place: str) -> TextIO:
    if not is_remote(place) and not local_path(place).exists():
        raise FileNotFoundError(f"no such list: {place}")
    file: Any = io.BytesIO(files.read(place)) if is_remote(place) else local_path(place).open("rb")
    utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as Windows' PowerShell writes lists
    file.seek(0)
    # -sig: without the mark that Excel begins a file with.
    return io.TextIOWrapper(file, "utf-16" if utf16 else "utf-8-sig", "surrogateescape", newline="")


def labelled(images: Iterable[ListedImage], place: str) -> Iterator[ListedImage]:
    """The images with the labels of a file: names and labels, or labels alone in the order of the names.

    Names may be whole, without their folders, or without their extension. ValueError when an image has no label, or
    when the number of labels is another than that of images.
    """
    with _opened(place) as file:
        lines = [line.strip(" \r\n") for line in file if line.strip(" \t\r\n,")]  # a last column may be empty
    if not lines:
        raise ValueError(f"{place} is empty")
    if not any(mark in lines[0] for mark in " ,\t"):
        listed = sorted(images, key=lambda image: image.name)
        if len(listed) != len(lines):
            raise ValueError(
                f"{place} has {len(lines):,} labels and no names, for {len(listed):,} images: as many are needed"
            )
        yield from (image._replace(label=label) for image, label in zip(listed, lines))
        return
    table = dict(_names_and_labels(lines, place))
    for image in images:
        base = image.name.rpartition("/")[2]
        stem = base.removesuffix("." + base.rpartition(".")[2])
        known = next((name for name in (image.name, base, stem) if name in table), None)
        if known is None or not table[known]:
            raise ValueError(f"{place} has no label for {image.name}, among {len(table):,} as for {next(iter(table))}")
        yield image._replace(label=table[known])


def _names_and_labels(lines: list[str], place: str) -> Iterator[tuple[str, str]]:
    """Of `name label`; of columns with commas or tabs the named ones, else the first and what follows it.

    Of Kaggle's `name,n01440764 10 20 30 40` the first word.
    """
    mark = next((mark for mark in "\t," if mark in lines[0]), None)
    if mark is None:
        for line in lines:
            name, _, label = line.rpartition(" ")
            yield name.strip(), label
        return
    table = _lines(csv.reader(lines, delimiter=mark), place)
    first = next(table, [])
    header = [cell.strip().lower() for cell in first]
    name_at, label_at = (next((header.index(n) for n in names if n in header), -1) for names in (PATHS, LABELS))
    for cells in itertools.chain([first], table):
        if min(name_at, label_at) < 0:
            yield cells[0].strip(), _first_word(mark.join(cells[1:]))
        elif len(cells) == len(header):
            yield cells[name_at].strip(), _first_word(cells[label_at])
        else:
            raise ValueError(f"{place}: {len(cells)} columns in `{mark.join(cells)}`, {len(header)} in the first line")


def _first_word(label: str) -> str:
    words = label.split()
    return words[0] if len(words) > 1 and len(words) % 5 == 0 else label.strip()


def class_names(place: str) -> list[str]:
    """Class names in the order of their numbers: lines of a text file, or those of a manifest.json or of its folder."""
    if not is_remote(place) and local_path(place).is_dir():
        place = f"{place}/manifest.json"
    if extension(place) == "json":
        names = [str(name) for name in json.loads(files.read(place)).get("classes", [])]
    else:
        with _opened(place) as file:
            names = [line.strip() for line in file if line.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{place} names no classes" if not names else f"{place} names a class twice")
    return names
