"""Mean and standard deviation of a source's channels, by which views are then normalised.

    python -m pipeline.statistics --data shards/photos

Over the central squares of images that are spread evenly over the source, always the same ones. The pixels are summed
as whole numbers, so neither threads nor batches change a digit.
"""

from typing import Any

from pipeline.command import add_cache_flags, cache_arguments, command
from pipeline.progress import say_if_slow

if __name__ == "__main__":
    # Before torch and DALI, whose import takes seconds: --help and a mistyped flag answer at once.
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveInt

    parser = ArgumentParser(
        prog="python -m pipeline.statistics",
        description="Measures mean and standard deviation of the channels, pixels from 0 to 1; the last line is one "
        "JSON object, in which `flags` is what train.py and the commands in transfer/ take.",
    )
    parser.add_argument("--data", required=True, help="folder of shards, tar, brace pattern, URL or YAML card")
    parser.add_argument("--images", type=PositiveInt, default=10_000, help="images that are looked at, at most")
    parser.add_argument("--image_size", type=PositiveInt, default=224, help="side of the central square in pixels")
    parser.add_argument("--num_threads", type=PositiveInt | None, help="decoding threads; all cores when left out")
    add_cache_flags(parser)
    ARGUMENTS = parser.parse_args()
    IMPORTING = say_if_slow("importing torch and DALI")

import json

import torch

from pipeline.labelled import eval_batches
from pipeline.progress import Progress
from pipeline.reading.order import spread
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source

RUNS = 64  # of neighbours, which are cheap to read
DIGITS = 4
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # pixels stay as they are


def statistics(
    source: Source,
    *,
    images: int = 10_000,
    image_size: int = 224,
    num_threads: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """{"mean", "std": three numbers each, of pixels from 0 to 1; "images": how many were looked at}.

    Each image counts with its central square, its short side resized to `image_size`. ValueError when a channel is the
    same in all pixels, by which nothing can be normalised.
    """
    wanted = min(images, source.samples)
    total, squares = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    seen = 0
    batches = eval_batches(
        source,
        image_size=image_size,
        resize=image_size,
        batch_size=64,
        mean_std=RAW,
        num_threads=num_threads,
        max_bad_fraction=1.0,  # the training judges
        ranges=spread(source.samples, wanted, RUNS),
    )
    with Progress("measuring" if progress else "", wanted, unit="images") as shown:
        for batch in batches:
            levels = batch.images.mul(255).round().to(torch.int64)  # [n, 3, S, S]
            total += levels.sum((0, 2, 3))
            squares += levels.square().sum((0, 2, 3))
            seen += len(levels)
            shown.advance(len(levels))
    if not seen:
        raise ValueError(f"none of the {wanted:,} images can be decoded")
    pixels = seen * image_size**2
    mean = total.double() / pixels
    std = (squares.double() / pixels - mean.square()).clamp(min=0).sqrt()
    rounded = {name: [round(v, DIGITS) for v in (x / 255).tolist()] for name, x in (("mean", mean), ("std", std))}
    if min(rounded["std"]) <= 0:
        raise ValueError(f"the standard deviation of a channel is 0 over {seen:,} images: {rounded}")
    return rounded | {"images": seen}


def main(arguments: Any) -> None:
    source = open_source(arguments.data, **cache_arguments(arguments))
    about = {"images": arguments.images, "image_size": arguments.image_size, "num_threads": arguments.num_threads}
    found = statistics(source, **about, progress=True)
    words = {name: " ".join(map(str, found[name])) for name in ("mean", "std")}
    print(json.dumps(found | {"flags": f"--mean {words['mean']} --std {words['std']}"}))


if __name__ == "__main__":
    IMPORTING.cancel()
    command(lambda: main(ARGUMENTS))
