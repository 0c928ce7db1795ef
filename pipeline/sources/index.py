"""What lies where inside a tar shard, and the `.idx` file that remembers it.

1. `index_tar` walks the headers of a tar (USTAR, GNU and PAX; members in any order) and groups its members into samples
   by webdataset's rule: the key is the path up to the first dot of the base name, the extension what follows that dot.
2. `format_index` gives the text format of DALI's `wds2idx`, v1.2, which `fn.readers.webdataset` reads too: a line
   `v1.2 N`, then for each sample `extension offset size name` of each of its members, offsets in bytes to the data.
3. `read_index` turns that text into arrays: 4 ms for a shard of 10,000 samples. Keys stay in the file and are looked
   up one at a time by `sample_key`, since only log lines need them.
"""

import itertools
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from pipeline.pixels.formats import EXTENSIONS as IMAGE_EXTENSIONS

LABEL_EXTENSION = "cls"
BLOCK = 512

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


def index_tar(tar: str | Path | np.ndarray) -> list[list[Component]]:
    """The samples of a tar that have an image, in the order in which their first members come.

    Takes a path or the tar's bytes. A key that comes again with an extension it already had (two tars concatenated)
    begins a new sample. ValueError, with the remedy, for a tar that is compressed, cut short or damaged; NoImages.
    """
    label = str(tar) if isinstance(tar, str | Path) else "the tar"
    if isinstance(tar, np.ndarray):
        samples, links = _group(_walk(np.ascontiguousarray(tar).data, label))
    elif Path(tar).stat().st_size == 0:
        raise ValueError(f"{label} is an empty file: fetch or write it again")
    else:
        with Path(tar).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m, memoryview(m) as view:
            m.madvise(mmap.MADV_RANDOM)  # only headers are looked at: do not read the images between them ahead
            samples, links = _group(_walk(view, label))
    with_image = [s for s in samples if any(image_rank(c.extension) >= 0 for c in s)]
    if not with_image:
        found = sorted({c.extension for s in samples for c in s})[:8]
        what = f"its members have the extensions {', '.join(found)}" if found else "it has no files with an extension"
        if links:
            what += (
                f", and {links} members are links without data: write it with `tar --dereference --hard-dereference`"
            )
        raise NoImages(f"no images in {label}: {what}; images are {' '.join(IMAGE_EXTENSIONS)}")
    return with_image


def _group(members: Iterator[tuple[str, int, int, bytes]]) -> tuple[list[list[Component]], int]:
    """Samples by key, however their members are spread over the tar; and the number of links, which hold no data."""
    samples: list[list[Component]] = []
    current: dict[str, list[Component]] = {}
    links = 0
    for name, offset, size, kind in members:
        if kind in b"12":
            links += 1
            continue
        match = _KEY.fullmatch(name)
        if match is None or kind not in b"0\x007":
            continue
        key, extension = match.groups()
        sample = current.get(key)
        if sample is None or any(c.extension == extension for c in sample):
            sample = current[key] = []
            samples.append(sample)
        sample.append(Component(extension, offset, size, name))
    return samples, links


def _walk(data: memoryview, label: str) -> Iterator[tuple[str, int, int, bytes]]:
    """Yields (name, data offset, data size, type flag) of every member, with PAX and GNU long names applied."""
    if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd" or data[:3] == b"BZh" or data[:6] == b"\xfd7zXZ\x00":
        raise ValueError(
            f"{label} is compressed, so single images in it cannot be reached (and images do not get smaller): "
            "unpack it once, e.g. `gunzip shard.tar.gz`"
        )
    position, end = 0, len(data)
    extended: dict[str, str] = {}
    overall: dict[str, str] = {}
    while position + BLOCK <= end:
        header = bytes(data[position : position + BLOCK])
        if header == bytes(BLOCK):
            return  # end of archive: what may follow is padding
        size = _number(header[124:136])
        stored = _number(header[148:156])
        if stored != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
            raise ValueError(f"{label} is not a tar or is damaged: no valid header at byte {position:,} of {end:,}")
        kind = header[156:157]
        name = _text(header[:100])
        if (
            header[257:263] == b"ustar\0" and header[345] != 0
        ):  # GNU's magic is "ustar " and its bytes 345 on mean other things
            name = _text(header[345:500]) + "/" + name
        begin = position + BLOCK
        if kind not in b"xgLK":
            name = extended.get("path", overall.get("path", name))
            size = int(extended.get("size", size))
        if kind in b"123456":  # links, devices, folders: nothing follows the header whatever the size says
            size = 0
        position = begin + (size + BLOCK - 1) // BLOCK * BLOCK
        if begin + size > end:
            raise ValueError(
                f"{label} is cut short: {name} reaches to byte {begin + size:,} of {end:,}; fetch or write it again"
            )
        if kind in b"xg":
            (extended if kind == b"x" else overall).update(_pax_records(bytes(data[begin : begin + size])))
        elif kind == b"L":
            extended["path"] = _text(bytes(data[begin : begin + size]))
        elif kind != b"K":
            yield name, begin, size, kind
            extended = {}
    if position > end or end == 0:
        raise ValueError(f"{label} is cut short at byte {end:,}; fetch or write it again")
    # No end-of-archive blocks: some writers leave them out, and a killed one too; the manifest's byte count tells
    # which.


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """An octal number, or GNU's base 256 for sizes of 8 GiB and more; -1 when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _pax_records(block: bytes) -> dict[str, str]:
    records, position = {}, 0
    while position < len(block):
        digits, _, _ = block[position : position + 24].partition(b" ")
        if not digits.isdigit() or int(digits) == 0:
            break
        keyword, _, value = block[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        records[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += int(digits)
    return records


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

    `samples` and `size` (bytes of the tar) are what the manifest says, -1 when unknown; ValueError when it disagrees.
    """
    text = np.frombuffer(content, dtype=np.uint8)
    head = content[: content.find(b"\n") + 1]
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
    rank, is_label = _classify(text, starts[0::4], ends[0::4])

    # The best image of each line: sort its components by rank, keep the first. Lines come out in order.
    images = np.flatnonzero(rank >= 0)
    images = images[np.lexsort((rank[images], lines[images]))]
    rows, first = np.unique(lines[images], return_index=True)
    images = images[first]
    labels = np.flatnonzero(is_label)
    of_line = np.full(len(line_ends), -1, np.int64)
    of_line[lines[labels]] = labels
    of_row = of_line[rows]
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
    reach = int((offsets + sizes).max(initial=0))
    if size >= 0 and reach > size:
        raise ValueError(
            f"{label} reaches to byte {reach:,} of a tar of {size:,} bytes: it belongs to another tar; "
            "delete the manifest and the index to have them rebuilt"
        )
    return index


def _integers(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, label: str) -> np.ndarray:
    values = np.zeros(len(starts), np.int64)
    if not len(starts):
        return values
    width = int((ends - starts).max())
    for i in range(width):
        inside = starts + i < ends
        digit = text[np.where(inside, starts + i, 0)].astype(np.int64) - ord("0")
        if ((digit < 0) | (digit > 9))[inside].any():
            raise ValueError(f"{label} is damaged: an offset or size is not a number; delete it to have it built again")
        values = np.where(inside, values * 10 + digit, values)
    return values


def _classify(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`image_rank` of each component, and whether it is the label: each of the shard's few extensions is looked at
    once."""
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, bool)
    width = min(int((ends - starts).max()), 64)
    positions = starts[:, None] + np.arange(width)
    letters = np.where(positions < ends[:, None], text[np.minimum(positions, len(text) - 1)], 0).astype(np.uint8)
    kinds, kind_of = np.unique(np.ascontiguousarray(letters).view(f"S{width}").ravel(), return_inverse=True)
    names = [kind.decode("utf-8", "replace") for kind in kinds]
    rank = np.array([image_rank(name) for name in names], np.int64)
    is_label = np.array([name.lower() == LABEL_EXTENSION for name in names], bool)
    return rank[kind_of], is_label[kind_of]


def sample_key(content: bytes, row: int) -> str:
    """The key of a row of `read_index(content)`: the member's name up to the first dot of its base name."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")[1:]
    with_image = (line.split(" ") for line in lines if any(image_rank(e) >= 0 for e in line.split(" ")[::4]))
    name = unquote(next(itertools.islice(with_image, row, None))[3], errors="surrogateescape")
    match = _KEY.fullmatch(name)
    return match[1] if match else name
