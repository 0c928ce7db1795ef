"""How well shards that are sorted by class come out mixed: ours beside DALI's reader and webdataset's shuffle buffer.

For each way an epoch of batches of 256 is drawn, and the pairs of samples within a batch that are of one class are
counted, relative to batches drawn at random (1 is perfect, 10 is no shuffling at all with ten classes). Also, how many
different classes a batch holds on the average. Labels only; nothing is decoded.

    python benchmarks/shuffle_quality.py [--samples 50000] [--output benchmarks/results/shuffle_quality.json]
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from nvidia.dali import fn, pipeline_def

from pipeline.files import write_atomically
from pipeline.reading.order import make_order
from pipeline.reading.quality import shuffle_quality
from pipeline.sources.index import format_index, index_tar
from pipeline.sources.manifest import Manifest, Shard, Source, save_manifest

CLASSES, BATCH, PER_SHARD = 10, 256, 1000


def write_sorted_shards(folder: Path, samples: int) -> Manifest:
    """Shards of 1,000 samples, class after class. The images are of no interest: eight bytes each."""
    shards = []
    for number in range(samples // PER_SHARD):
        path = folder / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(PER_SHARD):
                sample = number * PER_SHARD + row
                for extension, content in (("jpg", b"\xff\xd8 image"), ("cls", b"%d" % (sample * CLASSES // samples))):
                    member = tarfile.TarInfo(f"{sample:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        write_atomically(path.with_suffix(".idx"), format_index(index_tar(path)))
        shards.append(Shard(path.name, PER_SHARD, path.stat().st_size))
    manifest = Manifest(str(folder), tuple(shards))
    save_manifest(manifest, folder / "manifest.json")
    return manifest


def dali_labels(folder: Path, samples: int, fill: int, tar_order: bool) -> Iterator[int]:
    shuffling: dict[str, Any] = {"random_shuffle": True}
    if tar_order:
        shuffling = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": 1}

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0)
    def reader() -> object:
        return fn.readers.webdataset(
            paths=sorted(map(str, folder.glob("*.tar"))),
            index_paths=sorted(map(str, folder.glob("*.idx"))),
            ext=["cls"],
            initial_fill=fill,
            **shuffling,
        )

    pipeline = reader()
    pipeline.build()
    skipped = samples // BATCH + 1 if tar_order else 0  # the shards' order changes after the first epoch
    for batch in range(skipped + samples // BATCH):
        (labels,) = pipeline.run()
        if batch >= skipped:
            yield from (int(bytes(labels.at(i))) for i in range(len(labels)))


def webdataset_labels(folder: Path, buffer: int) -> Iterator[int]:
    shards = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(buffer, seed=0)
    return (int(sample["cls"]) for sample in data)


def measure(labels: Iterator[int]) -> dict[str, float]:
    drawn = np.fromiter(labels, np.int64)
    batches = drawn[: len(drawn) // BATCH * BATCH].reshape(-1, BATCH)
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in batches]).astype(np.float64)
    pairs = (counts * (counts - 1)).sum(1) / (BATCH * (BATCH - 1))
    totals = np.bincount(drawn, minlength=CLASSES).astype(np.float64)
    ideal = (totals * (totals - 1)).sum() / (totals.sum() * (totals.sum() - 1))
    return {"ratio": float(pairs.mean() / ideal), "classes_in_a_batch": float((counts > 0).sum(1).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="in shards of 1,000")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = write_sorted_shards(folder, options.samples)

        def ours(lanes: int, chunk_shards: int | None) -> dict[str, float]:
            source = Source((manifest,), (1.0,), ("sorted",), lanes, chunk_shards)
            order = make_order(source, BATCH, 0)
            quality = shuffle_quality(source, order, steps=order.steps_per_epoch)
            ids = np.concatenate([order.draw(0, step).sample_ids for step in range(order.steps_per_epoch)])
            seen = measure(iter((ids * CLASSES // options.samples).tolist()))
            assert abs(seen["ratio"] - quality["ratio"]) < 0.01  # what `pipeline.reading.order --quality` says
            return seen

        ways: dict[str, Callable[[], dict[str, float]]] = {
            "in the order of the shards": lambda: measure(
                s * CLASSES // options.samples for s in range(options.samples)
            ),
            "DALI reader, initial_fill 1024": lambda: measure(dali_labels(folder, options.samples, 1024, False)),
            "DALI reader, shuffle_after_epoch": lambda: measure(dali_labels(folder, options.samples, 1024, True)),
            "webdataset, shardshuffle, shuffle(1000)": lambda: measure(webdataset_labels(folder, 1000)),
            "webdataset, shardshuffle, shuffle(10000)": lambda: measure(webdataset_labels(folder, 10_000)),
            "ours, 8 lanes, chunks of 1 shard (8 open)": lambda: ours(8, 1),
            "ours, 8 lanes, chunks of 2 shards (16 open)": lambda: ours(8, 2),
            "ours, 16 lanes, chunks of 2 shards (32 open)": lambda: ours(16, 2),
            "ours, global shuffle (default)": lambda: ours(1, None),
        }
        for name, way in ways.items():
            began = time.perf_counter()
            row = rows[name] = way()
            seconds = time.perf_counter() - began
            found = (
                f"same-class pairs {row['ratio']:6.3f} of ideal, {row['classes_in_a_batch']:5.2f} classes in a batch"
            )
            print(f"{name:46} {found}  ({seconds:.1f} s)", flush=True)
    if options.output:
        versions = {"python": sys.version.split()[0], "numpy": np.__version__, "webdataset": webdataset.__version__}
        options.output.write_text(json.dumps({"samples": options.samples, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
