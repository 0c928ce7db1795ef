"""The graph: formats, shapes, batches of any size, errors and what follows them, the same bytes in any surroundings."""

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cpu_environment
from PIL import Image

from pipeline.pixels import kernels_cpu, views
from pipeline.pixels.graph import DecodeError, Graph, Lent, lend
from pipeline.pixels.views import center_crops, sample_views

SIZE = 48


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


SIZES = [(60 + 13 * i % 90, 50 + 29 * i % 110) for i in range(12)]  # width, height
ENCODED = [encode(picture(*size, seed=i)) for i, size in enumerate(SIZES)]


def rows_of(ids: list[int], view: int = 0, recipe: str = "v2") -> np.ndarray:
    return sample_views(
        recipe,
        seed=3,
        epochs=np.zeros(len(ids), int),
        sample_ids=ids,
        view=view,
        heights=[SIZES[i][1] for i in ids],
        widths=[SIZES[i][0] for i in ids],
        image_size=SIZE,
        crop_min=0.2,
    )


def graph_over(batches: list[tuple[Any, ...]], **changes: Any) -> Graph:
    feed = iter(batches)
    arguments: dict[str, Any] = {
        "num_views": len(batches[0]) - 1,
        "image_size": SIZE,
        "device": "cpu",
        "num_threads": 2,
    }
    arguments |= {"batch_size": max(len(b[0]) for b in batches), "dtype": torch.float32} | changes

    def lent() -> Lent:
        encoded, *rows = next(feed)
        return lend(encoded, rows, image_size=arguments["image_size"], device=arguments["device"])

    return Graph(lent, **arguments)


def drain(graph: Graph) -> Iterator[tuple[torch.Tensor, ...]]:
    try:
        while True:
            yield graph.run()
    except StopIteration:
        graph.close()


def batch(ids: list[int]) -> tuple[Any, ...]:
    return [ENCODED[i] for i in ids], rows_of(ids, 0), rows_of(ids, 1)


def test_two_views_channels_last_and_a_smaller_last_batch() -> None:
    out = list(drain(graph_over([batch([0, 1, 2, 3]), batch([4, 5, 6, 7]), batch([8])])))
    assert [len(query) for query, _ in out] == [4, 4, 1]
    for query, key in out:
        for view in (query, key):
            assert view.shape[1:] == (3, SIZE, SIZE) and view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(query, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_dtypes(dtype: torch.dtype) -> None:
    exact, rounded = (graph_over([batch([0, 1])], dtype=d).run()[0] for d in (torch.float32, dtype))
    assert rounded.dtype == dtype and rounded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(exact.to(dtype), rounded)


def test_bytes_do_not_depend_on_batch_threads_or_restart() -> None:
    together = torch.cat([query for query, _ in drain(graph_over([batch(list(range(12)))]))])
    for sizes, threads in (([5, 5, 2], 1), ([1] * 12, 3)):
        starts = np.cumsum([0, *sizes])
        batches = [batch(list(range(a, b))) for a, b in itertools.pairwise(starts)]
        apart = torch.cat([query for query, _ in drain(graph_over(batches, num_threads=threads))])
        assert apart.numpy().tobytes() == together.numpy().tobytes()


def test_batches_handed_out_stay_what_they_are() -> None:
    graph = graph_over([batch([i % 12, (i + 1) % 12]) for i in range(20)])
    kept = [(query, query.clone()) for query, _ in drain(graph)]
    assert len(kept) == 20
    assert all(torch.equal(query, copy) for query, copy in kept)


def test_an_undecodable_sample_is_an_error_and_the_next_batches_are_right() -> None:
    broken = batch([3, 4])
    broken[0][1] = np.frombuffer(b"<html>not an image, but long enough to look at</html>", np.uint8)
    good = [batch([i, i + 1]) for i in range(6)]
    graph = graph_over([good[0], broken, *good[1:]])
    results, errors = [], 0
    while True:
        try:
            results.append(graph.run())
        except DecodeError:
            errors += 1
        except StopIteration:
            break
    graph.close()
    assert errors == 1
    expected = list(drain(graph_over(good)))
    assert len(results) == len(expected)
    for a, b in zip(results, expected):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_formats() -> None:
    """Lossless formats give the same pixels as Pillow, to the byte; JPEG in all its kinds nearly so."""
    image = picture(50, 40)
    lossless = [encode(image, f) for f in ("PNG", "BMP", "PPM", "TIFF")] + [encode(image, "WEBP", lossless=True)]
    lossy = [encode(image, quality=95, subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)]
    lossy.append(encode(image.convert("L"), "JPEG", quality=95))
    n = len(lossless + lossy)
    rows = center_crops([40] * n, [50] * n, 40, 40)
    graph = graph_over([(lossless + lossy, rows)], image_size=40, mean=(0, 0, 0), std=(1, 1, 1))
    (found,) = graph.run()
    graph.close()
    out = np.empty((40, 40, 3), np.float32)
    for i, data in enumerate(lossless + lossy):
        decoded = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        kernels_cpu.render(out, decoded, rows[0], np.array([[0, 0, 0], [1, 1, 1]], np.float32))
        difference = np.abs(found[i].permute(1, 2, 0).numpy() - out).mean() * 255
        assert difference <= (0 if i < len(lossless) else 0.6)
    red, green, blue = found[-1]
    assert torch.equal(red, green) and torch.equal(green, blue), "grey is three equal channels"


def test_orientation_is_turned_upright_and_boxes_are_of_the_upright_image() -> None:
    image = picture(60, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = image.transpose(Image.Transpose.ROTATE_270)
    encoded = [encode(image, quality=100, subsampling=0, exif=exif), encode(upright, quality=100, subsampling=0)]
    graph = graph_over([(encoded, center_crops([60, 60], [30, 30], 30, 30))], image_size=30)
    (views_,) = graph.run()
    graph.close()
    assert (views_[0] - views_[1]).abs().mean() < 0.02


@pytest.mark.parametrize("recipe", views.RECIPES)
def test_tiny_and_extreme_images(recipe: str) -> None:
    sizes = [(1, 1), (2, 1), (1, 3), (3, 5), (5, 3), (7, 7), (1, 700), (900, 2), (2000, 1500)]
    encoded = [encode(picture(*size), "PNG") for size in sizes]
    widths, heights = zip(*sizes)
    n = len(sizes)
    batches = [(encoded, center_crops(heights, widths, SIZE, SIZE + 8))]
    for epoch in range(4):
        rows = sample_views(
            recipe, seed=0, epochs=[epoch] * n, sample_ids=range(n), view=0, heights=heights, widths=widths,
            image_size=SIZE, crop_min=0.08,
        )  # fmt: skip
        batches.append((encoded, rows))
    for (view,) in drain(graph_over(batches)):
        assert view.isfinite().all() and view.abs().max() < 3
        assert (view[0].std(dim=(1, 2)) < 1e-3).all()  # the view of one pixel is of one colour


def test_a_row_for_another_image_reads_no_memory_outside_this_one() -> None:
    out = np.empty((SIZE, SIZE, 3), np.float32)
    image, norm = np.full((20, 30, 3), 128, np.uint8), np.array([[0, 0, 0], [1, 1, 1]], np.float32)
    for row in (*center_crops([3000, 20], [40, 4000], SIZE, SIZE), *rows_of([0, 5, 7])):
        kernels_cpu.render(out, image, row, norm)
        assert np.ptp(out, axis=(0, 1)).max() < 0.01


def test_kernels_know_the_columns() -> None:
    """numba's cache looks at kernels_cpu.py alone: it names the columns it was compiled with."""
    assert kernels_cpu.COLUMNS == views.COLUMNS


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("what", ["", "--graph", "--compile"])
def test_the_gpu_path_without_a_gpu(what: str) -> None:
    """The kernels in Triton's interpreter against kernels_cpu (the same bytes, within a level where there is a blur);
    with them the whole graph, DALI's CPU operators in place of its GPU ones; and compiled for Hopper."""
    pytest.importorskip("triton")
    if what == "--compile" and os.uname().machine != "x86_64":
        pytest.skip("Triton brings its assembler for x86-64")
    child = Path(__file__).with_name("triton_interpreted.py")
    env = cpu_environment(**({} if what == "--compile" else {"TRITON_INTERPRET": "1"}))
    result = subprocess.run([sys.executable, str(child), what], env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


DECODING = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\n... encountered:\n\n"
RESIZING = DECODING.replace("decoders.image", "resize")


@pytest.mark.parametrize(
    ("says", "is_the_images"),
    [
        (DECODING + "nvImageCodec failure: '#4'\nCurrent pipeline object is no longer valid.", True),
        (DECODING + "Failed to decode sample #1 : \nCurrent pipeline object is no longer valid.", True),
        (DECODING + "nvImageCodec failure: '#5'", False),  # its allocator
        (DECODING + "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", False),
        (DECODING + "Can't allocate 77070336 bytes on device 0.", False),
        (RESIZING + "Failed to decode sample", False),
        ("CUDA runtime API error cudaErrorIllegalAddress (700)", False),
    ],
)
def test_errors_of_the_gpu_are_not_taken_for_the_images(
    says: str, is_the_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_over([batch([0, 1])])
    run = graph._pipeline.run

    def fails(stream: object) -> Any:
        run(stream)
        raise RuntimeError(says)

    monkeypatch.setattr(graph._pipeline, "run", fails)
    with pytest.raises(RuntimeError) as caught:
        graph.run()
    assert (type(caught.value) is DecodeError) == is_the_images
    graph.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    batches = [batch([0, 1, 2, 3]), batch([4, 5, 6, 7]), batch([8])]
    expected = list(drain(graph_over(batches)))
    found = list(drain(graph_over(batches, device="cuda:0", dtype=dtype)))
    assert len(found) == 3
    for cpu, gpu in zip(expected, found):
        for a, b in zip(cpu, gpu):
            assert b.is_cuda and b.dtype == dtype and b.is_contiguous(memory_format=torch.channels_last)
            assert (a - b.cpu().float()).abs().mean() < 2 / 255 / 0.225 + 0.01


@pytest.mark.gpu
def test_on_the_gpu_nothing_waits_for_the_host() -> None:
    graph = graph_over([batch([0, 1, 2, 3]) for _ in range(6)], device="cuda:0")
    graph.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        graph.close()
