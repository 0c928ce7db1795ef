"""The other systems of scale.py: each writes a few files in its own format, and reads its first batch out of many.

    DIR/litdata/bin/python benchmarks/scale_peers.py write litdata --data NEW_FOLDER --pictures FOLDER --shards 100 1000
    DIR/litdata/bin/python benchmarks/scale_peers.py read litdata --data NEW_FOLDER/100 --shards 100

scale.py runs each line as a process of its own, with the Python of that system's virtual environment; so nothing of
ours is imported here. `write` has the system itself write `--real` files of 10,000 samples; these are linked as often
as there are shards, and their lines in its index repeated. `read` prints one JSON object: seconds and processor time
from the start of this file to the first batch, and the memory of the process then and at its peak. A batch is 32
images, each decoded by Pillow and cropped twice to 224 pixels, without worker processes. `--save FILE --step T` writes
the system's own state afterwards, its count set to T batches; `--state FILE` continues from it.
"""

import time

BEGUN = time.perf_counter()

import argparse  # noqa: E402 - the clock runs from here
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pickle  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

SAMPLES = 10_000  # a shard
MODULES = {"litdata": "litdata", "streaming": "streaming", "dali": "nvidia.dali"}


def memory() -> dict[str, float]:
    """MB of this process: resident; of these its own and those in shared memory; and the most that was resident."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    named = {"rss": "VmRSS", "anonymous": "RssAnon", "shared": "RssShmem", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) / 1024 for name, field in named.items()}


def two_views(jpeg: bytes) -> Any:
    """Two random crops by Pillow, uint8 [2, 224, 224, 3]. torchvision would do, but takes seconds to import."""
    import numpy as np
    import torch
    from PIL import Image

    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    views = []
    for _ in range(2):
        share = random.uniform(0.5, 1.0)
        width, height = share * image.width, share * image.height
        left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        views.append(np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box)))
    return torch.from_numpy(np.stack(views))


def linked(folder: Path, index: dict[str, Any], key: str, shards: int) -> None:
    """FOLDER/SHARDS: links to the files that `index[key]` lists, over and over, with an index of them all."""
    at = folder / str(shards)
    at.mkdir()
    lines = []
    for s in range(shards):
        line = index[key][s % len(index[key])]
        name = f"{s:06d}.bin"
        if key == "chunks":
            source, line = line["filename"], {**line, "filename": name}
        else:
            source, line = line["raw_data"]["basename"], {**line, "raw_data": {**line["raw_data"], "basename": name}}
        os.link(folder / source, at / name)
        lines.append(line)
    (at / "index.json").write_text(json.dumps({**index, key: lines}))


def write_litdata(folder: Path, samples: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_size=SAMPLES)
    for i, sample in enumerate(samples):
        cache[i] = sample
    cache.done()
    cache.merge()
    return json.loads((folder / "index.json").read_text()), "chunks"


def write_streaming(folder: Path, samples: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    from streaming import MDSWriter

    index: dict[str, Any] = {}
    for t in range(0, len(samples), SAMPLES):  # a writer closes a shard by its bytes: one writer for each
        at = folder / f"real-{t // SAMPLES}"
        with MDSWriter(out=str(at), columns={"jpg": "bytes", "number": "int"}, size_limit=1 << 30) as writer:
            for sample in samples[t : t + SAMPLES]:
                writer.write(sample)
        index_of_one = json.loads((at / "index.json").read_text())
        (shard,) = index_of_one["shards"]
        shard["raw_data"]["basename"] = f"{at.name}/{shard['raw_data']['basename']}"
        index = {**index_of_one, "shards": [*index.get("shards", []), shard]}
    return index, "shards"


def litdata(options: argparse.Namespace) -> dict[str, Any]:
    os.environ |= {"WORLD_SIZE": str(options.ranks), "GLOBAL_RANK": str(options.rank)}  # as its own `detect` asks
    from litdata import StreamingDataLoader, StreamingDataset

    imported = time.perf_counter(), time.process_time()
    data = StreamingDataset(
        options.data, shuffle=True, drop_last=True, transform=lambda sample: two_views(sample["jpg"])
    )
    opened = time.perf_counter()
    loader = StreamingDataLoader(data, batch_size=options.batch_size, num_workers=0)
    measured = first_batch(loader, options.state, imported, opened)
    if options.save:
        state = loader.state_dict()
        taken = options.step * options.batch_size
        state["num_samples_yielded"] = taken
        state["dataset"] |= {"num_samples_yielded": taken, "sample_in_epoch": taken * options.ranks}
        options.save.write_bytes(pickle.dumps(state))
    return measured


def streaming(options: argparse.Namespace) -> dict[str, Any]:
    from streaming import StreamingDataLoader, StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return two_views(super().__getitem__(at)["jpg"])

    imported = time.perf_counter(), time.process_time()
    data = Views(local=options.data, shuffle=True, batch_size=options.batch_size)
    opened = time.perf_counter()
    loader = StreamingDataLoader(data, batch_size=options.batch_size, num_workers=0)
    measured = first_batch(loader, options.state, imported, opened)
    if options.save:
        seen = options.step * options.batch_size * options.ranks
        options.save.write_bytes(pickle.dumps(data.state_dict(seen, from_beginning=True)))
    return measured


def first_batch(loader: Any, state: Path | None, imported: tuple[float, float], opened: float) -> dict[str, Any]:
    """Takes it, from the saved state on where there is one."""
    if state:
        loader.load_state_dict(pickle.loads(state.read_bytes()))
    batch = next(iter(loader))
    return {"batch": tuple(batch.shape), **first(imported, opened)}


def dali(options: argparse.Namespace) -> dict[str, Any]:
    from nvidia.dali import fn, pipeline_def

    imported = time.perf_counter(), time.process_time()
    tars = [f"{options.data}/shard-{i:06d}.tar" for i in range(options.shards)]

    @pipeline_def(batch_size=options.batch_size, num_threads=1, device_id=None)
    def read() -> Any:
        images = fn.readers.webdataset(
            paths=tars, index_paths=[tar[:-3] + "idx" for tar in tars], ext=["jpg"], shard_id=0, num_shards=8, name="r"
        )
        return fn.decoders.image(images)

    pipe = read()
    pipe.build()
    pipe.run()
    return first(imported, imported[0])


def first(imported: tuple[float, float], opened: float) -> dict[str, Any]:
    """Taken as soon as the first batch is there."""
    now = time.perf_counter()
    return {
        "first_batch_s": now - BEGUN,
        "cpu_s": time.process_time(),
        "import_cpu_s": imported[1],
        "import_s": imported[0] - BEGUN,
        "open_s": opened - imported[0],
        "loader_and_batch_s": now - opened,
        **memory(),
        "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "read"], help="what to do")
    parser.add_argument("system", choices=list(MODULES), help="which system")
    parser.add_argument("--data", required=True, help="the folder to write, or one of SHARDS shards to read")
    parser.add_argument("--shards", type=int, nargs="+", required=True, help="in the folder, or one folder for each")
    parser.add_argument("--pictures", type=Path, help="write: folder of JPEGs, which the samples repeat")
    parser.add_argument("--real", type=int, default=20, help="write: different shards, the others are links to them")
    parser.add_argument("--batch_size", type=int, default=32, help="read: images of this rank")
    parser.add_argument("--rank", type=int, default=0, help="read, litdata: which rank this is")
    parser.add_argument("--ranks", type=int, default=1, help="read, litdata: of how many")
    parser.add_argument("--step", type=int, default=0, help="read: batches that the state to save is after")
    parser.add_argument("--save", type=Path, help="read: file for the state")
    parser.add_argument("--state", type=Path, help="read: file of a state to continue from")
    options = parser.parse_args()
    if options.action == "write":
        folder = Path(options.data)
        folder.mkdir()
        jpegs = [path.read_bytes() for path in sorted(options.pictures.iterdir())]
        samples = [{"jpg": jpegs[(i // SAMPLES + i) % len(jpegs)], "number": i} for i in range(options.real * SAMPLES)]
        index, key = {"litdata": write_litdata, "streaming": write_streaming}[options.system](folder, samples)
        for shards in options.shards:
            linked(folder, index, key, shards)
        return
    (options.shards,) = options.shards
    result = {"litdata": litdata, "streaming": streaming, "dali": dali}[options.system](options)
    result |= {"samples": options.shards * SAMPLES, "version": sys.modules[MODULES[options.system]].__version__}
    if options.save:
        result["state_bytes"] = options.save.stat().st_size
    print(json.dumps(result))


if __name__ == "__main__":
    main()
