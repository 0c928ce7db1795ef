"""Features of every image of a source, for whatever comes after: kNN, classifiers, neighbours, other libraries.

    python -m transfer.embed --run runs/photos --data shards/photos --output features/photos

Every image, resized and centre-cropped, goes through the encoder in eval mode once, and with `--views N` as many
augmented views of it. `transfer/embedding.py` says what is then in the folder. Under torchrun or `accelerate launch`
the ranks share the images. The same command goes on where it was killed.
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.embed()  # before the imports that take seconds

import functools
import json
import sys
import time

from jsonargparse import Namespace

from pipeline.command import cache_arguments, command
from pipeline.sources.opening import open_source
from trainer.joining import joined
from transfer.arguments import encoder_arguments
from transfer.features import embed_source
from transfer.load import load_encoder


def main(args: Namespace) -> None:
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
    command(functools.partial(main, ARGUMENTS), resumes=True)
