"""How each peer of `resume.py` is opened, saved and continued, as its own documentation says, with the line it follows.

All do the same work on a sample: decode it with Pillow, and make two views of it where the system runs transforms. The
loop over epochs is that of a usual training: the number of the epoch and the state of torch's generator are saved
beside the system's own state, by every rank.

    python resume_peers.py SYSTEM IMAGES DATA    # writes IMAGES in the system's format; run under the system's Python
"""

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from benchmarks.resume_systems import SEED, Opened, Place, checksums, two_views  # noqa: E402

Rows = Iterator[tuple[int, list[int], list[int]]]


def row(epoch: int, ids: Any, views: torch.Tensor) -> tuple[int, list[int], list[int]]:
    return epoch, [int(i) for i in ids], checksums(views)


def opened(
    place: Place, saved: Any, system_state: Callable[[], Any], epoch_of: Callable[[int], Iterator[tuple[Any, Any]]]
) -> Opened:
    """A training's loop: `epoch_of(n)` gives epoch n's batches of (ids, views), or the rest of it once continued."""
    at = {"epoch": 0 if saved is None else saved[0]["epoch"]}
    if saved is not None:
        torch.set_rng_state(saved[min(place.rank, len(saved) - 1)]["generator"])

    def batches() -> Rows:
        for epoch in range(at["epoch"], place.epochs):
            at["epoch"] = epoch
            for ids, views in epoch_of(epoch):
                yield row(epoch, ids, views)

    def state() -> dict[str, Any]:
        return {"epoch": at["epoch"], "generator": torch.get_rng_state(), "system": system_state()}

    return Opened(batches(), state, lambda: None)


def images_in(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.jpg"))


# --- torchdata --------------------------------------------------------------------------------------------------------


class ImageFolder(Dataset[tuple[int, torch.Tensor]]):
    """stateful_dataloader/README.md: "If your dataset has worker-specific state (eg RNG transform state) you can add
    state_dict/load_state_dict methods to your dataset"."""

    def __init__(self, folder: str) -> None:
        self.paths = images_in(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, two_views(self.paths[index].read_bytes())

    def state_dict(self) -> dict[str, Any]:
        return {"generator": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["generator"])


def open_torchdata(place: Place, saved: Any) -> Opened:
    """The same: "dataloader.load_state_dict(state_dict)", with its StatefulDistributedSampler; "StatefulDataLoader
    handles aggregation and distribution of state across multiprocess workers (but not across ranks)": each rank its
    own, and a rank too many the last one's."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    data = ImageFolder(place.data)
    sampler = StatefulDistributedSampler(data, place.world, place.rank, shuffle=True, seed=SEED, drop_last=True)
    each = place.batch // place.world
    loader: Any = StatefulDataLoader(data, batch_size=each, sampler=sampler, num_workers=place.workers, drop_last=True)
    if saved is not None:
        loader.load_state_dict(saved[min(place.rank, len(saved) - 1)]["system"])

    def epoch_of(epoch: int) -> Iterator[tuple[Any, Any]]:
        sampler.set_epoch(epoch)
        yield from loader

    return opened(place, saved, loader.state_dict, epoch_of)


def write_torchdata(images: Path, data: Path) -> None:
    data.symlink_to(images.resolve())


# --- LitData ----------------------------------------------------------------------------------------------------------


def open_litdata(place: Place, saved: Any) -> Opened:
    """README, "Pause, resume data streaming": torch.save(dataloader.state_dict(), "dataloader_state.pt"), and every
    process "dataloader.load_state_dict(state_dict)": the one file, here rank 0's."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[int, torch.Tensor]:
            sample = super().__getitem__(index)
            return sample["id"], two_views(sample["image"])

    data = Images(place.data, shuffle=True, drop_last=True)
    each = place.batch // place.world
    loader: Any = StreamingDataLoader(data, batch_size=each, num_workers=place.workers, shuffle=True, drop_last=True)
    if saved is not None:
        loader.load_state_dict(saved[0]["system"])
    return opened(place, saved, loader.state_dict, lambda epoch: iter(loader))


def read_for_litdata(path: Path) -> dict[str, Any]:
    return {"id": int(path.stem), "image": path.read_bytes()}


def write_litdata(images: Path, data: Path) -> None:
    import litdata

    litdata.optimize(fn=read_for_litdata, inputs=images_in(images), output_dir=str(data), num_workers=1, chunk_size=250)


# --- Streaming --------------------------------------------------------------------------------------------------------


def open_streaming(place: Place, saved: Any) -> Opened:
    """docs, "Fast Resumption": "simply call the state_dict method of StreamingDataLoader" (its API: "This is called on
    rank zero") and "when resuming, call load_state_dict" ("on each copy of the dataset"). Its clean_stale_shared_memory
    is for what a kill leaves."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()

    class Images(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[int, torch.Tensor]:
            sample = super().__getitem__(index)
            return sample["id"], two_views(sample["image"])

    each = place.batch // place.world
    data = Images(local=place.data, shuffle=True, batch_size=each)
    loader: Any = streaming.StreamingDataLoader(data, batch_size=each, num_workers=place.workers, drop_last=True)
    if saved is not None:
        loader.load_state_dict(saved[0]["system"])
    return opened(place, saved, loader.state_dict, lambda epoch: iter(loader))


def write_streaming(images: Path, data: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(data), columns={"id": "int", "image": "bytes"}, size_limit=600_000) as writer:
        for path in images_in(images):
            writer.write({"id": int(path.stem), "image": path.read_bytes()})


# --- LanceDB ----------------------------------------------------------------------------------------------------------


def open_lancedb(place: Place, saved: Any) -> Opened:
    """docs.lancedb.com/training/resuming: "collect the state_dict() from every rank of the previous run and merge them
    with StreamingDataset.merge_state_dicts", "hand the identical merged dict to every rank"; /checkpointing: "a safe
    checkpoint when num_workers = 0", "make sure global_batch_size is a multiple of num_splits"."""
    import lancedb
    from lancedb.streaming import StreamingDataLoader, StreamingDataset

    table = lancedb.connect(place.data).open_table("images")
    current: list[Any] = []

    def views_of(batch: Any) -> list[tuple[int, torch.Tensor]]:
        return [(sample["id"], two_views(sample["image"])) for sample in batch.to_pylist()]

    def epoch_of(epoch: int) -> Iterator[tuple[Any, Any]]:
        data = StreamingDataset(
            table, num_splits=8, shuffle_seed=SEED, epoch=epoch, rank=place.rank, world_size=place.world,
            transform=views_of,
        )  # fmt: skip
        if saved is not None and not current and saved[0]["epoch"] == epoch:
            data.load_state_dict(StreamingDataset.merge_state_dicts([each["system"] for each in saved]))
        current[:] = [data]
        return iter(StreamingDataLoader(data, batch_size=place.batch // place.world, num_workers=0))

    return opened(place, saved, lambda: current[0].state_dict(), epoch_of)


def write_lancedb(images: Path, data: Path) -> None:
    import lancedb
    import pyarrow

    paths = images_in(images)
    ids = pyarrow.array([int(path.stem) for path in paths], pyarrow.int64())
    table = pyarrow.table({"id": ids, "image": pyarrow.array([path.read_bytes() for path in paths], pyarrow.binary())})
    lancedb.connect(str(data)).create_table("images", table)


# --- Energon ----------------------------------------------------------------------------------------------------------


def open_energon(place: Place, saved: Any) -> Opened:
    """docs, "Save and Restore", 1: save_state_rank and restore_state_rank on each rank ("our recommended way"). For
    other ranks `energon checkpoint redist`, and "Reproducible Scaling": "The product world_size * num_workers must stay
    the same", "The global batch size must be a multiple of micro-batch size * world_size * num_workers", the rest by
    accumulation. Randomness "for augmentations": @stateless(restore_seeds=True)."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )  # fmt: skip

    @edataclass
    class Views(Sample):
        views: torch.Tensor

    @stateless
    def cook(sample: Any) -> Any:
        return Views(**basic_sample_keys(sample), views=sample["jpg"])

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        @stateless(restore_seeds=True)
        def encode_sample(self, sample: Any) -> Any:
            sample.views = two_views(sample.views)
            return sample

        def batch(self, samples: list[Any]) -> Any:  # plain values, since a local class does not leave its process
            return {"keys": [each.__key__ for each in samples], "views": torch.stack([each.views for each in samples])}

    workers = place.workers * place.first_world // place.world
    micro = place.batch // (place.workers * place.first_world)
    config = WorkerConfig(rank=place.rank, world_size=place.world, num_workers=workers)
    data = get_train_dataset(
        place.data, batch_size=micro, shuffle_buffer_size=100, max_samples_per_sequence=100, worker_config=config,
        task_encoder=Encoder(), repeat=False,
    )  # fmt: skip
    loader: Any = get_savable_loader(data)
    if saved is not None:
        states = [each["system"] for each in saved]
        states = states if len(states) == place.world else redistributed(states, place)
        loader.restore_state_rank(states[place.rank])

    def epoch_of(epoch: int) -> Iterator[tuple[Any, Any]]:
        batches = iter(loader)
        while parts := list(itertools.islice(batches, place.batch // (micro * place.world))):
            keys = [key for part in parts for key in part["keys"]]
            yield [int(key.rsplit("/", 1)[-1]) for key in keys], torch.cat([part["views"] for part in parts])

    return opened(place, saved, loader.save_state_rank, epoch_of)


def redistributed(states: list[Any], place: Place) -> list[Any]:
    with tempfile.TemporaryDirectory(dir=place.folder) as name:
        files = [Path(name) / f"state_{i:03d}.pt" for i in range(len(states))]
        for path, state in zip(files, states):
            torch.save(state, path)
        out = Path(name) / "out"
        out.mkdir()
        command = [str(Path(sys.prefix) / "bin" / "energon"), "checkpoint", "redist", *map(str, files), str(out)]
        subprocess.run([*command, "--new-world-size", str(place.world)], check=True, stdout=subprocess.DEVNULL)
        return [torch.load(path, weights_only=False) for path in sorted(out.glob("*.pt"))]


def write_energon(images: Path, data: Path) -> None:
    write_tars(images, data)
    command = [str(Path(sys.prefix) / "bin" / "energon"), "prepare", str(data), "--non-interactive", "--no-progress"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    subprocess.run(command, check=True)


# --- webdataset -------------------------------------------------------------------------------------------------------


def open_webdataset(place: Place, saved: Any) -> Opened:
    """Its author, github.com/webdataset/webdataset/issues/234: "the preferred way is to just use resampled training,
    which can be restarted with no statistical anomalies"; 177: "no need to skip any samples". There is no state."""
    import webdataset

    at = {"batches": 0 if saved is None else saved[0]["system"]}
    tars = sorted(map(str, Path(place.data).glob("*.tar")))
    data = webdataset.WebDataset(tars, resampled=True, shardshuffle=True, nodesplitter=webdataset.split_by_node)
    data = data.shuffle(1000).map(lambda sample: (int(sample["__key__"]), two_views(sample["jpg"])))
    loader = webdataset.WebLoader(data.batched(place.batch // place.world), batch_size=None, num_workers=place.workers)

    def epoch_of(epoch: int) -> Iterator[tuple[Any, Any]]:
        for batch in itertools.islice(iter(loader), place.samples // place.batch - at["batches"]):
            at["batches"] += 1
            yield batch
        at["batches"] = 0

    return opened(place, saved, lambda: at["batches"], epoch_of)


def write_tars(images: Path, data: Path) -> None:
    import webdataset

    data.mkdir()
    with webdataset.ShardWriter(str(data / "shard-%06d.tar"), maxcount=250, verbose=0) as writer:
        for path in images_in(images):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes()})


OPEN = {
    "webdataset": open_webdataset,
    "torchdata": open_torchdata,
    "litdata": open_litdata,
    "streaming": open_streaming,
    "energon": open_energon,
    "lancedb": open_lancedb,
}
WRITE = {
    "webdataset": write_tars,
    "torchdata": write_torchdata,
    "litdata": write_litdata,
    "streaming": write_streaming,
    "energon": write_energon,
    "lancedb": write_lancedb,
}
IMPORT_FIRST = {  # before ranks are forked; not lancedb, whose threads would not be there
    "webdataset": "webdataset",
    "torchdata": "torchdata.stateful_dataloader",
    "litdata": "litdata",
    "streaming": "streaming",
    "energon": "megatron.energon",
}


if __name__ == "__main__":
    WRITE[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
