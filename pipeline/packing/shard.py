"""One shard: fetches the images that were planned for it, verifies them, writes tar, index and record.

A shard is a pure function of its task, so it does not matter which process packs it, when, or how often. It is written
beside its final name and renamed when it is whole; the record that marks it as done comes last.
"""

import ctypes
import json
import posixpath
import re
import tarfile
from collections import Counter
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from pipeline import files
from pipeline.packing.fetch import FAILED, NO_HEADERS, Headers, fetch
from pipeline.packing.prepare import Options, Rejected, prepare
from pipeline.packing.survey import ListedImage
from pipeline.sources.index import BLOCK, LABEL_LISTS, Component, format_index

COUNTERS: "ctypes.Array[ctypes.c_longlong] | None" = None  # in a local worker: shared memory that the bar reads
COUNTER = 0  # where this worker counts its images; its bytes are counted in the next place


class PlannedImage(NamedTuple):
    """An image of a shard: its number in the listing, what the listing says, the number of its class or of several."""

    number: int
    image: ListedImage
    label: int | list[int] | None


class PackTask(NamedTuple):
    shard: str  # where the tar goes
    record: str  # where its record goes
    images: list[PlannedImage]
    options: Options
    headers: Headers = NO_HEADERS  # of requests for lines of a list; here, since a task is written nowhere


class HashTask(NamedTuple):
    output: str  # where the hashes go
    images: list[ListedImage]
    options: Options | None = None  # of perceptual hashes: an image that will be rejected has none
    headers: Headers = NO_HEADERS


class TaskDone(NamedTuple):
    """How many images a task was, how many of them could not be fetched, and the first of those."""

    images: int
    failed: int = 0
    first_failed: str = ""


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

    def tell(self) -> int:
        return self.bytes


def pack(task: PackTask) -> TaskDone:
    """Packs a shard.

    Its record: samples, bytes, checksum, images of each label, what was rejected and why. A shard of which nothing is
    left is not written.
    """
    with files.writing(task.shard) as file:
        sink = _Sink(file)
        record, index = _write(task, sink)
        record |= {"bytes": sink.bytes, "checksum": f"xxh3_64:{sink.hash.hexdigest()}"}
        files.write(task.shard.removesuffix(".tar") + ".idx", format_index(index))
    if not record["samples"]:
        files.remove(task.shard)
        files.remove(task.shard.removesuffix(".tar") + ".idx")
    files.write(task.record, json.dumps(record).encode())
    failed = [line for line in record["rejected"] if line["reason"] in FAILED]
    first = f"{failed[0]['name']}: {failed[0]['reason']}, {failed[0]['detail']}" if failed else ""
    return TaskDone(len(task.images), len(failed), first)


def _write(task: PackTask, sink: _Sink) -> tuple[dict[str, Any], list[list[Component]]]:
    rejected: list[dict[str, Any]] = []
    remarks: dict[str, list[Any]] = {}  # kind -> how many images it is said of, the first of them and what is said
    labels: Counter[str] = Counter()
    index: list[list[Component]] = []
    image_bytes = position = 0
    import webdataset  # brings torch: seconds that the parent process does not have to wait

    writer = webdataset.TarWriter(sink, user="", group="", mode=0o644, mtime=0, encoder=False)
    # TarWriter opens its tar as a stream in blocks of 10 kB and in PAX format: this one is USTAR, and twice as fast.
    writer.tarstream = tarfile.TarFile(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=1 << 20)  # type: ignore[arg-type,call-arg]

    def note(kind: str, detail: str) -> None:
        remarks.setdefault(kind, [0, f"{planned.image.name}: {detail}"])[0] += 1

    with writer:
        for planned, contents in zip(task.images, fetch((planned.image for planned in task.images), task.headers)):
            try:
                if isinstance(contents, Rejected):
                    raise contents
                data, extension = prepare(contents[0], planned.image.name, task.options, note)
                sample = {"__key__": sample_key(planned), **_other_members(planned, contents[1:]), extension: data}
                writer.write(sample)
                components = []
                for name in sorted(sample.keys() - {"__key__"}):  # the writer's order
                    size = len(sample[name])
                    components.append(Component(name, position + BLOCK, size, f"{sample['__key__']}.{name}"))
                    position += BLOCK + -(-size // BLOCK) * BLOCK
                index.append(components)
                image_bytes += len(data)
                several = map(str, planned.label) if isinstance(planned.label, list) else None
                labels.update(several or [sample.get("cls", b"").decode("ascii", "replace")])
            except Rejected as why:
                line = {"name": planned.image.name, "reason": why.reason, "detail": why.detail}
                # The number is what --retry_failed finds the image by.
                rejected.append(line | {"number": planned.number} if why.reason in FAILED else line)
            count_done(planned.image)
        if writer.tarstream.offset != position:
            raise RuntimeError(f"{task.shard}: the index says {position} bytes, the tar has {writer.tarstream.offset}")
    record = {
        "samples": len(index),
        "image_bytes": image_bytes,
        "labels": labels,
        "rejected": rejected,
        "remarks": remarks,
    }
    return record, index


def count_done(image: ListedImage) -> None:
    """Moves the bar by one image."""
    if COUNTERS is not None:
        COUNTERS[COUNTER] += 1
        COUNTERS[COUNTER + 1] += max(image.size, 0)


def _other_members(planned: PlannedImage, contents: list[bytes]) -> dict[str, Any]:
    """The members beside the image: its label, its columns, and those that a WebDataset sample brought along."""
    parts = {sidecar.extension: data for sidecar, data in zip(planned.image.sidecars or (), contents)}
    if isinstance(planned.label, list):
        parts[LABEL_LISTS] = json.dumps(planned.label).encode()
    elif planned.label is not None:
        parts["cls"] = str(planned.label).encode()
    if planned.image.columns:
        parts["json"] = json.dumps(planned.image.columns, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return parts


def sample_key(planned: PlannedImage) -> str:
    """The image's number in the listing, so that it is unique, and its name in letters that every tar reader takes."""
    stem = posixpath.basename(planned.image.name).rpartition(".")[0] or planned.image.name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"^\d{9,}-", "", stem))  # not one number more with each packing
    return f"{planned.number:09d}-{stem[:64]}"


def hash_contents(task: HashTask) -> TaskDone:
    """Writes the xxh3_128 of each image's bytes, 16 bytes each.

    An image that cannot be read is hashed by its name: no duplicate, and rejected when it is packed.
    """
    hashes = []
    for image, contents in zip(task.images, fetch(task.images, task.headers)):
        content = image.name.encode("utf-8", "surrogateescape") if isinstance(contents, Rejected) else contents[0]
        hashes.append(xxhash.xxh3_128(content).digest())
        count_done(image)
    files.write(task.output, np.frombuffer(b"".join(hashes), np.uint64).tobytes())
    return TaskDone(len(task.images))
