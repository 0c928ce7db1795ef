"""Shards for tests, written sample by sample with webdataset's TarWriter: what make_shards would refuse to put in."""

from pathlib import Path

import webdataset

from pipeline.files import write_atomically
from pipeline.sources.index import format_index, index_tar
from pipeline.sources.manifest import Manifest, Shard, save_manifest


def write_shards(folder: Path, files: list[tuple[str, bytes, int | None]], per_shard: int) -> Path:
    """`files`: (name with extension, content, label or None) in their order; `per_shard` of them in each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(files), per_shard)):
        path = folder / f"shard-{number:06d}.tar"
        part = files[start : start + per_shard]
        with webdataset.TarWriter(str(path)) as writer:
            for i, (name, content, label) in enumerate(part):
                stem, _, extension = name.rpartition(".")
                sample = {"__key__": f"{start + i:06d}_{stem.replace('.', '_')}", extension: content}
                writer.write(sample | ({} if label is None else {"cls": str(label).encode()}))
        write_atomically(path.with_suffix(".idx"), format_index(index_tar(path)))
        shards.append(Shard(path.name, len(part), path.stat().st_size, ""))
    save_manifest(Manifest(str(folder), tuple(shards)), folder / "manifest.json")
    return folder
