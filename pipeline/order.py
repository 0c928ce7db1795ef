"""Prints which samples a step holds: `python -m pipeline.order --data D --batch_size B --start T --steps N`."""

import json

from pipeline.command import add_cache_flags, cache_arguments, command


def main() -> None:
    from jsonargparse import ArgumentParser

    from pipeline.reading.order import make_order
    from pipeline.reading.quality import shuffle_quality
    from pipeline.sources.opening import open_source

    parser = ArgumentParser(
        prog="python -m pipeline.order", description="Prints the sample ids of steps, one JSON object a line."
    )
    parser.add_argument("--data", required=True, help="folder of shards, tar, brace pattern, URL or YAML card")
    parser.add_argument("--batch_size", type=int, required=True, help="global batch size")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--epoch", type=int, default=0, help="epoch to look at")
    parser.add_argument("--start", type=int, default=0, help="first step within the epoch")
    parser.add_argument("--steps", type=int, default=1, help="number of steps")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks")
    parser.add_argument("--rank", type=int, default=None, help="print this rank's share; the whole batch unless told")
    parser.add_argument("--quality", action="store_true", help="print instead how well these steps are shuffled")
    add_cache_flags(parser)
    options = parser.parse_args()

    source = open_source(options.data, **cache_arguments(options))
    order = make_order(source, options.batch_size, options.seed)
    if options.quality:
        result = shuffle_quality(source, order, epoch=options.epoch, start=options.start, steps=options.steps)
        print(json.dumps(result))
        return
    ranks = (0, 1) if options.rank is None else (options.rank, options.world_size)
    for step in range(options.start, options.start + options.steps):
        epochs, within = divmod(step, order.steps_per_epoch)
        ids = order.draw(options.epoch + epochs, within, *ranks).sample_ids
        print(json.dumps({"step": step, "ids": ids.tolist()}))


if __name__ == "__main__":
    command(main)
