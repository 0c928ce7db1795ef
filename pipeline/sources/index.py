"""The places of all members inside a tar shard, and the `.idx` file that remembers them.

1. `index_tar` groups the members of a tar, in any order, into samples by webdataset's rule: the key is the path up to
   the first dot of the base name, the extension what follows that dot.
2. `format_index` gives the text format of DALI's `wds2idx`, v1.2, which `fn.readers.webdataset` reads too: a line
   `v1.2 N`, then for each sample `extension offset size name` of each of its members, offsets in bytes to the data.
3. `read_index` turns that text into arrays: 4 ms for a shard of 10,000 samples. Keys stay in the file and are looked
   up one at a time by `sample_key`, since only log lines need them.
"""

import itertools
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from pipeline.pixels.formats import EXTENSIONS as IMAGE_EXTENSIONS
from pipeline.sources.tar import BLOCK, Member, lacks_end, walk_tar

LABEL_EXTENSION = "cls"
LABEL_LISTS = "labels.json"  # the member in which make_shards keeps several labels of one image
LONGEST_INTEGER = 18  # digits of an offset or size in an index; the sum of two fits into an int64
CLASSIFIED_TOGETHER = 1 << 16  # components of an index, to bound memory

# webdataset's base_plus_ext: a base name that starts with a dot (hidden files, macOS's ._x.jpg) belongs to no sample.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class NoImages(ValueError):
    """A whole tar, but with nothing in it to learn from."""


class Component(NamedTuple):
    """One member of a sample: its extension without the dot, where its data lies in the tar (bytes), its full name."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Index:
    """Where the images and labels of a shard's n samples lie in the tar, in bytes; -1 where a sample has no `.cls`."""

    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    label_offsets: np.ndarray  # int64 [n]
    label_sizes: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.offsets)


def image_rank(extension: str) -> int:
    """How good a candidate for the sample's image an extension is: 0 is best, -1 not an image. In any case, lower or
    upper; `seg.png` comes after every plain extension."""
    extension = extension.lower()
    if extension in IMAGE_EXTENSIONS:
        return IMAGE_EXTENSIONS.index(extension)
    last = extension.rpartition(".")[2]
    return len(IMAGE_EXTENSIONS) + IMAGE_EXTENSIONS.index(last) if last in IMAGE_EXTENSIONS else -1


def index_tar(tar: str | Path | np.ndarray, kinds: Counter[str] | None = None) -> list[list[Component]]:
    """The samples of a tar that have an image, in the order in which their first members come.

    Takes a path or the tar's bytes. A key that comes again with an extension it already had (two tars concatenated)
    begins a new sample. Sparse members are left out: their bytes in the tar are not those of the file. `kinds` counts
    the members of each kind, and "no end" when `lacks_end`. ValueError, with the remedy, for a tar that is compressed,
    cut short or damaged; NoImages.
    """
    label = str(tar) if isinstance(tar, str | Path) else "the tar"
    kinds = Counter() if kinds is None else kinds
    if isinstance(tar, np.ndarray):
        samples = _group(_members(np.ascontiguousarray(tar).data, label, kinds), kinds)
    elif Path(tar).stat().st_size == 0:
        raise ValueError(f"{label} is an empty file: fetch or write it again")
    else:
        with Path(tar).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m, memoryview(m) as view:
            m.madvise(mmap.MADV_RANDOM)  # only headers are looked at: do not read the images between them ahead
            samples = _group(_members(view, label, kinds), kinds)
    with_image = [s for s in samples if any(image_rank(c.extension) >= 0 for c in s)]
    if not with_image:
        found = sorted({c.extension for s in samples for c in s})[:8]
        what = f"its members have the extensions {', '.join(found)}" if found else "it has no files with an extension"
        if kinds["link"]:
            what += f", and {kinds['link']} members are links without data: write it with "
            what += "`tar --dereference --hard-dereference`"
        if kinds["sparse"]:
            what += f", and {kinds['sparse']} members are sparse files: write it with `tar` without `--sparse`"
        raise NoImages(f"no images in {label}: {what}; images are {' '.join(IMAGE_EXTENSIONS)}")
    return with_image


def _members(data: memoryview, label: str, kinds: Counter[str]) -> Iterator[Member]:
    reached = 0
    for member in walk_tar(lambda offset, size: bytes(data[offset : offset + size]), 0, len(data), label):
        reached = member.offset + member.size
        yield member
    kinds["no end"] += lacks_end(reached, len(data))


def _group(members: Iterator[Member], kinds: Counter[str]) -> list[list[Component]]:
    """Samples by key, however their members are spread over the tar."""
    samples: list[dict[str, Component]] = []  # of each, its components by extension
    current: dict[str, dict[str, Component]] = {}
    for member in members:
        kinds[member.kind] += 1
        match = _KEY.fullmatch(member.name) if member.kind == "file" else None
        if match is None:
            continue
        key, extension = match.groups()
        sample = current.get(key)
        if sample is None or extension in sample:
            sample = current[key] = {}
            samples.append(sample)
        sample[extension] = Component(extension, member.offset, member.size, member.name)
    return [list(sample.values()) for sample in samples]


# --- the .idx file ----------------------------------------------------------------------------------------------------


def format_index(samples: Sequence[Sequence[Component]]) -> bytes:
    """The text of the `.idx`. White space in a name (it would break DALI's parser) is written as in a URL."""
    lines = [f"v1.2 {len(samples)}\n"]
    for sample in samples:
        lines.append(" ".join(f"{_quote(c[0])} {c[1]} {c[2]} {_quote(c[3])}" for c in sample) + "\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def _quote(name: str) -> str:
    return re.sub(r"[\s%]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), name)


def read_index(content: bytes, *, samples: int = -1, size: int = -1, label: str = "the index") -> Index:
    """Arrays from the text of an `.idx`; samples without an image are left out.

    A sample's label is its component `cls`, or else the only one whose extension ends so (`label.cls`). `samples` and
    `size` (bytes of the tar) are what the manifest says, -1 when unknown; ValueError when it disagrees.
    """
    text = np.frombuffer(content, dtype=np.uint8)
    head = content[: content.find(b"\n", 0, 40) + 1]
    version, _, count = head.partition(b" ")
    if version != b"v1.2" or not count.strip().isdigit() or not content.endswith(b"\n"):
        raise ValueError(f"{label} is not a whole index of version v1.2: delete it to have it built again")
    separators = np.flatnonzero((text == ord(" ")) | (text == ord("\n")))
    separators = separators[separators >= len(head) - 1]
    starts, ends = separators[:-1] + 1, separators[1:]  # of the tokens
    line_ends = np.flatnonzero(text[ends] == ord("\n"))  # token number that closes each line
    tokens_before = np.concatenate([[0], line_ends + 1])
    if len(line_ends) != int(count) or (tokens_before % 4).any():
        raise ValueError(
            f"{label} is damaged: {len(line_ends)} lines for {int(count)} samples, or names with spaces; "
            "delete it to have it built again"
        )
    lines = np.repeat(np.arange(len(line_ends)), np.diff(tokens_before) // 4)  # line of each component
    offsets = _integers(text, starts[1::4], ends[1::4], label)
    sizes = _integers(text, starts[2::4], ends[2::4], label)
    rank, label_rank = _classify(text, starts[0::4], ends[0::4])

    # The best image of each line: sort its components by rank, keep the first. Lines come out in order.
    images = np.flatnonzero(rank >= 0)
    images = images[np.lexsort((rank[images], lines[images]))]
    rows, first = np.unique(lines[images], return_index=True)
    images = images[first]
    of_row = np.full(len(line_ends), -1, np.int64)  # the component that is the label
    for wanted in (1, 0):
        candidates = np.flatnonzero(label_rank == wanted)
        with_one, first, times = np.unique(lines[candidates], return_index=True, return_counts=True)
        chosen = times == 1 if wanted else np.ones(len(times), bool)
        of_row[with_one[chosen]] = candidates[first[chosen]]
    of_row = of_row[rows]
    has_label = of_row >= 0
    index = Index(
        offsets[images],
        sizes[images],
        np.where(has_label, offsets[of_row], -1),
        np.where(has_label, sizes[of_row], -1),
    )
    if samples >= 0 and len(index) != samples:
        raise ValueError(
            f"{label} has {len(index):,} samples, the manifest says {samples:,}: they do not belong together; "
            "fetch both again, or delete them to have them rebuilt"
        )
    if size >= 0:
        reach, least = int((offsets + sizes).max(initial=0)), int(offsets.min(initial=BLOCK))
        if reach > size:
            raise ValueError(
                f"{label} reaches to byte {reach:,} of a tar of {size:,} bytes: it belongs to another tar; "
                "delete the manifest and the index to have them rebuilt"
            )
        if least < BLOCK:
            raise ValueError(
                f"{label} is damaged: data at byte {least}, inside the first header of a tar; "
                "delete it to have it built again"
            )
    return index


def _integers(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, label: str) -> np.ndarray:
    values = np.zeros(len(starts), np.int64)
    if not len(starts):
        return values
    widths = ends - starts
    right = int(widths.min()) >= 1 and int(widths.max()) <= LONGEST_INTEGER
    for i in range(int(widths.max()) if right else 0):
        inside = starts + i < ends
        digit = text[np.where(inside, starts + i, 0)].astype(np.int64) - ord("0")
        right = right and not ((digit < 0) | (digit > 9))[inside].any()
        values = np.where(inside, values * 10 + digit, values)
    if not right:
        raise ValueError(
            f"{label} is damaged: an offset or size is not a number of 1 to {LONGEST_INTEGER} digits; "
            "delete it to have it built again"
        )
    return values


def _classify(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`image_rank` of each component; and 0 for a `cls`, 1 for another extension that ends so, -1 for others. Each of
    the shard's few extensions is looked at once."""
    ranks, label_ranks = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    for low in range(0, len(starts), CLASSIFIED_TOGETHER):
        part = slice(low, low + CLASSIFIED_TOGETHER)
        width = max(1, min(int((ends[part] - starts[part]).max()), 64))
        # The last letters of each: what comes last says what a member is.
        positions = ends[part][:, None] - np.arange(width, 0, -1)
        letters = np.where(positions >= starts[part][:, None], text[np.maximum(positions, 0)], ord(" "))
        kinds, kind_of = np.unique(
            np.ascontiguousarray(letters.astype(np.uint8)).view(f"S{width}").ravel(), return_inverse=True
        )
        names = [kind.decode("utf-8", "replace").lstrip(" ") for kind in kinds]
        ranks[part] = np.array([image_rank(name) for name in names], np.int64)[kind_of]
        label_ranks[part] = np.array([_label_rank(name) for name in names], np.int64)[kind_of]
    return ranks, label_ranks


def _label_rank(extension: str) -> int:
    if extension.lower() == LABEL_EXTENSION:
        return 0
    return 1 if extension.lower().rpartition(".")[2] == LABEL_EXTENSION else -1


def read_components(content: bytes) -> Iterator[list[Component]]:
    """The members of each row of `read_index(content)`, in its order. Slow beside it: for tables and log lines."""
    for line in content.decode("utf-8", "surrogateescape").split("\n")[1:]:
        tokens = line.split(" ")
        if any(image_rank(extension) >= 0 for extension in tokens[::4]):
            texts = [unquote(token, errors="surrogateescape") for token in tokens]
            yield [
                Component(extension, int(offset), int(size), name)
                for extension, offset, size, name in zip(texts[::4], texts[1::4], texts[2::4], texts[3::4])
            ]


def key_of(name: str) -> str:
    """The key of a member: its name up to the first dot of its base name."""
    match = _KEY.fullmatch(name)
    return match[1] if match else name


def sample_key(content: bytes, row: int) -> str:
    """The key of a row of `read_index(content)`."""
    return key_of(next(itertools.islice(read_components(content), row, None))[0].name)
