"""The loader's views on a GPU beside those on the CPU, of images as users have them. The same comparison runs on the
CPU with another number of threads, so that it is known to work before there is a GPU."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awkward_images import encode, known_images, not_images, quadrants
from PIL import Image
from sample_shards import write_shards

import pipeline.pixels.graph
from pipeline.loader import Loader
from pipeline.pixels import views
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source

SIZE = 96
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def forms() -> dict[str, bytes]:
    """A photograph-like picture in the forms that JPEG has, and in other formats."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
    found = {
        "baseline.jpg": encode(image, "JPEG"),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "progressive_444.jpg": encode(image, "JPEG", progressive=True, subsampling=0),
        "halved_across.jpg": encode(image, "JPEG", subsampling=1),
        "odd_size.jpg": encode(image.crop((0, 0, 397, 291)), "JPEG"),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "png.png": encode(image, "PNG"),
        "webp.webp": encode(image, "WEBP"),
        "bmp.bmp": encode(image, "BMP"),
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"turned_{orientation}.jpg"] = encode(image, "JPEG", exif=exif)
    return found


def views_of(source: Source, device: str, threads: int, **options: Any) -> dict[int, np.ndarray]:
    """Sample id -> its query view float32 [SIZE, SIZE, 3] in levels of 255, over an epoch."""
    mean, std = (torch.tensor(three) for three in views.IMAGENET)
    loader = Loader(source, image_size=SIZE, device=device, num_threads=threads, max_bad_fraction=1, **options)
    found = {}
    for batch in itertools.islice(loader, loader.steps_per_epoch):
        pixels = (batch.query.cpu().float().permute(0, 2, 3, 1) * std + mean) * 255
        found |= dict(zip(batch.sample_ids.tolist(), pixels.numpy()))
    loader.close()
    return found


def compared(
    files: dict[str, bytes], device: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], int]:
    """File name -> levels of 255 between its views on the device and the CPU, of those that neither leaves out; and how
    many batches of the device Pillow had to decode."""
    by_pillow, real = list[str](), Loader._decode_with_pillow

    def noting(self: Loader, item: Any) -> Any:
        by_pillow.append(self.device)
        return real(self, item)

    monkeypatch.setattr(Loader, "_decode_with_pillow", noting)
    every = [(name, content, None) for name, content in files.items()]
    source = open_source(str(write_shards(folder / "shards", every, 1000)))
    expected, found = (
        views_of(source, where, threads, batch_size=len(every), quarantine=folder / f"{threads}.jsonl")
        for where, threads in (("cpu", 2), (device, 1))
    )
    assert expected.keys() == found.keys()
    apart = {every[i][0]: float(np.abs(found[i] - expected[i]).mean()) for i in found}
    worst = sorted(apart.items(), key=lambda item: -item[1])[:5]
    print(
        f"\n{len(apart)} of {len(files)} images used, {by_pillow.count(device)} batches by Pillow; levels of 255 apart:"
    )
    print(f"mean {np.mean(list(apart.values())):.3f}, worst", ", ".join(f"{name} {value:.3f}" for name, value in worst))
    return apart, by_pillow.count(device)


@pytest.mark.parametrize("device", DEVICES)
def test_every_form_of_image(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned, progressive, grey, CMYK and the like, with every colour op: at most two levels apart on average, as
    photographs are (test_parity.py)."""
    apart, by_pillow = compared(forms(), device, tmp_path, monkeypatch)
    assert len(apart) == len(forms())
    assert max(apart.values()) < 2
    assert not by_pillow


@pytest.mark.parametrize("device", DEVICES)
def test_awkward_and_bad_files(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hard edges, where the two filters differ: only that they are turned and converted alike. Those that are no
    images are left out, on the device as on the CPU."""
    known = {name: content for name, (content, _) in known_images().items() if name[:6] != "turned"}
    bad = not_images() | {"cut.jpg": encode(quadrants(), "JPEG")[:700], "empty.jpg": b""}
    apart, _ = compared(known | bad, device, tmp_path, monkeypatch)
    assert apart.keys() == known.keys()
    assert max(apart.values()) < 8
    lines = [(tmp_path / f"{threads}.jsonl").read_text().splitlines() for threads in (2, 1)]
    assert sorted(lines[0]) == sorted(lines[1])
    assert len(lines[0]) == len(bad)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_does_not_decode_goes_through_pillow(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is built anew on the device, and nothing is lost, doubled or in another place."""
    files = [(f"{i}_{name}", content, None) for i in range(3) for name, content in forms().items()]
    source = open_source(str(write_shards(tmp_path / "shards", files, 1000)))
    expected = views_of(source, device, 2, batch_size=6)
    graph = pipeline.pixels.graph.Graph
    run, runs = graph.run, list[int]()

    def failing(self: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            self._lent.clear()
            raise pipeline.pixels.graph.DecodeError("made up")
        return run(self)

    monkeypatch.setattr(graph, "run", failing)
    found = views_of(source, device, 2, batch_size=6)
    assert len(runs) == len(files) // 6 + 1
    assert expected.keys() == found.keys()
    apart = [float(np.abs(found[i] - expected[i]).mean()) for i in found]
    print(f"\nby Pillow beside the device's decoder, levels of 255 apart: worst of {len(apart)} {max(apart):.3f}")
    assert max(apart) < 2
