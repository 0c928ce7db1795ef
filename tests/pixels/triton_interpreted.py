"""Run by test_graph.py in a process of its own: the GPU's kernels in Triton's interpreter; with --compile for Hopper;
with --graph the whole GPU path, the CPU in the GPU's place."""

import functools
import io
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from PIL import Image

from pipeline.pixels import graph, kernels_cpu, kernels_gpu, views


def compare() -> None:
    size, n = 14, 6
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)[:, :size, :size].copy()
    pixels[0] = 7  # one colour; and full ones
    pixels[1, :7] = (0, 255, 0)
    own = views.ViewRecipe(jitter=1.0, hue=0.0, blur=0.5, solarise=0.7, solarise_threshold=100)
    for recipe in ("v1", "v2", own):
        rows = views.sample_views(
            recipe, seed=1, epochs=np.zeros(n, int), sample_ids=np.arange(n), view=0, heights=[size] * n,
            widths=[size] * n, image_size=size, crop_min=1.0,
        )  # fmt: skip
        assert recipe == "v1" or 0 < (rows[:, views.BLUR] > 0).sum() < n
        assert recipe != own or (rows[:, views.SOLARISE] > 0).sum() > 0
        # Crop, resize and flip come before these kernels: leave them out.
        rows[:, : views.FLIP + 1] = (0, 0, size, size, size, size, 0, 0, 0)
        # Below 128, a level that the blur rounds otherwise jumps where the image is solarised.
        rows[(rows[:, views.BLUR] > 0) & (rows[:, views.SOLARISE] > 0), views.SOLARISE] = 128
        mean, std = views.mean_std(recipe)
        finish = kernels_gpu.Finish(mean, std, torch.float32, "cpu")
        weighted = torch.from_numpy(kernels_gpu.with_blur_weights(rows))
        found = finish(torch.from_numpy(pixels.copy()), weighted).permute(0, 2, 3, 1).numpy()
        for i in range(n):
            expected = np.empty((size, size, 3), np.float32)
            kernels_cpu.render(expected, pixels[i], rows[i], np.array([mean, std], np.float32))
            levels = np.abs(found[i] - expected) * np.array(std) * 255
            limit = 1.0 if rows[i, views.BLUR] else 0.02
            assert levels.mean() < limit, (recipe, i, levels.mean(), views.describe(rows[i]))


def compile_for_hopper() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pixels = {"pixels": "*u8", "rows": "*fp32", "orders": "*i32", "sums": "*i32", "count": "i32", "block": "constexpr"}
    lines = {"pixels": "*u8", "rows": "*fp32", "blurred": "*fp32"}
    tail = {"size": "i32", "taps": "constexpr", "block": "constexpr"}
    finish = lines | {"scale": "*fp32", "base": "*fp32", "out": "*bf16"} | tail
    for kernel, signature, constants in (
        (kernels_gpu.sum_kernel, pixels, {"block": 1024}),
        (kernels_gpu.colour_kernel, pixels, {"block": 1024}),
        (kernels_gpu.blur_kernel, lines | tail, {"taps": 13, "block": 1024}),
        (kernels_gpu.finish_kernel, finish, {"taps": 13, "block": 1024}),
    ):
        options = {"enable_fp_fusion": False}
        built = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32), options)
        assert built.asm["cubin"]


class Event:
    """A CUDA event that has passed once `passed` says so."""

    passed = False

    def record(self, _stream: object) -> None:
        pass

    def query(self) -> bool:
        return Event.passed

    def synchronize(self) -> None:
        Event.passed = True


class TorchWithoutGpu:
    """torch as graph.py sees it, tensors "on the GPU" in the CPU's memory."""

    cuda = SimpleNamespace(device=lambda _device: nullcontext(), current_stream=lambda: None, Event=Event)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def as_tensor(self, shared: Any, device: object) -> torch.Tensor:
        return torch.from_dlpack(shared)


def put_the_cpu_in_the_gpus_place() -> None:
    decode = functools.partial(fn.decoders.image)
    image = SimpleNamespace(image=lambda encoded, **options: decode(encoded, **options | {"device": "cpu"}))
    graph.fn = SimpleNamespace(external_source=fn.external_source, resize=fn.resize, decoders=image)  # type: ignore[attr-defined]
    two_views = graph.two_views
    graph.two_views = lambda *args, **options: two_views(*args, **options | {"device_id": None})  # type: ignore[attr-defined]
    graph.torch = TorchWithoutGpu()  # type: ignore[attr-defined]
    DataNode.gpu = lambda node: node
    finish = kernels_gpu.Finish
    kernels_gpu.Finish = lambda mean, std, dtype, _device: finish(mean, std, dtype, "cpu")  # type: ignore[misc, assignment]


def views_of(
    batches: list[tuple[list[np.ndarray], list[np.ndarray]]], size: int, device: str
) -> list[list[np.ndarray]]:
    """The views of each batch in levels of 255, through the whole graph, with checks of what memory it holds."""
    feed = iter([graph.lend(encoded, rows, image_size=size, device=device) for encoded, rows in batches])
    options: dict[str, Any] = {"dtype": torch.float32, "num_threads": 1, "mean": (0, 0, 0), "std": (1, 1, 1)}
    made = graph.Graph(
        lambda: next(feed), num_views=2, image_size=size, batch_size=len(batches[0][0]), device=device, **options
    )
    found = []
    Event.passed = False
    for i in range(len(batches)):
        found.append([view.permute(0, 2, 3, 1).numpy() * 255 for view in made.run()])
        # DALI's memory, and ours that it reads, is held as long as a kernel may be reading it, and no longer.
        assert len(made._in_use) == (i + 1 if device == "cuda:0" else 0)
    assert not made._lent
    Event.passed = True
    try:
        made.run()
        raise AssertionError("the feed has ended")
    except StopIteration:
        assert not made._in_use
    made.close()
    return found


def whole_graph() -> None:
    """The views of the GPU path, DALI's CPU operators in place of its GPU ones, against those of the CPU path."""
    size, n = 24, 3
    rng = np.random.default_rng(0)
    batches = []
    for batch in range(3):
        encoded, sizes = [], [(40 + 9 * i, 60 - 7 * i) for i in range(n)]
        for width, height in sizes:
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
        keys: dict[str, Any] = {"seed": batch, "epochs": [0] * n, "sample_ids": range(n), "crop_min": 0.2}
        keys |= {"widths": [w for w, _ in sizes], "heights": [h for _, h in sizes], "image_size": size}
        batches.append((encoded, [views.sample_views("v2", view=view, **keys) for view in range(2)]))
    expected = views_of(batches, size, "cpu")
    put_the_cpu_in_the_gpus_place()
    found = views_of(batches, size, "cuda:0")
    differences = np.abs(np.array(found) - np.array(expected)).mean(axis=(-1, -2, -3))
    assert differences.max() < 2, differences


if __name__ == "__main__":
    {"--compile": compile_for_hopper, "--graph": whole_graph}.get(sys.argv[-1], compare)()
