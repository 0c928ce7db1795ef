"""The names in a shard: the key of each row, and its list of labels where it has one."""

import json
from typing import NamedTuple

from pipeline.sources.index import LABEL_LISTS, key_of, read_components
from pipeline.sources.manifest import Source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage


class Row(NamedTuple):
    key: str
    labels: list[int] | None  # None where the sample has no list of labels


def shard_rows(source: Source, m: int, shard: int, storage: Storage) -> list[Row]:
    """Every row of a shard of manifest `m`, in order. ValueError for a list of labels that is not one of numbers."""
    manifest = source.manifests[m]
    entry, url = manifest.shards[shard], manifest.shard_url(shard)
    rows = []
    for components in read_components(read_index_text(manifest, shard, storage)):
        labels = None
        for component in components:
            if component.extension == LABEL_LISTS:
                data = storage.read(url, component.offset, component.size, bytes=entry.bytes, checksum=entry.checksum)
                labels = _numbers(data.tobytes(), f"{url}: {component.name}")
        rows.append(Row(key_of(components[0].name), labels))
    return rows


def _numbers(text: bytes, name: str) -> list[int]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
        raise ValueError(f"{name} is {text[:40]!r}, not a list of class numbers")
    return labels
