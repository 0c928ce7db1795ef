"""The images that were found, as a file: a line each, beside an array of where the lines begin.

A listing of any length costs the memory of one folder, and image i is found in one look.
"""

import json
import mmap
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.files import write_atomically
from pipeline.pixels.formats import EXTENSIONS as IMAGE_EXTENSIONS
from pipeline.sources.index import LABEL_EXTENSION

MOST_CLASSES = 1_000_000  # folders at one depth; beyond that they are no classes


class ListedImage(NamedTuple):
    """One image that was found."""

    path: str  # the file, archive or URL that holds the bytes
    offset: int  # of the first byte in an archive; -1: the file is the image
    size: int  # stored bytes; -1: not known, or not there when it was listed
    name: str  # relative to the source: for the key, for messages
    label: str | None = None  # None: the folder may say
    columns: dict[str, Any] | None = None  # written as key.json
    sidecars: list[tuple[str, int, int]] | None = None  # other members of a WebDataset sample: extension, offset, size
    packing: int | None = None  # how a member of a zip archive is packed: 0 stored, 8 deflated, -1 encrypted


@dataclass
class Survey:
    """What is learned about a source while its images are listed."""

    ignored: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension
    root: list[str] | None = None  # the folders that all images have in common
    depths: Counter[int] = field(default_factory=Counter)  # images by the number of folders above them
    folders: list[dict[str, None]] = field(default_factory=list)  # names of the folders at each depth
    labels: dict[str, None] = field(default_factory=dict)  # labels that a list or an archive gave
    classes: list[str] = field(default_factory=list)  # their names in order, where the source says

    def add(self, image: ListedImage) -> None:
        if image.label is not None:
            self.labels[image.label] = None
            return
        folders = image.name.split("/")[:-1]
        self.depths[len(folders)] += 1
        if self.root is None:
            self.root = folders
        elif folders[: len(self.root)] != self.root:
            same = (a == b for a, b in zip(folders, self.root))
            self.root = self.root[: next((i for i, equal in enumerate(same) if not equal), len(folders))]
        for depth, folder in enumerate(folders):
            if depth == len(self.folders):
                self.folders.append({})
            if len(self.folders[depth]) <= MOST_CLASSES:
                self.folders[depth][folder] = None

    def class_depth(self) -> int:
        """At which depth the folders are classes: below those that all images share; -1 when images lie beside them."""
        depth = len(self.root or [])
        if self.labels or depth >= len(self.folders) or self.depths[depth] or len(self.folders[depth]) > MOST_CLASSES:
            return -1
        return depth


def is_image_name(name: str) -> bool:
    return extension(name) in IMAGE_EXTENSIONS


def extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122 (a string operation, a million times)


def file_size(path: str) -> int:
    """-1 for what is no file, such as a link to nowhere: it is found, and rejected when it is packed."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a million times)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


class Listing:
    """Entries on disk. `sizes` is int64 [n], -1 where unknown; `listing[i]` reads one image."""

    def __init__(self, folder: Path) -> None:
        self.summary: dict[str, Any] = json.loads((folder / "listing.json").read_text())
        table = folder / "listing.bin"
        empty = not table.stat().st_size
        self._table = np.empty((0, 2), np.int64) if empty else np.memmap(table, np.int64, "r").reshape(-1, 2)
        with (folder / "listing.jsonl").open("rb") as file:
            self._lines = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.classes: list[str] = self.summary["classes"]
        self._number = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> ListedImage:
        begin = int(self._table[i, 0])
        end = int(self._table[i + 1, 0]) if i + 1 < len(self) else len(self._lines)
        return ListedImage(*json.loads(self._lines[begin:end]))

    @property
    def sizes(self) -> np.ndarray:
        return self._table[:, 1]

    def label(self, image: ListedImage) -> int | None:
        """The number of the image's class; None when it has none, or brings its own as a member of its sample."""
        if image.label is not None:
            return int(image.label) if self.summary["labels_are_numbers"] else self._number[image.label]
        depth = self.summary["class_depth"]
        return None if depth < 0 else self._number[image.name.split("/")[depth]]

    @staticmethod
    def write(
        folder: Path, images: Iterable[ListedImage], survey: Survey, *, classes: list[str], labels: bool
    ) -> "Listing":
        """Writes the listing of `images`; listing.json comes last, so that a listing that has one is whole.

        `classes` gives the numbers of the labels (empty: their sorted order; labels that are all numbers stay what they
        are). `labels` False leaves them out. ValueError for a label that is not among `classes`.
        """
        digest = xxhash.xxh3_64()
        encode = json.JSONEncoder(separators=(",", ":"), default=str).encode
        position = total = count = 0
        rows = array("q")
        with (folder / "listing.jsonl").open("wb") as lines, (folder / "listing.bin").open("wb") as table:
            for image in images:
                if not labels:
                    sidecars = image.sidecars and [part for part in image.sidecars if part[0] != LABEL_EXTENSION]
                    image = image._replace(label=None, sidecars=sidecars or None)
                survey.add(image)
                where, what = encode(image.path), encode(image[1:])
                digest.update(what.encode())  # not the place: the same images elsewhere are the same input
                line = f"[{where},{what[1:]}\n".encode()
                rows.extend((position, image.size))
                lines.write(line)
                position += len(line)
                total += max(image.size, 0)
                count += 1
                if len(rows) >= 1 << 16:
                    table.write(rows.tobytes())
                    rows = array("q")
            table.write(rows.tobytes())
        depth = survey.class_depth() if labels else -1
        named = list(survey.labels) or (list(survey.folders[depth]) if depth >= 0 else [])
        # More digits than a class number has are a name: a taxon's, a product's.
        numbers = bool(survey.labels) and not classes and all(name.isdecimal() and len(name) < 10 for name in named)
        if classes and (unknown := sorted(set(named) - set(classes))):
            raise ValueError(f"{len(unknown)} labels are not among the {len(classes)} classes, the first: {unknown[0]}")
        if not classes:
            classes = sorted(named, key=int if numbers else None) if named or not labels else survey.classes
        summary = {
            "images": count,
            "bytes": total,
            "classes": classes,
            "class_depth": depth,
            "labels_are_numbers": numbers,
            "ignored": survey.ignored,
            "digest": digest.hexdigest(),
        }
        write_atomically(folder / "listing.json", json.dumps(summary).encode())
        return Listing(folder)
