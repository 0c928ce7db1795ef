"""The images that were found, as a file: a line each, beside an array of where the lines begin.

A listing of any length costs the memory of its largest folder or archive, and image i is found in one look.
"""

import json
import mmap
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.files import write_atomically
from pipeline.packing.survey import ListedImage, Sidecar, Survey
from pipeline.sources.index import LABEL_EXTENSION


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
        image = ListedImage(*json.loads(self._lines[begin:end]))
        return image._replace(sidecars=[Sidecar(*each) for each in image.sidecars]) if image.sidecars else image

    @property
    def sizes(self) -> np.ndarray:
        return self._table[:, 1]

    def label(self, image: ListedImage) -> int | list[int] | None:
        """The number of the image's class, or of its classes when it has a list of labels; None when it has none, or
        brings its own as a member of its sample."""
        if isinstance(image.label, list):
            return list(map(self._class_number, image.label))
        if image.label is not None:
            return self._class_number(image.label)
        depth = self.summary["class_depth"]
        return None if depth < 0 else self._number[image.name.split("/")[depth]]

    def _class_number(self, label: str) -> int:
        return int(label) if self.summary["labels_are_numbers"] else self._number[label]

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
                    sidecars = [each for each in image.sidecars or () if each.extension != LABEL_EXTENSION]
                    image = image._replace(label=None, sidecars=sidecars or None)
                survey.add(image)
                where, what = encode(image.path), encode((_as_written(image) if image.sidecars else image)[1:])
                # Not the place: the same images elsewhere are the same input, unpacked from a table or still in it.
                digest.update((encode(image._replace(offset=-1, size=-1)[1:]) if survey.tables else what).encode())
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
        if labels and not named and not survey.own_labels:
            survey.remark_unlabelled()
        # More digits than a class number has are a name: a taxon's, a product's.
        numbers = bool(survey.labels) and not classes and all(name.isdecimal() and len(name) < 10 for name in named)
        if classes and (unknown := sorted(set(named) - set(classes))):
            raise ValueError(f"{len(unknown)} labels are not among the {len(classes)} classes, the first: {unknown[0]}")
        for told in survey.tables:
            digest.update(told.encode())
        named_numbers = numbers and bool(survey.classes) and max(map(int, named)) < len(survey.classes)
        if not classes:
            classes = sorted(named, key=int if numbers else None) if named or not labels else survey.classes
        summary = {
            "images": count,
            "bytes": total,
            "classes": classes,
            "class_depth": depth,
            "labels_are_numbers": numbers,
            "class_names": survey.classes if named_numbers else [],
            "ignored": survey.ignored,
            "remarks": survey.remarks,
            "digest": digest.hexdigest(),
        }
        write_atomically(folder / "listing.json", json.dumps(summary).encode())
        return Listing(folder)


def _as_written(image: ListedImage) -> ListedImage:
    """The sidecars of a tar without their last two fields, as they have always been: the digest stays what it was."""
    short = [each if each.file or each.packing is not None else each[:3] for each in image.sidecars or ()]
    return image._replace(sidecars=short)  # type: ignore[arg-type]
