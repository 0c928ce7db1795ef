"""The content of a source: images with their sidecars, and what all of them together say about labels."""

import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.files import is_remote
from pipeline.pixels.formats import EXTENSIONS as IMAGE_EXTENSIONS
from pipeline.progress import Progress
from pipeline.sources.index import LABEL_EXTENSION

MOST_CLASSES = 1_000_000  # folders at one depth; beyond that they are no classes
MOST_KINDS = 50  # named in one line
# img2dataset writes a shard as the folder 00012, with the images 000120000.jpg and so on in it; beside the folder lie
# 00012_stats.json and 00012.parquet.
IMG2DATASET_FOLDER = re.compile(r"\d{5}")
IMG2DATASET_BESIDE = re.compile(r"\d{5}(_stats\.json|\.parquet)")


class Sidecar(NamedTuple):
    """A file that belongs to an image, and goes into its sample under `extension`."""

    extension: str
    offset: int  # of the first byte in the image's archive; -1: a file beside the image
    size: int  # stored bytes; -1: not known
    file: str = ""  # its name in the image's folder, where it is a file of its own
    packing: int | None = None  # as the image's


class ListedImage(NamedTuple):
    """One image that was found."""

    path: str  # the file, archive or URL that holds the bytes
    offset: int  # of the first byte in an archive; -1: the file is the image
    size: int  # stored bytes; -1: not known, or not there when it was listed
    name: str  # relative to the source: for the key, for messages
    label: str | list[str] | None = None  # None: the folder may say
    columns: dict[str, Any] | None = None  # written as key.json
    sidecars: list[Sidecar] | None = None
    packing: int | None = None  # how a member of a zip archive is packed: 0 stored, 8 deflated, -1 encrypted


@dataclass
class Survey:
    """Facts about a source, learned while its images are listed."""

    progress: Progress = field(default_factory=lambda: Progress(""))  # counts images as they are found
    images: int = 0
    ignored: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension
    root: list[str] | None = None  # the folders that all images have in common
    depths: Counter[int] = field(default_factory=Counter)  # images by the number of folders above them
    folders: list[dict[str, None]] = field(default_factory=list)  # names of the folders at each depth
    labels: dict[str, None] = field(default_factory=dict)  # labels that a list or an archive gave
    classes: list[str] = field(default_factory=list)  # their names in order, where the source says
    sidecars: Counter[str] = field(default_factory=Counter)  # what belongs to images, by extension
    with_sidecars: int = 0  # images that have some
    first_with_sidecars: str = ""
    own_labels: int = 0  # images that have a .cls
    tables: list[str] = field(
        default_factory=list
    )  # name, rows and bytes of each table that held the images themselves
    urls: bool = False  # whether some names are URLs, as in lists
    remarks: dict[str, list[Any]] = field(default_factory=dict)  # what to tell -> how often it was seen, the first time
    # Signs of folders that img2dataset made: a file that it puts beside them; names of images that begin with the name
    # of their folder; its first folders, with images that have a number for a name.
    beside_img2dataset: bool = False
    named_by_folder: bool = True
    named_by_number: bool = True

    def ignore(self, name: str) -> None:
        """Counts a file that is no image."""
        self.ignored[extension(name) or "no extension"] += 1
        self.beside_img2dataset |= IMG2DATASET_BESIDE.fullmatch(name.rpartition("/")[2]) is not None

    def remark(self, kind: str, example: str, count: int = 1) -> None:
        self.remarks.setdefault(kind, [0, example])[0] += count

    def add(self, image: ListedImage) -> None:
        self.images += 1
        if image.sidecars:
            self.first_with_sidecars = self.first_with_sidecars or image.name
            self.with_sidecars += 1
            self.sidecars.update(last_part(sidecar.extension) for sidecar in image.sidecars)
            self.own_labels += any(sidecar.extension == LABEL_EXTENSION for sidecar in image.sidecars)
        if image.label is not None:
            self.labels.update(dict.fromkeys([image.label] if isinstance(image.label, str) else image.label))
            return
        folders = image.name.split("/")[:-1]
        self.urls |= is_remote(image.name)
        self.depths[len(folders)] += 1
        if self.root is None:
            self.root = folders
        elif folders[: len(self.root)] != self.root:
            same = (a == b for a, b in zip(folders, self.root))
            self.root = self.root[: next((i for i, equal in enumerate(same) if not equal), len(folders))]
        if folders and IMG2DATASET_FOLDER.fullmatch(folders[-1]):
            stem = os.path.splitext(image.name.rpartition("/")[2])[0]  # noqa: PTH122
            self.named_by_folder &= stem.isdecimal() and stem.startswith(folders[-1])
            self.named_by_number &= stem.isdecimal() and len(stem) == 9
        for depth, folder in enumerate(folders):
            if depth == len(self.folders):
                self.folders.append({})
            if len(self.folders[depth]) <= MOST_CLASSES:
                self.folders[depth][folder] = None

    def remark_unlabelled(self) -> None:
        """To be called when no image has a label."""
        if self.sidecars:
            self.remark(
                f"images have sidecars ({listed_kinds(self.sidecars)}) and no label came of them: a label is a number "
                "in a .cls, or a value in a .json that --label_key names",
                self.first_with_sidecars,
                self.with_sidecars,
            )

    def class_depth(self) -> int:
        """At which depth the folders are classes: below those that all images share. -1 when images lie beside them,
        when labels come from elsewhere, or when the folders are something else."""
        depth = len(self.root or [])
        if self.labels or depth >= len(self.folders) or self.depths[depth] or len(self.folders[depth]) > MOST_CLASSES:
            return -1
        if self.urls and depth < 3:  # "http:", "", the host: hosts are no classes
            return -1
        example = f"{min(self.folders[depth])} of {len(self.folders[depth]):,}"
        if self._is_img2dataset(depth):
            self.remark("folders are shards of img2dataset, not classes", example, len(self.folders[depth]))
            return -1
        if self.own_labels:  # two ways of numbering would be mixed
            if self.own_labels < self.images:
                self.remark("images have a .cls, so the folders of the others are no classes", example, self.own_labels)
            return -1
        return depth

    def _is_img2dataset(self, depth: int) -> bool:
        """Whether the folders at this depth are shards of img2dataset, which are no classes."""
        names = self.folders[depth]
        if self.depths.keys() - {depth + 1} or not all(map(IMG2DATASET_FOLDER.fullmatch, names)):
            return False
        first_ones = self.named_by_number and max(map(int, names)) == len(names) - 1
        return self.beside_img2dataset or self.named_by_folder or first_ones


def is_image_name(name: str) -> bool:
    return extension(name) in IMAGE_EXTENSIONS


def extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122 (a string operation, a million times)


def listed_kinds(files: Mapping[str, int]) -> str:
    """Kinds of files and how many there are of each, the most frequent first."""
    kinds = [f"{count:,} {kind}" for kind, count in Counter(files).most_common()]
    more = f", {len(kinds) - MOST_KINDS:,} kinds more" if len(kinds) > MOST_KINDS else ""
    return ", ".join(kinds[:MOST_KINDS]) + more


def last_part(extension: str) -> str:
    """Says what a sidecar is: `cls` of `label.cls`."""
    return extension.rpartition(".")[2].lower()


def file_size(path: str) -> int:
    """-1 for what is no file, such as a link to nowhere: it is found, and rejected when it is packed."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a million times)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
