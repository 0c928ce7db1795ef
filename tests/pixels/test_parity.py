"""Our pixels against torchvision's functional ops on PIL images, given the same parameters; in levels of 255.

`pytest -s tests/pixels/test_parity.py` prints the table that the README shows: mean and largest mean over the images.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from pipeline.pixels import kernels_cpu, views
from pipeline.pixels.graph import Graph, crop, lend, regions
from pipeline.pixels.views import ORDERS, RECIPES, center_crops, mean_std, sample_crops, sample_views

SIZE = 224
RAW = np.array([[0, 0, 0], [1, 1, 1]], np.float32)  # no normalisation: pixels come out in [0, 1]
OPS: tuple[Callable[..., Image.Image], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, list[float]]]:
    rows: dict[str, list[float]] = {}
    yield rows
    print("\nop: mean over images of the mean absolute difference, the worst image's")
    for name, values in rows.items():
        print(f"{name:28s} {np.mean(values):8.4f} {np.max(values):8.4f}")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Photographs where there are some, smooth pictures of any size and brightness everywhere."""
    found = [Image.open(p).convert("RGB") for p in sorted((SHARED_DATA / "photos").glob("*.JPEG"))[::20]]
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (40, 300), (33, 31), (224, 224)):
        coarse = (rng.random((8, 8, 3)) ** 2 * 255).astype(np.uint8)
        found.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return found


def neutral(image: Image.Image) -> np.ndarray:
    """A row that takes the whole image at its own size and changes nothing."""
    row = center_crops([SIZE], [SIZE], SIZE, SIZE)[0]
    row[[views.HEIGHT, views.GRID_HEIGHT]], row[[views.WIDTH, views.GRID_WIDTH]] = image.height, image.width
    return row


def ours(image: Image.Image, row: np.ndarray, size: int = SIZE) -> np.ndarray:
    out = np.empty((size, size, 3), np.float32)
    kernels_cpu.render(out, np.asarray(image), row, RAW)
    return np.rint(out * 255)


def theirs(image: Image.Image, row: np.ndarray, size: int = SIZE) -> Image.Image:
    """The recipe of `row`, op by op with torchvision and Pillow. Resized across, then down: Pillow's order until 13."""
    top, left, height, width = (int(v) for v in row[:4])
    image = F.crop(image, top, left, height, width)
    grid_height, grid_width, grid_top, grid_left = (int(v) for v in row[4:8])
    image = F.resize(F.resize(image, [height, grid_width]), [grid_height, grid_width])
    image = F.crop(image, grid_top, grid_left, size, size)
    if row[views.GREY_BEFORE]:
        image = F.rgb_to_grayscale(image, 3)
    if row[views.ORDER] >= 0:
        for op in ORDERS[int(row[views.ORDER])]:
            if op == 3 and not row[views.HUE]:
                continue  # ColorJitter(hue=0) leaves the hue alone
            image = OPS[op](image, float(row[views.BRIGHTNESS + op]))
    if row[views.GREY_AFTER]:
        image = F.rgb_to_grayscale(image, 3)
    if row[views.BLUR]:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(row[views.BLUR])))
    if row[views.SOLARISE]:
        image = F.solarize(image, int(row[views.SOLARISE]))
    return F.hflip(image) if row[views.FLIP] else image


def difference(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(np.abs(a.astype(np.float32) - np.asarray(b)).mean())


def test_crop_and_resize(images: list[Image.Image], table: dict[str, list[float]]) -> None:
    for i, image in enumerate(images):
        row = sample_crops(
            seed=0, epochs=[0], sample_ids=[i], view=0, heights=[image.height], widths=[image.width], image_size=SIZE,
            crop_min=0.08,
        )[0]  # fmt: skip
        assert difference(ours(image, row), theirs(image, row)) == 0
        # torchvision's own call: Pillow 13 goes down first where that is less work, and rounds between.
        top, left, height, width = (int(v) for v in row[:4])
        whole = F.resized_crop(image, top, left, height, width, [SIZE, SIZE])
        whole = F.hflip(whole) if row[views.FLIP] else whole
        table.setdefault("crop, resize, flip", []).append(difference(ours(image, row), whole))
        tensor = F.resized_crop(F.pil_to_tensor(image), top, left, height, width, [SIZE, SIZE], antialias=True)
        tensor = F.hflip(tensor) if row[views.FLIP] else tensor
        table.setdefault("  (on tensors)", []).append(difference(ours(image, row), tensor.permute(1, 2, 0).numpy()))
    assert max(table["crop, resize, flip"]) < 0.5


@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_op_by_op(images: list[Image.Image], table: dict[str, list[float]], op: int) -> None:
    name = ("brightness", "contrast", "saturation", "hue")[op]
    kernel = (kernels_cpu.brighten, kernels_cpu.contrast, kernels_cpu.saturate, kernels_cpu.turn_hue)[op]
    for image in images:
        small = image.resize((SIZE, SIZE))
        for change in (-0.4, 0.037, 0.1, 0.4):
            factor = np.float32(change if op == 3 else 1 + change)
            planes = np.ascontiguousarray(np.asarray(small).reshape(-1, 3).T)
            kernel(planes, factor)
            result = planes.T.reshape(SIZE, SIZE, 3)
            table.setdefault(name, []).append(difference(result, OPS[op](small, float(factor))))
        tensor: torch.Tensor = OPS[op](F.pil_to_tensor(small), float(factor))  # type: ignore[assignment]
        table.setdefault(f"  ({name} on tensors)", []).append(difference(result, tensor.permute(1, 2, 0).numpy()))
    # The hue's divisions are in single precision: one pixel in a thousand comes out a level of hue apart.
    assert max(table[name]) <= (0.02 if op == 3 else 0)
    assert max(table[f"  ({name} on tensors)"]) < 2  # its own HSV, and roundings where Pillow cuts off


def test_grey_blur_solarise_and_flip(images: list[Image.Image], table: dict[str, list[float]]) -> None:
    for image in images:
        small = image.resize((SIZE, SIZE))
        for column in (views.GREY_BEFORE, views.GREY_AFTER, views.FLIP):
            row = neutral(small)
            row[column] = 1
            table.setdefault("grey, flip", []).append(difference(ours(small, row), theirs(small, row)))
        for sigma in (0.1, 0.3, 0.7, 1.0, 1.4, 1.45, 2.0, 3.0, 6.0):
            row = neutral(small)
            row[views.BLUR] = sigma
            table.setdefault("blur", []).append(difference(ours(small, row), theirs(small, row)))
        for threshold in (1, 60, 128, 255):
            row = neutral(small)
            row[views.SOLARISE] = threshold
            table.setdefault("solarise", []).append(difference(ours(small, row), theirs(small, row)))
    assert max(table["solarise"]) == max(table["grey, flip"]) == 0
    assert max(table["blur"]) == 0


def test_all_orders_of_the_jitter(images: list[Image.Image]) -> None:
    small = images[0].resize((SIZE, SIZE))
    outcomes = set()
    for order in range(24):
        row = neutral(small)
        row[views.ORDER], row[views.BRIGHTNESS : views.HUE + 1] = order, (1.35, 0.65, 1.3, 0.08)
        assert difference(ours(small, row), theirs(small, row)) < 0.05
        outcomes.add(ours(small, row).tobytes())
    assert len(outcomes) >= 12  # brightness and contrast aside, the orders differ


def test_a_jitter_without_a_hue_leaves_it_alone(images: list[Image.Image]) -> None:
    """Through HSV and back, pixels would change."""
    small = images[0].resize((SIZE, SIZE))
    row = neutral(small)
    row[views.ORDER], row[views.BRIGHTNESS : views.HUE + 1] = 5, (1, 1, 1, 0)
    assert difference(ours(small, row), small) == 0
    row[views.HUE] = 0.001  # of less than a level, which torchvision sends through HSV too
    assert difference(ours(small, row), theirs(small, row)) < 0.02 < difference(ours(small, row), small)


def encode(image: Image.Image) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def run_graph(encoded: list[np.ndarray], rows: np.ndarray, size: int, device: str = "cpu") -> np.ndarray:
    """The views of one batch in levels of 255, [n, S, S, 3], through the whole graph."""
    batches = iter([lend(encoded, [rows], image_size=size, device=device)])
    graph = Graph(
        lambda: next(batches), num_views=1, image_size=size, batch_size=len(encoded), device=device,
        dtype=torch.float32, num_threads=2, mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    (out,) = graph.run()
    graph.close()
    return out.permute(0, 2, 3, 1).cpu().numpy() * 255


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_recipes_from_the_encoded_bytes(
    images: list[Image.Image], table: dict[str, list[float]], recipe: str
) -> None:
    size = 32 if recipe == "cifar" else SIZE
    encoded = [encode(image) for image in images]
    for view in range(3):
        rows = sample_views(
            recipe,
            seed=0,
            epochs=np.zeros(len(images), int),
            sample_ids=np.arange(len(images)),
            view=view,
            heights=[image.height for image in images],
            widths=[image.width for image in images],
            image_size=size,
            crop_min=0.08 if recipe == "cifar" else None,
        )
        results = run_graph(encoded, rows, size)
        for data, row, result in zip(encoded, rows, results):
            image = Image.open(io.BytesIO(data.tobytes()))
            table.setdefault(recipe, []).append(difference(result, theirs(image, row, size)))
    assert max(table[recipe]) < 0.5  # the decoders' own difference included; required: 2


def test_evaluation_transform(images: list[Image.Image], table: dict[str, list[float]]) -> None:
    heights, widths = [image.height for image in images], [image.width for image in images]
    for resize, size in ((256, 224), (224, 224), (72, 64)):
        for image, row in zip(images, center_crops(heights, widths, size, resize)):
            expected = F.center_crop(F.resize(image, resize), size)
            table.setdefault("resize, centre crop", []).append(difference(ours(image, row, size), expected))
            assert difference(ours(image, row, size), theirs(image, row, size)) == 0
    assert max(table["resize, centre crop"]) < 0.5


def test_crops_of_the_gpu_path(images: list[Image.Image], table: dict[str, list[float]]) -> None:
    """What DALI does on a GPU before Triton takes over, run on the CPU; its resize neither rounds between nor stops at
    the crop's border."""
    encoded = [encode(image) for image in images]
    heights, widths = [image.height for image in images], [image.width for image in images]
    n = len(images)
    rows = sample_crops(
        seed=0,
        epochs=[0] * n,
        sample_ids=range(n),
        view=0,
        heights=heights,
        widths=widths,
        image_size=96,
        crop_min=0.08,
    )
    for name, views_ in (("crop", rows), ("centre crop", center_crops(heights, widths, 96, 110))):

        @pipeline_def
        def crops(views_: np.ndarray = views_) -> Any:
            feed = (encoded, *regions(views_, 96))
            data, start, end = fn.external_source(lambda: feed, num_outputs=3, batch=True)
            return crop(fn.decoders.image(data), start, end, 96)

        (out,) = crops(batch_size=n, num_threads=2, device_id=None).run()
        for i, expected in enumerate(run_graph(encoded, views_, 96)):
            table.setdefault(f"{name} on a GPU", []).append(difference(np.asarray(out.at(i)), expected))
        assert max(table[f"{name} on a GPU"]) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gpu_agrees_with_the_cpu(images: list[Image.Image], recipe: str, table: dict[str, list[float]]) -> None:
    encoded = [encode(image) for image in images]
    rows = sample_views(
        recipe,
        seed=0,
        epochs=np.zeros(len(images), int),
        sample_ids=np.arange(len(images)),
        view=0,
        heights=[image.height for image in images],
        widths=[image.width for image in images],
        image_size=SIZE,
        crop_min=0.2,
    )
    for cpu, gpu in zip(run_graph(encoded, rows, SIZE), run_graph(encoded, rows, SIZE, "cuda:0")):
        table.setdefault(f"{recipe}: GPU beside CPU", []).append(difference(cpu, gpu))
    assert max(table[f"{recipe}: GPU beside CPU"]) < 2


def test_normalisation() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    for recipe in RECIPES:
        mean, std = mean_std(recipe)
        out = np.empty((SIZE, SIZE, 3), np.float32)
        kernels_cpu.render(out, np.asarray(image), neutral(image), np.array([mean, std], np.float32))
        expected = F.normalize(F.to_tensor(image), mean, std).permute(1, 2, 0)
        np.testing.assert_allclose(out, expected, atol=2e-6)
