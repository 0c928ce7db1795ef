"""A picture of what the encoder will see: originals with their crops drawn in, both views, their parameters below.

    python -m pipeline.preview --data shards/photos --output views.png --views v2

The samples and views are those of the first step of `--epoch` of a run with this seed and recipe.
"""

from pathlib import Path
from typing import Any

from pipeline.command import add_cache_flags, cache_arguments, command
from pipeline.pixels.view_recipe import AnyViews, MeanStd, add_view_flags, view_pair
from pipeline.pixels.views import Views, describe, sample_views

if __name__ == "__main__":
    # Before torch and DALI, whose import takes seconds: --help and a mistyped flag answer at once.
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m pipeline.preview",
        description="Draws what the encoder will see: originals, both views, and the parameters of each view.",
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of shards, tar, brace pattern, URL or YAML card")
    add("--output", required=True, help="the picture to write, .png")
    add_view_flags(parser)
    add("--count", type=int, default=6, help="number of images on the sheet")
    add("--image_size", type=int, default=224, help="side of a view in pixels")
    add("--seed", type=int, default=0, help="seed of order and views")
    add("--epoch", type=int, default=0, help="epoch whose first images are shown")
    add_cache_flags(parser)
    ARGUMENTS = parser.parse_args()

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.pixels.decode import picture
from pipeline.progress import saying
from pipeline.reading.order import make_order
from pipeline.reading.reader import Reader
from pipeline.sources.manifest import CachePlace
from pipeline.sources.opening import open_source
from pipeline.sources.storage import storage_for

CELL = 240  # side of a picture on the sheet, in pixels
PRINT = 62  # height of the small print below it
GAP = 12
COLOURS = ((220, 40, 40), (40, 90, 230))  # query, key
LEGEND = (
    "red: query, blue: key. crop: width x height at left,top, in pixels of the original; flip: mirrored",
    "b c s: factor on brightness, contrast, saturation; h: shift of hue, 1 is once round the colour circle; in the",
    "order in which they are applied. grey: greyscale; blur: sigma of the Gaussian blur, in pixels of the view;",
    "solarise: levels of 255 from it on are inverted",
)
FOOT = 20 * len(LEGEND) + GAP  # height of the legend, in pixels


def preview(
    data: str,
    output: str | Path,
    *,
    views: AnyViews = "v2",
    key_views: AnyViews | None = None,
    count: int = 6,
    image_size: int = 224,
    crop_min: float | None = None,
    seed: int = 0,
    epoch: int = 0,
    cache_dir: str | None = None,
    cache_bytes: int = CachePlace.limit,
) -> None:
    """Writes the sheet: `count` rows of original, query and key. ValueError when the source has fewer samples, and as
    `view_pair`."""
    recipes = view_pair(views, key_views, crop_min=crop_min)
    source = open_source(data, cache_dir=cache_dir, cache_bytes=cache_bytes)
    storage = storage_for(source)
    reader = Reader(source, storage)
    with saying(f"reading {count} images of {data}"):
        samples = reader.read(make_order(source, count, seed).draw(epoch, 0))
    rows = [
        sample_views(
            recipe,
            seed=seed,
            epochs=samples.draw.epochs,
            sample_ids=samples.draw.sample_ids,
            view=view,
            heights=samples.heights,
            widths=samples.widths,
            image_size=image_size,
        )
        for view, recipe in enumerate(recipes)
    ]
    pixels = _rendered(samples.encoded, rows, image_size, recipes[0].mean_std)
    labels = reader.labels(samples.draw).tolist()
    width, height = 3 * CELL + 4 * GAP, count * (CELL + PRINT + GAP) + GAP + FOOT
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i in range(count):
        top = GAP + i * (CELL + PRINT + GAP)
        original = picture(samples.encoded[i])
        scale = CELL / max(original.size)
        shown = original.resize([max(1, round(side * scale)) for side in original.size])
        for view, colour in enumerate(COLOURS):
            y, x, h, w = (float(v) * scale for v in rows[view][i][:4])
            ImageDraw.Draw(shown).rectangle((x, y, x + w - 1, y + h - 1), outline=colour, width=2)
        sheet.paste(shown, (GAP + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
        text = f"sample {samples.draw.sample_ids[i]}\n{original.width}x{original.height}"
        if labels[i] >= 0:
            text += "\nclass " + fitted(source.class_name(labels[i]), CELL - 40, font)
        draw.text((GAP, top + CELL + 2), text, "black", font)
        for view, colour in enumerate(COLOURS):
            left = GAP + (view + 1) * (CELL + GAP)
            small = image_size < CELL / 2  # few pixels: shown as squares
            resample = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
            sheet.paste(Image.fromarray(pixels[view][i]).resize((CELL, CELL), resample), (left, top))
            draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=colour, width=2)
            draw.text((left, top + CELL + 2), describe(rows[view][i]), colour, font, spacing=1)
    draw.text((GAP, height - FOOT), "\n".join(LEGEND), "black", font)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    reader.close()
    storage.close()


def _rendered(encoded: list[np.ndarray], rows: list[Views], image_size: int, mean_std: MeanStd) -> list[np.ndarray]:
    """The pixels of each view: uint8 [n, S, S, 3]."""
    with saying("importing torch and DALI"):
        import torch

        from pipeline.pixels.graph import Graph, lend
    mean, std = mean_std
    batches = iter([lend(encoded, rows, image_size=image_size, device="cpu")])
    graph = Graph(
        lambda: next(batches),
        num_views=len(rows),
        image_size=image_size,
        batch_size=len(encoded),
        device="cpu",
        dtype=torch.float32,
        num_threads=2,
        mean=mean,
        std=std,
    )
    normalised = [view.permute(0, 2, 3, 1) for view in graph.run()]
    graph.close()
    levels = [(view * torch.tensor(std) + torch.tensor(mean)) * 255 for view in normalised]
    return [view.round().clamp(0, 255).to(torch.uint8).numpy() for view in levels]


def fitted(text: str, width: float, font: Any) -> str:
    """As much of a text as `width` pixels hold, on one line, without signs that cannot be drawn: class names are the
    names of somebody's folders."""
    text = "".join(sign if sign.isprintable() else " " for sign in text[:300])
    while text and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def main(arguments: Any) -> None:
    options = arguments.as_dict()
    data, output, *_ = (options.pop(name) for name in ("data", "output", "cache_dir", "cache_gb"))
    preview(data, output, **options, **cache_arguments(arguments))
    print(output)


if __name__ == "__main__":
    command(lambda: main(ARGUMENTS))
