"""A data source: shards with their sample counts, sizes and checksums; several of them with weights.

A manifest lists the shards of one source: a line of JSON each, nothing for each sample, so that a billion samples in
100,000 shards are 15 MB. make_shards writes it; for shards that others made, `pipeline.sources.opening` does, once.
"""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.files import is_remote, local_path, read, write_atomically
from pipeline.pixels.formats import Grey16, grey16_range

FORMAT = 1
LARGEST = 1 << 56  # bytes or samples of a shard; more is damage, and sums of it would not fit into an int64
LONGEST_PATH, LONGEST_CHECKSUM = 4096, 100
NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    path: str  # relative to the manifest's root, and inside it
    samples: int
    bytes: int  # of the tar
    checksum: str = ""  # "xxh3_64:<16 hex digits>" of the tar, "" when unknown


@dataclass(frozen=True)
class Manifest:
    """The shards of one source. Their order gives every sample its id, so it never changes.

    `root` is the folder or URL that relative paths start from, `index_root` that of the `.idx` files when it is
    another. `grey16_range` are black and white of grey images of more than 8 bits, where they are not the file's.
    """

    root: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    index_root: str = ""
    grey16_range: Grey16 | None = None

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [S + 1]: the sample id of each shard's first sample, and the number of samples."""
        counts = np.fromiter((s.samples for s in self.shards), np.int64, len(self.shards))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @property
    def samples(self) -> int:
        return int(self.offsets[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits over the shards' names, counts and sizes, and the range of 16-bit grey where one is given:
        equal for the same data wherever it lies."""
        digest = xxhash.xxh3_128()
        for s in self.shards:
            digest.update(f"{s.path}\t{s.samples}\t{s.bytes}\n".encode("utf-8", "surrogateescape"))
        if self.grey16_range is not None:
            digest.update("grey16 {} {}\n".format(*self.grey16_range).encode())
        return digest.hexdigest()

    def shard_url(self, shard: int) -> str:
        return join(self.root, self.shards[shard].path)

    def index_url(self, shard: int) -> str:
        path = self.shards[shard].path
        if not self.index_root:
            return index_name(join(self.root, path))
        return index_name(join(self.index_root, path.partition("?")[0] if is_remote(self.root) else path))


def join(root: str, path: str) -> str:
    return path if is_remote(path) or path.startswith("/") else f"{root.rstrip('/')}/{path}"


def index_name(tar: str) -> str:
    """`a/shard-000000.tar` -> `a/shard-000000.idx`; a query (signed URLs) is kept."""
    base, mark, query = tar.partition("?") if is_remote(tar) else (tar, "", "")
    return base.removesuffix(".tar") + ".idx" + mark + query


def save_manifest(manifest: Manifest, path: str | Path) -> None:
    """Writes `manifest` as JSON, a line a shard, atomically. Its root is noted only when that is not the file's
    folder."""
    folder = str(Path(path).parent)
    head: dict[str, object] = {"format": FORMAT, "samples": manifest.samples, "classes": list(manifest.classes)}
    if is_remote(manifest.root) or Path(manifest.root).absolute() != Path(folder).absolute():
        head["root"] = manifest.root
    if manifest.grey16_range is not None:
        head["grey16_range"] = list(manifest.grey16_range)
    lines = [
        json.dumps({"path": s.path, "samples": s.samples, "bytes": s.bytes, "checksum": s.checksum})
        for s in manifest.shards
    ]
    text = json.dumps(head)[:-1] + ', "shards": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, text.encode())


def load_manifest(path: str | Path) -> Manifest:
    """Reads what `save_manifest` wrote. FileNotFoundError when there is none, ValueError when it is not a manifest."""
    return parse_manifest(read(str(path)), str(path))


def parse_manifest(content: bytes, url: str) -> Manifest:
    """The manifest in `content`, which was read from `url`. ValueError that names it, when it is not a manifest."""
    folder = url.rpartition("/")[0] or "."
    try:
        head = json.loads(content, object_hook=_shard_or_head)
        if not isinstance(head, dict) or "format" not in head:
            raise ValueError("it has no `format`")
        other = _short(head["format"]) if head["format"] != FORMAT else ""
        shards = head.get("shards")
        if not other and not (isinstance(shards, list) and all(isinstance(shard, Shard) for shard in shards)):
            raise ValueError("`shards` is no list of shards with a path")
        root, classes = head.get("root", folder), head.get("classes", [])
        if not isinstance(root, str) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
            raise ValueError("`root` is no text or `classes` is no list of texts")
        if not _is_path(root):
            raise ValueError(f"`root` is {_short(root)!r}, which no folder can have as its name")
        grey16 = grey16_range(head.get("grey16_range"), "`grey16_range`")
    except RecursionError:
        raise ValueError(
            f"{url} is not a manifest (it is nested too deeply): delete it to have it built again"
        ) from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{url} is not a manifest ({_short(error)}): delete it to have it built again") from None
    if other:
        raise ValueError(f"{url} has format {other}, this program reads {FORMAT}: update the one that is older")
    assert shards is not None
    manifest = Manifest(root, tuple(shards), tuple(classes), folder if root != folder else "", grey16)
    announced = head.get("samples", manifest.samples)
    if not shards or min(s.samples for s in shards) < 1 or manifest.samples != announced:
        raise ValueError(
            f"{url} does not add up: {len(shards)} shards with {manifest.samples:,} samples, {_short(announced)} "
            "announced, none may be empty; delete it to have it built again"
        )
    if (outside := next((s.path for s in shards if _leads_out(s.path)), None)) is not None:
        raise ValueError(
            f"{url} names {_short(outside)}, which is outside {root}: a manifest may only name shards inside; name "
            "others with --data or in a YAML card"
        )
    return manifest


def _leads_out(path: str) -> bool:
    return path.startswith("/") or is_remote(path) or (".." in path and ".." in path.split("/"))


def _is_path(path: str) -> bool:
    """Whether a file could have this path: no empty one, none with a zero byte or letters that no name can have."""
    try:
        return 0 < len(os.fsencode(path)) <= LONGEST_PATH and "\0" not in path
    except UnicodeEncodeError:
        return False


def _short(found: object) -> str:
    """On one line of at most 200 letters."""
    return " ".join(str(found).split())[:200]


def _shard_or_head(entry: dict[str, Any]) -> Any:
    """Turns each line into a Shard as it is parsed: 100,000 dictionaries at once would take more room than all else."""
    if "path" not in entry:
        return entry
    path, checksum = entry["path"], entry.get("checksum", "")
    if not isinstance(path, str) or not isinstance(checksum, str) or len(checksum) > LONGEST_CHECKSUM:
        raise ValueError("a shard whose `path` or `checksum` is no text, or too long a one")
    if not _is_path(path) or path == "." or path.endswith("/"):
        raise ValueError(f"a shard with the path {_short(path)!r}, which no file can have")
    samples, size = entry.get("samples"), entry.get("bytes")
    if type(samples) is not int or type(size) is not int:
        raise ValueError(f"`samples` and `bytes` of {_short(path)} must be whole numbers")
    if max(samples, size) >= LARGEST or size < 0:
        raise ValueError(f"{samples:,} samples in {size:,} bytes in {_short(path)}")
    return Shard(path, samples, size, checksum)


def shared_samples(one: "Source", other: "Source") -> int:
    """How many samples of `other` are in shards that `one` has too: of the same checksum, or at the same place."""

    def marks(source: Source) -> Iterator[tuple[str, int]]:
        for manifest in source.manifests:
            for i, shard in enumerate(manifest.shards):
                url = manifest.shard_url(i)
                yield shard.checksum or (url if is_remote(url) else os.path.realpath(local_path(url))), shard.samples

    known = {mark for mark, _ in marks(one)}
    return sum(samples for mark, samples in marks(other) if mark in known)


@dataclass(frozen=True)
class CachePlace:
    """Where remote shards are kept, and how many bytes of them; folder None: ~/.cache/moco-pipeline."""

    folder: str | None = None
    limit: int = 50 << 30


@dataclass(frozen=True)
class Source:
    """What `--data` names: one manifest, or several with weights, and how they are shuffled (pipeline.reading.order).

    lanes: parts that a global batch is dealt from, each with its own shards. chunk_shards: how many shards of a lane
    are shuffled together; None is all of them, a true global shuffle. cache: what the source was opened with, and is
    read with unless told otherwise.
    """

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    lanes: int = 1
    chunk_shards: int | None = None
    cache: CachePlace = field(default=CachePlace(), compare=False)

    @property
    def samples(self) -> int:
        return int(self.id_offsets[-1])

    @functools.cached_property
    def id_offsets(self) -> np.ndarray:
        """int64 [M + 1]: a sample's id is id_offsets[m] + manifests[m].offsets[shard] + row."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum([m.samples for m in self.manifests], dtype=np.int64)])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides which sample comes when, but for seed and batch size."""
        parts = [f"{self.lanes} {self.chunk_shards}"]
        parts += [f"{weight!r} {m.fingerprint}" for weight, m in zip(self.weights, self.manifests)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, when all of the manifests agree on them; else empty."""
        kinds = {m.classes for m in self.manifests}
        return kinds.pop() if len(kinds) == 1 else ()

    def class_name(self, label: int) -> str:
        """The name of a class for people; its number where the manifests do not name it."""
        return self.classes[label] if label < len(self.classes) else str(label)
