"""The same file gives the same pixels, or the same refusal, on every path of the product.

Packed five ways (not at all, as it is, `--short_side`, `--convert`, both), and from each of them looked at in five ways
(training, judging, preview, gallery, contact sheet): whole pictures of `SIZE`, so that they can be compared.
"""

import itertools
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from awkward_images import (
    bombs,
    dark_scans,
    encode,
    known_images,
    not_images,
    quadrants,
    sixteen_bits,
    too_many_bands,
    without_black_and_white,
)
from PIL import Image
from sample_shards import write_shards
from torchvision.transforms import functional

from pipeline import preview
from pipeline.labelled import eval_batches
from pipeline.loader import Loader
from pipeline.make_shards import make_shards
from pipeline.packing import summary
from pipeline.packing.prepare import Options
from pipeline.pixels import views
from pipeline.pixels.decode import BadImage, decode
from pipeline.pixels.formats import EXTENSIONS
from pipeline.reading.order import make_order
from pipeline.sources.index import sample_key
from pipeline.sources.opening import open_source
from pipeline.sources.scan import read_index_text
from pipeline.sources.storage import Storage
from transfer.gallery import original

SIZE = 48
TOGETHER = 60  # images
OTHER_TURNS = ("turned_2", "turned_3", "turned_4", "turned_5", "turned_7")

Pictures = dict[str, np.ndarray]  # name of the file -> uint8 [SIZE, SIZE, 3]


def whole(image: Image.Image | np.ndarray) -> np.ndarray:
    """The central square of the whole picture, by torchvision."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(functional.center_crop(functional.resize(image, SIZE, antialias=True), [SIZE, SIZE]))


def whole_views(recipe: str, *, heights: Any, widths: Any, image_size: int, **_: Any) -> np.ndarray:
    """In place of `sample_views`: no crop, no colours changed."""
    return views.center_crops(heights, widths, image_size=image_size, resize=image_size)


def as_pixels(view: torch.Tensor) -> np.ndarray:
    """Normalised [n, 3, S, S] -> uint8 [n, S, S, 3]."""
    mean, std = (torch.tensor(three) for three in views.IMAGENET)
    return (view.permute(0, 2, 3, 1) * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


def looked_at(shards: Path, monkeypatch: pytest.MonkeyPatch, *, bad: bool = False) -> dict[str, Pictures]:
    """Way -> what each of the samples looks like, of those that are not left out. `bad`: some are. shards: their
    folder, or a card."""
    source, storage = open_source(str(shards)), Storage()
    (manifest,) = source.manifests
    keys = [
        sample_key(read_index_text(manifest, shard, storage), row)
        for shard in range(len(manifest.shards))
        for row in range(manifest.shards[shard].samples)
    ]
    names = [re.search(r"n\d{4}$", key)[0] for key in keys]  # type: ignore[index]
    ways: dict[str, Pictures] = {"judging": {}, "training": {}}
    for batch in eval_batches(source, image_size=SIZE, resize=SIZE, batch_size=64, max_bad_fraction=1):
        ways["judging"] |= {names[i]: pixels for i, pixels in zip(batch.sample_ids, as_pixels(batch.images))}
    with monkeypatch.context() as patch:
        patch.setattr(views, "sample_views", whole_views)
        loader = Loader(source, batch_size=len(names), image_size=SIZE, max_bad_fraction=1)
        query, key, ids = next(loader)
        loader.close()
    assert torch.equal(query, key)
    ways["training"] = {names[i]: pixels for i, pixels in zip(ids, as_pixels(query))}
    if not bad:  # else the preview ends with an error, and the others draw black in its place
        originals = [original(source, storage, i) for i in range(len(names))]
        ways["gallery"] = {name: whole(image) for name, image in zip(names, originals)}
        views_shown, originals_shown = previewed(shards, [image.size for image in originals], monkeypatch)
        ways["preview"] = {names[i]: pixels for i, pixels in views_shown.items()}
        ways["preview's original"] = {names[i]: pixels for i, pixels in originals_shown.items()}
        rows = [(f"{shards}/{s.path}", row) for s in manifest.shards for row in range(s.samples)]
        ways["contact sheet"] = {
            name: whole(summary._sample(*row, manifest.grey16_range)[0]) for name, row in zip(names, rows)
        }
    return ways


def previewed(
    shards: Path, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Cut from the sheet for each sample id: a view, and the central square of the original beside it. `sizes`: width
    and height of each; of small ones, and long and thin ones, the sheet shows something else."""
    output, cell, gap = shards / "views.png", preview.CELL, preview.GAP
    with monkeypatch.context() as patch:
        patch.setattr(preview, "sample_views", whole_views)
        preview.preview(str(shards), output, count=len(sizes), image_size=SIZE)
    ids = make_order(open_source(str(shards)), len(sizes), 0).draw(0, 0).sample_ids.tolist()
    views_shown, originals_shown = {}, {}
    with Image.open(output) as sheet:
        for i, sample_id in enumerate(ids):
            top = gap + i * (cell + preview.PRINT + gap)
            view = sheet.crop((cell + 2 * gap, top, 2 * (cell + gap), top + cell))
            views_shown[sample_id] = np.asarray(view.resize((SIZE, SIZE), Image.Resampling.NEAREST))
            side = min(sizes[sample_id]) * cell / max(sizes[sample_id])
            if side >= 2 * SIZE and min(sizes[sample_id]) >= SIZE:
                x, y = gap + (cell - side) / 2, top + (cell - side) / 2
                square = sheet.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
                originals_shown[sample_id] = np.asarray(square)
    return views_shown, originals_shown


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Between means of 4 x 4 pixels, the mean in levels of 255: in finer detail resizing twice, or at once by another
    filter, differs. Without the edges, where the preview draws its frames."""
    apart = one.astype(float)[2:-2, 2:-2] - other[2:-2, 2:-2]
    return float(np.abs(apart.reshape((SIZE - 4) // 4, 4, (SIZE - 4) // 4, 4, 3).mean(axis=(1, 3))).mean())


class File(NamedTuple):
    """shown: the right pixels uint8 [H, W, 3]; None where it must be refused."""

    name: str
    content: bytes
    shown: np.ndarray | None


def compare_all_paths(
    files: list[File],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    short_side: int,
    lossy: float,
    grey16: tuple[int, int] | None = None,
) -> list[str]:
    """What is wrong, a line each. `lossy`: how much (see `difference`) encoding or resizing again may change. grey16:
    black and white of 16-bit grey, given to make_shards or in a card."""
    packings = {
        "as it is": Options(grey16_range=grey16),
        "--short_side": Options(short_side=short_side, grey16_range=grey16),
        "--convert": Options(convert=True, grey16_range=grey16),
        "--short_side --convert": Options(short_side=short_side, convert=True, grey16_range=grey16),
    }
    names = [f"n{i:04d}" for i in range(len(files))]
    expected = {name: whole(file.shown) for name, file in zip(names, files) if file.shown is not None}
    images = folder / "images"
    images.mkdir()
    named = [(f"{name}.{file.name.rpartition('.')[2]}", file.content) for name, file in zip(names, files)]
    for name, content in named:
        (images / name).write_bytes(content)
    write_shards(folder / "unpacked", [(name, content, None) for name, content in named], per_shard=100)
    unpacked = folder / "unpacked"
    if grey16 is not None:
        unpacked = folder / "card.yaml"
        unpacked.write_text(f"sources: [{{data: unpacked, grey16_range: {list(grey16)}}}]")
    ways = {("unpacked", way): seen for way, seen in looked_at(unpacked, monkeypatch, bad=True).items()}
    for packing, options in packings.items():
        make_shards(str(images), str(folder / packing), options=options)
        ways |= {(packing, way): seen for way, seen in looked_at(folder / packing, monkeypatch).items()}
    faults = []
    for (packing, way), seen in ways.items():
        known = expected.keys() & (seen.keys() if way == "preview's original" else expected.keys())
        for name in sorted(known ^ seen.keys()):
            verdict = "used" if name in seen else "left out"
            faults.append(f"{packing}, {way}: {files[names.index(name)].name} is {verdict}")
        for name in known & seen.keys():
            file = files[names.index(name)]
            # The sheets have smaller pictures, which are resized once more.
            exact = packing in ("unpacked", "as it is") and way not in ("preview's original", "contact sheet")
            allowed = 0.5 if exact else lossy
            if (found := difference(seen[name], expected[name])) > allowed:
                faults.append(f"{packing}, {way}: {file.name} differs by {found:.2f}")
        if way == "training" and any((seen[n] != ways[packing, "judging"][n]).any() for n in known & seen.keys()):
            faults.append(f"{packing}: training and judging differ")
    return faults


@pytest.mark.slow
def test_known_images_and_what_must_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other turns are known from test_decode.py.
    files = [File(name, *known) for name, known in known_images().items() if name[:8] not in OTHER_TURNS]
    refused = bombs() | not_images() | without_black_and_white() | too_many_bands() | damaged()
    files += [File(name, content, None) for name, content in refused.items()]
    assert compare_all_paths(files, tmp_path, monkeypatch, short_side=56, lossy=3) == []


@pytest.mark.slow
def test_the_range_of_12_bit_scans_is_the_same_on_all_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set once, by make_shards or a card; packing again from shards of ours keeps it."""
    ramp = (np.linspace(0, 4095, 120) // 16).astype(np.uint8)[None, :, None].repeat(60, 0).repeat(3, 2)
    files = [File(name, content, ramp) for name, content in dark_scans().items()]
    files += [File("grey12.tif", sixteen_bits()["grey12.tif"], ramp)]
    files += [File("plain.png", encode(quadrants(), "PNG"), np.asarray(quadrants()))]
    files += [File("infrared.tif", too_many_bands()["infrared.tif"], None)]
    assert compare_all_paths(files, tmp_path, monkeypatch, short_side=56, lossy=3, grey16=(0, 4095)) == []
    make_shards(str(tmp_path / "as it is" / "*.tar"), str(tmp_path / "again"), options=Options())
    once, again = (open_source(str(tmp_path / name)).manifests[0] for name in ("as it is", "again"))
    assert once.grey16_range == again.grey16_range == (0, 4095)
    assert replace(once, grey16_range=None).fingerprint != once.fingerprint, "other pixels are other data"


def damaged() -> dict[str, bytes]:
    """Cut short, or with a wrong checksum."""
    jpeg, png = encode(quadrants(), "JPEG"), bytearray(encode(quadrants(), "PNG"))
    cut = bytes(png[: len(png) // 2])
    png[png.index(b"IDAT") + 20] ^= 1
    return {"cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": cut, "checksum.png": bytes(png), "empty.jpg": b""}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_images(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of the shared data, of CIFAR-10 the first ones; the right pixels are those of `decode`.

    Every twelfth of the ordinary JPEGs; all of them, which takes five minutes, with EVERY_IMAGE=1.
    """
    paths = [path for path in sorted(shared_data.rglob("*")) if path.suffix.lower().lstrip(".") in EXTENSIONS]
    if not os.environ.get("EVERY_IMAGE"):
        ordinary = [path for path in paths if "troublesome" not in path.parts and path.suffix.lower() != ".png"]
        paths = sorted(set(paths) - set(ordinary) | set(ordinary[::12]))
    contents = {path.name: path.read_bytes() for path in paths}
    for tar in sorted(shared_data.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in itertools.islice((m for m in members if m.name.endswith(".png")), 20):
                contents[member.name] = members.extractfile(member).read()  # type: ignore[union-attr]
    files = []
    for name, content in contents.items():
        try:
            files.append(File(name, content, decode(np.frombuffer(content, np.uint8))))
        except BadImage:
            files.append(File(name, content, None))
    assert len(files) > 100
    faults = []
    for begin in range(0, len(files), TOGETHER):  # the preview's sheets would be too long
        folder = tmp_path / str(begin)
        folder.mkdir()
        faults += compare_all_paths(files[begin : begin + TOGETHER], folder, monkeypatch, short_side=160, lossy=8)
        shutil.rmtree(folder)
    assert faults == [], "\n".join(faults)
