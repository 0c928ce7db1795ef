"""From a source to batches of two views on the device, or more: order, read, views and graph, put in a row.

1. A thread draws the next steps (order), reads and screens their images (read), draws their view parameters (views).
2. The DALI graph decodes each image once and makes its views, a few batches ahead.
3. `Loader` hands out batches, without end unless told, and remembers the last one that was taken: that is its state.

`python -m pipeline.loader --data D --batch_size B` runs it alone and names the bottleneck.
"""

import numbers
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.command import add_cache_flags, cache_arguments, command
from pipeline.pixels import views as view_parameters
from pipeline.pixels.decode import MAX_PIXELS
from pipeline.pixels.view_recipe import AnyViews, add_view_flags, view_pair
from pipeline.progress import say_if_slow, saying, track

if __name__ == "__main__":
    # Before torch and DALI, whose import takes seconds: --help and a mistyped flag answer at once.
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m pipeline.loader",
        description="Runs the loader alone; prints images/s, the time of each stage, and which is the bottleneck.",
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of shards, tar, brace pattern, URL or YAML card")
    add("--batch_size", type=int, required=True, help="images in a step, over all ranks")
    add("--steps", type=int, default=None, help="batches to load; when left out one epoch")
    add_view_flags(parser)
    add("--num_views", type=int, default=2, help="views of each image")
    add("--image_size", type=int, default=224, help="side of a view in pixels")
    add("--seed", type=int, default=0, help="seed of order and views")
    add("--world_size", type=int, default=1, help="number of ranks that share the batches")
    add("--rank", type=int, default=0, help="which of them this command is: it loads that rank's share of each batch")
    add("--device", default="cpu", help="where the views are made: cpu or cuda:0")
    add("--num_threads", type=int, default=None, help="decoding threads; when left out all cores")
    add("--read_only", action="store_true", help="read and screen only, without decoding")
    add("--quarantine", default=None, help="file that bad samples are written to")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more than this share of the images is bad")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="an image with more pixels is a bad sample")
    add_cache_flags(parser)
    ARGUMENTS = parser.parse_args()
    IMPORTING = say_if_slow("importing torch and DALI")

import torch

from pipeline.pixels.graph import Graph, lend
from pipeline.reading.ahead import Decoding, EncodedBatch, ShardsAhead
from pipeline.reading.order import make_order
from pipeline.reading.reader import Reader, Samples
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import storage_for


class _Pair(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    sample_ids: torch.Tensor


class Batch(_Pair):
    """Two views of n images: [n, 3, S, S] each, channels-last, normalised; ids int64 [n]; all on the device. A tuple of
    three, `query, key, sample_ids = batch`, whatever `num_views`; `more` holds the views behind the first two."""

    more: tuple[torch.Tensor, ...] = ()

    @property
    def views(self) -> tuple[torch.Tensor, ...]:
        """All of them: the query, the key, and `more`."""
        return self.query, self.key, *self.more


class Loader:
    """Iterator over the batches of one rank; the pipeline is built once, an epoch's end costs nothing. It ends when the
    run has had `epochs` epochs, those before `load_state_dict` included; with None it never does.

    `batch_size` is global. `views` is a view recipe: its name, a YAML file, its fields, or a `ViewRecipe`. `key_views`
    is that of the second view; all others are made by `views`. `crop_min` takes the place of theirs where it is given.
    `quarantine` is the file that bad samples are written to, `max_bad_fraction` the share of them that ends the run;
    `hw_decoder_load` the share of the JPEGs that a GPU's hardware decoder gets. The cache is the source's unless given.
    ValueError for an argument that will not do, here and not at the first batch.
    """

    def __init__(
        self,
        source: Source,
        *,
        views: AnyViews = "v2",
        key_views: AnyViews | None = None,
        num_views: int = 2,
        image_size: int = 224,
        crop_min: float | None = None,
        batch_size: int,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_threads: int | None = None,
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
        quarantine: str | Path | None = None,
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        least = {"num_views": 2, "image_size": 1, "batch_size": 1, "world_size": 1, "prefetch": 1, "max_pixels": 1}
        whole = {
            "num_views": num_views, "image_size": image_size, "batch_size": batch_size, "world_size": world_size,
            "prefetch": prefetch, "max_pixels": max_pixels, "rank": rank, "seed": seed,
        }  # fmt: skip
        if epochs is not None:
            whole, least = whole | {"epochs": epochs}, least | {"epochs": 1}
        if num_threads is not None:
            whole, least = whole | {"num_threads": num_threads}, least | {"num_threads": 1}
        shares = {"hw_decoder_load": hw_decoder_load, "max_bad_fraction": max_bad_fraction}
        check_arguments(whole, least, shares, device, dtype, quarantine)
        query, key = view_pair(views, key_views, crop_min=crop_min)
        self.views = (query, key, *(num_views - 2) * [query])  # the recipe of each view
        self.image_size, self.batch_size = image_size, batch_size
        self.device, self.dtype, self.prefetch, self.hw_decoder_load = device, dtype, prefetch, hw_decoder_load
        self.num_threads, self.epochs = num_threads or usual_threads(), epochs
        self.order = make_order(source, batch_size, seed)
        self.order.draw(0, 0, rank, world_size)  # so that ranks that do not divide the batch fail here
        self.steps_per_epoch = self.order.steps_per_epoch
        self._storage = storage_for(source, cache_dir, cache_bytes)
        self._reader = Reader(
            source,
            self._storage,
            quarantine=quarantine,
            max_bad_fraction=max_bad_fraction,
            max_pixels=max_pixels,
            num_threads=self.num_threads,
        )
        self._shards_ahead = ShardsAhead(source, self._storage, self.order, rank, world_size)
        self._consumed = 0  # batches of the run so far, over all epochs
        self._decoding: Decoding | None = None
        self._views_seconds = self._wait_seconds = 0.0
        self._last_timings = (time.perf_counter(), self._totals())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Batches of the whole run. TypeError without `epochs`: `steps_per_epoch` is the length of one."""
        if self.epochs is None:
            raise TypeError(
                "a Loader without epochs= has no end and no length; steps_per_epoch is the length of an epoch"
            )
        return self.epochs * self.steps_per_epoch

    def __next__(self) -> Batch:
        if self.epochs is not None and self._consumed >= len(self):
            raise StopIteration
        started = time.perf_counter()
        if self._decoding is None:
            self._decoding = Decoding(
                self._items(self._consumed), self._make_graph, self._decode_with_pillow, self.prefetch
            )
        try:
            item, (query, key, *more) = self._decoding.next()
        except StopIteration:
            raise RuntimeError("the loader has ended early") from None  # an end of training must not pass unnoticed
        self._consumed += 1
        self._wait_seconds += time.perf_counter() - started
        ids = torch.from_numpy(item.samples.draw.sample_ids).to(self.device, non_blocking=True)
        batch = Batch(query, key, ids)
        batch.more = tuple(more)
        return batch

    def _items(self, step: int) -> Iterator[EncodedBatch]:
        while self.epochs is None or step < len(self):
            epoch, within = divmod(step, self.steps_per_epoch)
            self._shards_ahead.reach(epoch, within)
            draw = self.order.draw(epoch, within, self.rank, self.world_size)
            yield self._with_views(self._reader.read(draw))
            step += 1

    def _with_views(self, samples: Samples) -> EncodedBatch:
        started = time.perf_counter()
        rows = [
            view_parameters.sample_views(
                recipe,
                seed=self.seed,
                epochs=samples.draw.epochs,
                sample_ids=samples.draw.sample_ids,
                view=view,
                heights=samples.heights,
                widths=samples.widths,
                image_size=self.image_size,
            )
            for view, recipe in enumerate(self.views)
        ]
        item = EncodedBatch(samples, lend(samples.encoded, rows, image_size=self.image_size, device=self.device))
        self._views_seconds += time.perf_counter() - started
        return item

    def _decode_with_pillow(self, item: EncodedBatch) -> EncodedBatch:
        return self._with_views(self._reader.decode_with_pillow(item.samples))

    def _make_graph(self, feed: Any) -> Graph:
        mean, std = self.views[0].mean_std
        return Graph(
            feed,
            num_views=len(self.views),
            image_size=self.image_size,
            batch_size=self.batch_size // self.world_size,
            device=self.device,
            dtype=self.dtype,
            num_threads=self.num_threads,
            prefetch=self.prefetch,
            hw_decoder_load=self.hw_decoder_load,
            mean=mean,
            std=std,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the batch last taken leaves the run: the same for every rank and world size; JSON will do."""
        return {
            "fingerprint": self.source.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "batches": self._consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that `state` knows last. ValueError when another order would follow from there."""
        for name, mine in self.state_dict().items():
            if name != "batches" and state[name] != mine:
                what = {"fingerprint": "the data (shards, counts, weights or lanes)"}.get(name, name)
                raise ValueError(
                    f"cannot continue: {what} was {state[name]} and is {mine}; keep it the same, or start a new run"
                )
        if self._decoding is not None:
            self._decoding.close()
            self._decoding = None
        self._consumed = int(state["batches"])

    def source_counts(self) -> dict[str, int]:
        """Samples that each source has given to all ranks together since the run began."""
        return dict(zip(self.source.names, self.order.source_counts(self._consumed)))

    def _totals(self) -> dict[str, float]:
        totals = {**self._reader.seconds, "views": self._views_seconds, "graph": 0.0, "starved": 0.0}
        totals["wait"] = self._wait_seconds
        return totals | (self._decoding.seconds if self._decoding else {})

    def timings(self) -> dict[str, float]:
        """Seconds since the last call. "read", "screen" and "views" are the reading thread's; "wait" is the caller's,
        and its parts are "graph", in DALI, and "starved", until the reading thread had a batch."""
        began, before = self._last_timings
        self._last_timings = now, totals = time.perf_counter(), self._totals()
        spent = {name: max(0.0, totals[name] - before[name]) for name in totals}
        return spent | {"elapsed": now - began}

    def bottleneck(self, timings: dict[str, float]) -> str:
        """The stage that holds the others up, by `timings()`: "consumer", "read", "screen", "views" or "graph"."""
        if timings["wait"] < 0.5 * timings["elapsed"]:
            return "consumer"
        if timings["starved"] > timings["graph"]:
            return max(("read", "screen", "views"), key=timings.__getitem__)
        return "graph"

    def close(self) -> None:
        if self._decoding is not None:
            self._decoding.close()
            self._decoding = None
        self._reader.close()
        self._storage.close()


def check_arguments(
    whole: dict[str, int],
    least: dict[str, int],
    shares: dict[str, float],
    device: str,
    dtype: torch.dtype,
    quarantine: str | Path | None,
) -> None:
    """ValueError that names what will not do: `whole` numbers below their `least`, `shares` that are none, and the
    rest as `Loader` takes it."""
    for name, number in whole.items():
        if isinstance(number, bool) or not isinstance(number, numbers.Integral):
            raise ValueError(f"{name} is {number!r}; it must be a whole number")
        if name in least and number < least[name]:
            raise ValueError(f"{name} is {number}; it must be at least {least[name]}")
    for name, share in shares.items():
        if not isinstance(share, numbers.Real) or not 0 <= share <= 1:
            raise ValueError(f"{name} is {share!r}; it must be a number from 0 to 1")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; it must be torch.float32, torch.bfloat16 or torch.float16")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it must be cpu, cuda or cuda:0, cuda:1 ...") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; views are made on cpu or cuda")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; torch sees {torch.cuda.device_count()} GPUs here")
    if quarantine is not None:
        path = Path(quarantine)
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if path.is_dir() or not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
            raise ValueError(f"quarantine is {path}; that is no file that can be written")


def usual_threads() -> int:
    """This process's share of the machine's cores; torchrun says how many processes share them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def main(arguments: Any) -> None:
    options = arguments.as_dict()
    data, steps, read_only, *_ = (options.pop(n) for n in ("data", "steps", "read_only", "cache_dir", "cache_gb"))
    loader = Loader(open_source(data, **cache_arguments(arguments)), **options)
    steps, share = steps or loader.steps_per_epoch, loader.batch_size // loader.world_size
    batches: Iterator[Any] = loader._items(0) if read_only else loader
    with saying("the first batch takes longest and is not counted"):
        next(batches)  # the graph is built, kernels are compiled, indexes are read
    loader.timings()
    began, processor = time.perf_counter(), time.process_time()
    for _ in track(range(steps), "loading", steps, unit="batches"):
        next(batches)
    if options["device"] != "cpu":
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    spent, images = loader.timings(), steps * share
    print(f"{images / seconds:,.0f} images/s: {steps} batches of {share} in {seconds:.1f} s")
    for name, value in {**spent, "cpu": processor}.items():
        if name != "elapsed" and value > 0:
            print(f"  {name:8} {value:8.2f} s  {1e6 * value / images:8.1f} us/image")
    if not read_only:
        print(f"bottleneck: {loader.bottleneck(spent)}")
    loader.close()


if __name__ == "__main__":
    IMPORTING.cancel()
    command(lambda: main(ARGUMENTS))
