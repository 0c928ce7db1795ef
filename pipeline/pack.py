"""One shard: reads the images that were planned for it, verifies them, writes tar, index and record.

A shard is a pure function of its task, so it does not matter which process packs it, when, or how often. It is written beside its
final name and renamed when it is whole; the record that marks it as done comes last.
"""

import contextlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset
import xxhash
from PIL import Image

from pipeline.collect import Entry
from pipeline.index import BLOCK, Component, write_atomically, write_index
from pipeline.verify import Checked, Rejected, verify

PROGRESS: Any = None  # in a local worker: images and bytes done, a shared array that the bar reads


@dataclass(frozen=True)
class Options:
    """What decides the content of a shard."""

    no_verify: bool = False
    max_pixels: int = 100_000_000


class Item(NamedTuple):
    """An image of a shard: its number in the listing, its entry, its label."""

    number: int
    entry: Entry
    label: int | None


class Task(NamedTuple):
    name: str  # of the shard, without extension
    folder: str  # where it goes
    records: str  # where its record goes
    items: list[Item]
    options: Options


class _Sink:
    """The file that the tar goes to, hashed on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.hash = xxhash.xxh3_64()

    def write(self, block: bytes) -> int:
        self.hash.update(block)
        self.bytes += len(block)
        return self._file.write(block)


def pack(task: Task) -> dict[str, Any]:
    """Packs a shard and returns its record: samples, bytes, checksum, images of each label, what was rejected and why."""
    folder = Path(task.folder)
    tar = folder / f"{task.name}.tar"
    beside = folder / f".{task.name}.{os.getpid()}.tmp"
    pixel_guard, Image.MAX_IMAGE_PIXELS = (
        Image.MAX_IMAGE_PIXELS,
        None,
    )  # ours is `max_pixels`; Pillow's would warn below it
    try:
        with beside.open("wb", buffering=1 << 20) as file:
            sink = _Sink(file)
            record, index = _write(task, sink)
            file.flush()
            os.fsync(file.fileno())
        record |= {"bytes": sink.bytes, "checksum": f"xxh3_64:{sink.hash.hexdigest()}"}
        if record["samples"]:
            write_index(tar.with_suffix(".idx"), index)
            beside.replace(tar)
    finally:
        Image.MAX_IMAGE_PIXELS = pixel_guard
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    write_atomically(Path(task.records) / f"{task.name}.json", json.dumps(record).encode())
    return record


def _write(task: Task, sink: _Sink) -> tuple[dict[str, Any], list[list[Component]]]:
    rejected: list[dict[str, str]] = []
    labels: Counter[str] = Counter()
    index: list[list[Component]] = []
    image_bytes = position = 0
    writer = webdataset.TarWriter(sink, user="", group="", mode=0o644, mtime=0, encoder=False)
    with writer:
        for item in task.items:
            try:
                checked = _check(item, task.options)
            except Rejected as why:
                rejected.append({"name": item.entry.name, "reason": why.reason, "detail": why.detail})
                checked = None
            if checked is not None:
                sample: dict[str, Any] = {"__key__": sample_key(item), checked.extension: checked.data}
                if item.label is not None:
                    sample["cls"] = str(item.label).encode()
                    labels[str(item.label)] += 1
                writer.write(sample)
                components = []
                for extension in sorted(sample.keys() - {"__key__"}):
                    size = len(sample[extension])
                    components.append(Component(extension, position + BLOCK, size, f"{sample['__key__']}.{extension}"))
                    position += BLOCK + -(-size // BLOCK) * BLOCK
                index.append(components)
                image_bytes += len(checked.data)
            if PROGRESS is not None:
                with PROGRESS.get_lock():
                    PROGRESS[0] += 1
                    PROGRESS[1] += max(item.entry.size, 0)
        if writer.tarstream.offset != position:
            raise RuntimeError(f"{task.name}: the index says {position} bytes, the tar has {writer.tarstream.offset}")
    record = {"samples": len(index), "image_bytes": image_bytes, "labels": labels, "rejected": rejected}
    return record, index


def sample_key(item: Item) -> str:
    """The image's number in the listing, which makes it unique, and its name for the human reader, in letters that every tar reader takes."""
    stem = re.sub(r"^\d{9,}-", "", Path(item.entry.name).stem)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:64]
    return f"{item.number:09d}-{stem}"


def _check(item: Item, options: Options) -> Checked:
    entry = item.entry
    try:
        data = Path(entry.path).read_bytes()
    except FileNotFoundError:
        if entry.size < 0:
            raise Rejected("no such file") from None
        raise FileNotFoundError(
            f"{entry.path} has vanished since it was listed: put it back and run the same command again, "
            "or begin anew without it by --overwrite"
        ) from None
    if options.no_verify:
        return Checked(data, Path(entry.name).suffix[1:].lower(), 0, 0)
    return verify(data, max_pixels=options.max_pixels)
