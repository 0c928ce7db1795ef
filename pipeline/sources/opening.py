"""From what `--data` names (a folder, tars, a URL, a YAML card of several of these) to a `Source`.

Where there is no manifest it is built here, once, with the indexes.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from pipeline.files import is_remote, local_path, read
from pipeline.sources.cache import locked
from pipeline.sources.card import (
    Card,
    CardSource,
    is_card,
    is_compressed,
    is_folder,
    is_pattern,
    is_tar,
    read_card,
    short_name,
    split_root,
)
from pipeline.sources.manifest import (
    NAME,
    CachePlace,
    Manifest,
    Shard,
    Source,
    index_name,
    join,
    load_manifest,
    parse_manifest,
    save_manifest,
)
from pipeline.sources.scan import Scanned, index_shards
from pipeline.sources.storage import Storage
from pipeline.sources.tar import LACKS_END

# A streamed source deals a batch from this many lanes, and shuffles together what all of them have in use: remote
# shards of about so many bytes, which must be there before the first batch; local ones of about so many samples.
STREAM_LANES = 8
STREAM_BYTES = 1 << 30
STREAM_SAMPLES = 2_000_000
# A global shuffle touches every shard's index again and again, so all of them should stay in memory: 32 bytes a sample.
GLOBAL_SHUFFLE_SAMPLES = 4_000_000
MOST_NAMED = 50  # damaged tars in one message
SPLIT = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?:[-_.]|(?=\d))", re.IGNORECASE)
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test",
}  # fmt: skip


def open_source(
    data: str,
    *,
    cache_dir: str | None = None,
    cache_bytes: int = CachePlace.limit,
    workers: int | None = None,
    progress: bool = True,
) -> Source:
    """Opens what `data` names: a folder of shards, a tar, a pattern of tars or folders, these as URLs, or a YAML card.

    Where there is no manifest it is built, once, with the indexes: in the folder itself, or in `cache_dir` (default:
    ~/.cache/moco-pipeline) when the folder is remote or cannot be written to. The source remembers its cache, so that
    whatever reads it later uses the same one.

    Local sources of up to 4 million samples get a true global shuffle (1 lane). Larger and remote ones are streamed: 8
    lanes, with about 2 million samples (1 GiB of remote shards) shuffled together, so that indexes and cache stay small
    and the first batch comes soon. A card's `lanes` and `chunk_shards` say otherwise.

    ValueError or FileNotFoundError, with the remedy, when there is nothing that can be used.
    """
    card = (
        read_card(local_path(data)) if is_card(data) else Card((CardSource(data, None, short_name(data)),), None, None)
    )
    cache = CachePlace(cache_dir, cache_bytes)
    storage = Storage(cache_dir=cache_dir, cache_bytes=cache_bytes)
    manifests = []
    try:
        for number, entry in enumerate(card.sources, 1):
            try:
                manifest = _open_manifest(entry.data, storage, workers or os.cpu_count() or 1, progress)
                _warn_of_splits(entry.data, manifest)
                grey16 = entry.grey16_range or manifest.grey16_range
                manifests.append(replace(manifest, grey16_range=grey16) if grey16 else manifest)
            except (ValueError, FileNotFoundError) as error:
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"{data}, source {number}: {error}" if is_card(data) else str(error)) from None
    finally:
        storage.close()
    weights = [float(m.samples) if e.weight is None else e.weight for m, e in zip(manifests, card.sources)]
    lanes, chunk_shards = _default_order(manifests)
    if card.lanes is not None:
        lanes = card.lanes
    if card.chunk_shards is not None:
        chunk_shards = card.chunk_shards or None
    names = tuple(entry.name for entry in card.sources)
    source = Source(tuple(manifests), tuple(w / sum(weights) for w in weights), names, lanes, chunk_shards, cache)
    _check_cache(source)
    return source


def _warn_of_splits(data: str, manifest: Manifest) -> None:
    """timm's folders hold imagenet-train-0000.tar and imagenet-validation-00.tar side by side."""
    if not is_folder(data) and SPLIT.search(data.rpartition("/")[2]):
        return  # a pattern that says which
    found = [SPLIT.search(shard.path.rpartition("/")[2]) for shard in manifest.shards]
    counts = Counter(match[0] for match in found if match)
    if len({SPLIT_NAMES[match[1].lower()] for match in found if match}) > 1:
        told = ", ".join(f"{count:,} of '{part}'" for part, count in counts.most_common(4))
        one = f"{manifest.root}/*{counts.most_common(1)[0][0]}*.tar"
        _warn(f"{data} holds several splits ({told}) and all of them are used: name one of them, such as '{one}'")


def _default_order(manifests: Sequence[Manifest]) -> tuple[int, int | None]:
    remote, samples = any(is_remote(m.shard_url(0)) for m in manifests), sum(m.samples for m in manifests)
    shards = sum(len(m.shards) for m in manifests)
    lanes = min(STREAM_LANES, *(len(m.shards) for m in manifests))
    if lanes < 2 or not (remote or samples > GLOBAL_SHUFFLE_SAMPLES):
        return 1, None
    size = sum(s.bytes for m in manifests for s in m.shards)
    at_once = shards * (STREAM_BYTES / size if remote else STREAM_SAMPLES / samples)  # shards in use
    return lanes, max(1, int(at_once / lanes))


def _check_cache(source: Source) -> None:
    remote = [s.bytes for m in source.manifests if is_remote(m.shard_url(0)) for s in m.shards]
    in_use = len(remote)
    if source.chunk_shards is not None:  # this chunk of each lane and the next, of each source
        in_use = min(in_use, 2 * source.lanes * source.chunk_shards * len(source.manifests))
    if remote and (need := in_use * sum(remote) / len(remote)) > source.cache.limit:
        raise ValueError(
            f"{in_use} remote shards are in use at a time, {need / 2**30:.3g} GiB, but the cache has "
            f"{source.cache.limit / 2**30:.3g}: raise --cache_gb, or set smaller `lanes` and `chunk_shards` in a card"
        )


# --- one manifest -----------------------------------------------------------------------------------------------------


def _open_manifest(data: str, storage: Storage, workers: int, progress: bool) -> Manifest:
    if data.startswith("pipe:"):
        raise ValueError(f"{data}: commands are not run as data; name a folder, tars or a URL")
    if not is_remote(data):
        data = str(local_path(data))  # without file:// and ~
    if is_compressed(data):
        raise ValueError(
            f"{data} is compressed, so single images in it cannot be reached: unpack it once with gunzip or the like"
        )
    names = storage.glob(data) if is_pattern(data) else [data]
    if all(is_tar(name) for name in names):
        return _open_tars(names, storage, workers, progress)
    if not is_pattern(data):
        return _open_folder(data, storage, workers, progress)
    parts = []
    for name in names:  # which are no patterns, whatever they look like
        if is_tar(name):
            parts.append(_open_tars([name], storage, workers, progress))
        else:
            parts.append(_open_folder(name, storage, workers, progress))
    return _merge(parts)


def _open_folder(data: str, storage: Storage, workers: int, progress: bool) -> Manifest:
    folder = data.rstrip("/") or "/"
    if not is_remote(data) and not local_path(data).is_dir():
        raise FileNotFoundError(f"no such folder: {data}")
    manifest = _existing(folder, storage)
    if manifest is None:
        tars = storage.list(folder, ".tar")
        if not tars:
            raise ValueError(_no_shards(folder, storage))
        beside = local_path(folder) if not is_remote(folder) and os.access(local_path(folder), os.W_OK) else None
        return _build(folder, tars, beside, storage, workers, progress)
    if not is_remote(folder):
        _compare(manifest, local_path(folder), storage, workers, progress)
    return manifest


def _existing(folder: str, storage: Storage) -> Manifest | None:
    url = join(folder, NAME)
    try:
        return parse_manifest(storage.read_bytes(url), url)
    except FileNotFoundError:
        return None


def _compare(manifest: Manifest, folder: Path, storage: Storage, workers: int, progress: bool) -> None:
    """That shards of a local manifest are missing is seen at once, not after a day of training; indexes are built."""
    present = set(os.listdir(folder))  # noqa: PTH208 (names alone: with a million of them, that matters)
    paths = [shard.path for shard in manifest.shards]
    missing = [i for i, path in enumerate(paths) if path not in present and not Path(manifest.shard_url(i)).exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards in {folder / NAME} are missing, the first is "
            f"{manifest.shard_url(missing[0])}: put them back, or delete the manifest to have it rebuilt without them"
        )
    more = {name for name in present if name.endswith(".tar") and not name.startswith(".")}.difference(paths)
    if more:
        _warn(
            f"{len(more)} tars in {folder} are not in its {NAME} and are not used, one is {min(more)}; "
            "delete the manifest to have it rebuilt"
        )
    lacking = [i for i, path in enumerate(paths) if index_name(path) not in present]
    lacking = [i for i in lacking if not Path(manifest.index_url(i)).exists()]  # those in other folders
    if not os.access(folder, os.W_OK):
        return  # each is built in the cache when its shard is read
    tars, indexes = [manifest.shard_url(i) for i in lacking], [Path(manifest.index_url(i)) for i in lacking]
    scanned = list(index_shards(tars, indexes, storage, workers=workers, progress=progress))
    _refuse_damaged(scanned, str(folder))
    for tar, shard, found in zip(tars, (manifest.shards[i] for i in lacking), scanned):
        if (shard.samples, shard.bytes) != (found.samples, found.bytes):
            raise ValueError(
                f"{tar} has {found.samples:,} samples in {found.bytes:,} bytes, its manifest says {shard.samples:,} in "
                f"{shard.bytes:,}: fetch it again, or delete the manifest to have it rebuilt"
            )


def _no_shards(folder: str, storage: Storage) -> str:
    if storage.list(folder, ".tar.gz") or storage.list(folder, ".tgz"):
        return f"{folder} holds compressed tars, whose images cannot be reached singly: `gunzip {folder}/*.gz`"
    within = [] if is_remote(folder) else sorted({str(p.parent) for p in local_path(folder).glob("*/*.tar")})
    if within:
        return (
            f"{folder} holds no shards itself, but {', '.join(within[:4])} do: name one, or list several in a YAML card"
        )
    where, then = ("FOLDER", " and upload them") if is_remote(folder) else (folder, "")
    make = f"make them from images with `python pipeline/make_shards.py IMAGES {where}`{then}"
    return f"{folder} holds no shards (no {NAME}, no .tar): {make}"


def _merge(parts: list[Manifest]) -> Manifest:
    """Several folders as one source, in the order named."""
    for part in parts:
        if part.index_root:
            raise ValueError(f"{part.root} has no manifest and cannot be given one: make one there, or name its tars")
    if len({part.classes for part in parts}) > 1:
        raise ValueError(
            f"{parts[0].root} and the folders named with it have different classes: use a YAML card instead"
        )
    if len({part.grey16_range for part in parts}) > 1:
        raise ValueError(
            f"{parts[0].root} and the folders named with it have different grey16_range: use a YAML card instead"
        )
    root, paths = split_root([part.shard_url(i) for part in parts for i in range(len(part.shards))])
    shards = [shard for part in parts for shard in part.shards]
    shards = [replace(s, path=path) for s, path in zip(shards, paths)]
    return Manifest(root, tuple(shards), parts[0].classes, grey16_range=parts[0].grey16_range)


def _open_tars(names: Sequence[str], storage: Storage, workers: int, progress: bool) -> Manifest:
    """Single tars: a part of their folder's manifest, if there is one that has them."""
    if not is_remote(names[0]):  # `..` in a path would lead out of the folder that the indexes are kept in
        names = [str(Path(n).parent.resolve() / Path(n).name) if ".." in n.split("/") else n for n in names]
    root, paths = split_root(names)
    manifest = _existing(root, storage) if all("/" not in path for path in paths) else None
    if manifest is not None:
        by_path = {shard.path: shard for shard in manifest.shards}
        if all(path in by_path for path in paths):
            return replace(manifest, shards=tuple(by_path[path] for path in paths))
    return _build(root, storage.stat(root, paths), None, storage, workers, progress)


def _build(
    root: str, tars: Sequence[tuple[str, int, str]], beside: Path | None, storage: Storage, workers: int, progress: bool
) -> Manifest:
    """Indexes the tars (name, size, stamp) and writes the manifest into `beside`, or else into the cache, under a name
    that changes with them. When several processes come here at once, one does the work; a killed scan is continued."""
    whole_root = root if is_remote(root) else str(local_path(root).absolute())
    key = xxhash.xxh3_128_hexdigest(repr((whole_root, tars)).encode("utf-8", "surrogateescape"))
    cached = storage.cache_dir / "manifests" / key
    cached.mkdir(parents=True, exist_ok=True)
    with locked(storage.cache_dir / "locks" / f"manifest-{key}"):
        for folder in (cached, beside):
            if folder is not None and (folder / NAME).exists():
                return load_manifest(folder / NAME)
        scanned = _scan(root, tars, beside or cached, storage, workers, progress)
        if beside is not None and any(s.index_differs for s in scanned.values()):
            # Somebody's own .idx files are there and say something else (other members, other grouping).
            beside = None
            scanned = _scan(root, tars, cached, storage, workers, progress)
        _refuse_damaged(scanned.values(), root)
        shards = tuple(Shard(name, s.samples, s.bytes, s.checksum) for name, s in scanned.items() if s.samples)
        empty = [name for name, s in scanned.items() if not s.samples]
        if not shards:
            others = f" (and none in the {len(empty) - 1} others in {root})" if len(empty) > 1 else ""
            raise ValueError(scanned[empty[0]].problem + others)
        if empty:
            _warn(f"{len(empty)} tars in {root} without images are left out, one is {empty[0]}")
        if beyond := sum(s.images_beyond for s in scanned.values()):
            _warn(
                f"{beyond:,} images in {root} are not used: up to the first dot, where the name of a sample ends, they "
                f"are named as another image; `python pipeline/make_shards.py {root} DEST` gives each a name of its own"
            )
        if sparse := sum(s.sparse for s in scanned.values()):
            _warn(f"{sparse:,} members in {root} are sparse files and not used: write the tars without `--sparse`")
        if unended := [name for name, s in scanned.items() if s.lacks_end]:
            more = f" and {len(unended) - MOST_NAMED:,} more" if len(unended) > MOST_NAMED else ""
            _warn(f"{len(unended):,} tars {LACKS_END}: {', '.join(unended[:MOST_NAMED])}{more} in {root}")
        manifest = Manifest(root if beside else whole_root, shards, index_root="" if beside else str(cached))
        save_manifest(manifest, (beside or cached) / NAME)
        return manifest


def _scan(
    root: str, tars: Sequence[tuple[str, int, str]], folder: Path, storage: Storage, workers: int, progress: bool
) -> dict[str, Scanned]:
    """Writes the indexes into `folder`, and a journal there while it lasts, and as long as a tar is damaged."""
    journal = folder / ".scanned.jsonl"
    done: dict[str, Scanned] = {}
    written: set[str] = set()  # tars whose index was written here
    if journal.exists():
        known = _read_journal(journal)
        done = {tar[0]: known[tar] for tar in tars if tar in known}
        written = {tar[0] for tar, found in known.items() if found.samples and not found.index_differs}
    rest = [tar for tar in tars if tar[0] not in done]
    urls = [join(root, name) for name, _, _ in rest]
    indexes = [folder / index_name(name.partition("?")[0] if is_remote(root) else name) for name, _, _ in rest]
    for tar, index in zip(rest, indexes):
        if tar[0] in written:  # the tar has changed since: this index is of no use, and nobody else's
            index.unlink(missing_ok=True)
    with journal.open("a") as f:
        found = index_shards(urls, indexes, storage, workers=workers, progress=progress)
        for tar, scanned in zip(rest, found):
            done[tar[0]] = scanned
            if not scanned.damaged:
                f.write(json.dumps([tar, scanned]) + "\n")
                f.flush()
    if not any(s.damaged for s in done.values()):
        journal.unlink()
    return {name: done[name] for name, _, _ in tars}


def _read_journal(journal: Path) -> dict[tuple[str, int, str], Scanned]:
    lines = read(str(journal)).split(b"\n")[:-1]  # the last may have been cut short
    try:
        known = {tuple(tar): Scanned(*found) for tar, found in map(json.loads, lines)}
        kinds = tuple(Scanned.__annotations__.values())
        if not all(isinstance(value, kind) for found in known.values() for value, kind in zip(found, kinds)):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{journal} is damaged or not of this program: delete it, and the tars beside it are indexed anew"
        ) from None
    return known


def _refuse_damaged(scanned: Iterable[Scanned], root: str) -> None:
    """All at once: who repairs them one by one would wait for the indexing each time."""
    damaged = [s.problem for s in scanned if s.damaged]
    if len(damaged) == 1:
        raise ValueError(damaged[0])
    if damaged:
        more = f"; and {len(damaged) - MOST_NAMED:,} more" if len(damaged) > MOST_NAMED else ""
        raise ValueError(f"{len(damaged):,} tars in {root} cannot be used: {'; '.join(damaged[:MOST_NAMED])}{more}")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
