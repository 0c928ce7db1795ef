"""What the inputs are: every image that a source names, in a fixed order, as a listing on disk.

1. `collect(src)` looks at what `src` is and yields one `Entry` an image: where its bytes lie, its name, its label.
2. `Listing.write` puts the entries into a file as they come, a line each, beside an array of where the lines begin and how many
   bytes the images have. So a listing of any length costs the memory of one folder, and entry i is found in one look.

Nothing here reads an image; what the files hold is found out by `pipeline.pack`.
"""

import json
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.index import IMAGE_EXTENSIONS, write_atomically
from pipeline.storage import is_remote


class Entry(NamedTuple):
    """One image that was found."""

    path: str  # the file, archive or URL that holds the bytes
    offset: int  # of the first byte in an archive; -1: the file is the image
    size: int  # stored bytes; -1: not known
    name: str  # relative to the source: for the key, for messages
    label: str | None = None
    columns: dict[str, Any] | None = None  # written as key.json
    beside: list[tuple[str, int, int]] | None = None  # other members of a WebDataset sample: extension, offset, size
    packing: int = (
        0  # 8: a deflated member of a zip archive, whose `offset` is that of its local header; 0: stored; -1 not a zip
    )


@dataclass
class Found:
    """What a source holds beside images."""

    ignored: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension
    labels_from_folders: bool = False
    in_root: int = 0  # images that lie in no class folder


def collect(src: str, found: Found) -> Iterator[Entry]:
    """Entries of a folder in sorted order. FileNotFoundError when there is no `src`."""
    path = Path(src).expanduser()
    if path.is_dir():
        found.labels_from_folders = True
        yield from _folder(path, "", found, ())
    elif not path.exists():
        raise FileNotFoundError(f"no such folder or file: {src}")
    else:
        raise ValueError(f"{src} is not a folder of images")


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS  # noqa: PTH122 (a string operation, a million times)


def _folder(root: Path, below: str, found: Found, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """The images below root/below; symbolic links are followed, but not into a folder that contains them."""
    folder = root / below
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as scan:
        names = sorted((item.name, item.is_dir()) for item in scan)
    for name, is_folder in names:
        relative = f"{below}/{name}" if below else name
        if is_folder:
            yield from _folder(root, relative, found, (*above, identity))
        elif not is_image_name(name):
            found.ignored[os.path.splitext(name)[1].lower() or "no extension"] += 1  # noqa: PTH122
        else:
            full = os.path.join(folder, name)  # noqa: PTH118
            try:
                size = os.stat(full).st_size  # noqa: PTH116
            except FileNotFoundError:
                size = -1  # a link to nowhere: found, and rejected when it is packed
            label = relative.split("/", 1)[0] if below else None
            found.in_root += label is None
            yield Entry(full, -1, size, relative, label)


class Listing:
    """Entries on disk. `sizes` is int64 [n], -1 where unknown; `listing[i]` reads one entry."""

    def __init__(self, folder: Path) -> None:
        self.summary: dict[str, Any] = json.loads((folder / "listing.json").read_text())
        table = folder / "listing.bin"
        self._table = (
            np.memmap(table, np.int64, "r").reshape(-1, 2) if table.stat().st_size else np.empty((0, 2), np.int64)
        )
        self._file = (folder / "listing.jsonl").open("rb")
        self._lines = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if len(self._table) else b""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> Entry:
        begin = int(self._table[i, 0])
        end = int(self._table[i + 1, 0]) if i + 1 < len(self) else len(self._lines)
        return Entry(*json.loads(self._lines[begin:end]))

    @property
    def sizes(self) -> np.ndarray:
        return self._table[:, 1]

    @property
    def classes(self) -> list[str]:
        return list(self.summary["classes"])

    @staticmethod
    def write(folder: Path, entries: Iterable[Entry], found: Found) -> "Listing":
        """Writes the listing of `entries`; listing.json comes last, so that a listing that has one is whole."""
        digest = xxhash.xxh3_64()
        labels: Counter[str] = Counter()
        position = total = count = 0
        rows = array("q")
        with (folder / "listing.jsonl").open("wb") as lines, (folder / "listing.bin").open("wb") as table:
            for entry in entries:
                line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
                digest.update(json.dumps([entry.name, entry.size, entry.label, entry.columns]).encode())
                rows.extend((position, entry.size))
                lines.write(line)
                position += len(line)
                total += max(entry.size, 0)
                count += 1
                if entry.label is not None:
                    labels[entry.label] += 1
                if len(rows) >= 1 << 16:
                    table.write(rows.tobytes())
                    rows = array("q")
            table.write(rows.tobytes())
        classes = sorted(labels)
        if found.labels_from_folders and (found.in_root or len(classes) < 2):
            classes = []  # one folder, or images beside the folders: these are not classes
        summary = {
            "images": count,
            "bytes": total,
            "classes": classes,
            "ignored": found.ignored,
            "digest": digest.hexdigest(),
        }
        write_atomically(folder / "listing.json", json.dumps(summary).encode())
        return Listing(folder)
