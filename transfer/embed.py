"""Features of every image of a source, for whatever comes after: kNN, classifiers, neighbours, other libraries.

    python -m transfer.embed --run runs/photos --data shards/photos --output features/photos

Every image, resized and centre-cropped, goes through the encoder in eval mode once, and with `--views N` as many
augmented views of it. `transfer/embedding.py` says what is then in the folder. Under torchrun or `accelerate launch`
the ranks share the images. The same command goes on where it was killed.
"""

import json
import sys
import time

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from pipeline.command import add_cache_flags, cache_arguments, command
from transfer.arguments import (
    add_encoder_flags,
    add_features_flag,
    add_precision_flag,
    encoder_arguments,
    on_this_machine,
)


def parse() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.embed",
        description="Features of every image of a source as .npy and a table; the last line is one JSON object.",
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("--data", type=str, required=True, help="source to embed (folder of shards, URL, card); labels are optional")
    add("--output", type=on_this_machine, required=True, help="folder of the features, which all machines see")
    add_features_flag(parser)
    add(
        "--views", type=NonNegativeInt, default=0, help="augmented views of each image to embed as well, as in training"
    )
    add(
        "--resize",
        type=PositiveInt | None,
        help="short side before the crop; by default 256 for 224, nothing to crop below 96",
    )
    add("--batch_size", type=PositiveInt, default=256, help="images per forward pass and rank")
    add_precision_flag(parser, "features are always fp32")
    add("--num_threads", type=PositiveInt | None, help="decoding threads a rank; its share of the cores when left out")
    add("--seed", type=int, default=0, help="decides the augmented views")
    add_cache_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    # Not before: torch takes seconds, and --help and a mistyped flag answer at once.
    from pipeline.sources.opening import open_source
    from trainer.joining import joined
    from transfer.features import embed_source
    from transfer.load import load_encoder

    started = time.monotonic()
    loaded = load_encoder(args.run, **encoder_arguments(args))
    source = open_source(args.data, **cache_arguments(args))
    with joined() as ranks:
        about, embedded = embed_source(
            loaded,
            source,
            args.output,
            features=args.features,
            views=args.views,
            resize=args.resize,
            batch_size=args.batch_size,
            precision=args.precision,
            num_threads=args.num_threads,
            seed=args.seed,
            notes={"run": loaded.name, "step": loaded.step, "data": args.data, "untrained": args.untrained},
            ranks=ranks,
            progress=True,
        )
    if ranks.rank == 0:
        if not embedded:
            print(f"{args.output} was whole already", file=sys.stderr)
        seconds = time.monotonic() - started
        result = {name: about[name] for name in ("samples", "dimensions", "views", "features", "run", "step")}
        result |= {"left_out": about["in_source"] - about["samples"], "output": str(args.output)}
        print(json.dumps(result | {"images_now": embedded, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    command(main, resumes=True)
