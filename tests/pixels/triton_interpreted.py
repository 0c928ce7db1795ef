"""Run by test_graph.py in a process of its own: the GPU's kernels in Triton's interpreter, or --compile for Hopper."""

import sys

import numpy as np
import torch

from pipeline.pixels import kernels_cpu, kernels_gpu, views


def compare() -> None:
    size, n = 14, 6
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)[:, :size, :size].copy()
    pixels[0] = 7  # one colour; and full ones
    pixels[1, :7] = (0, 255, 0)
    for recipe in ("v1", "v2"):
        rows = views.sample_views(
            recipe, seed=1, epochs=np.zeros(n, int), sample_ids=np.arange(n), view=0, heights=[size] * n,
            widths=[size] * n, image_size=size, crop_min=1.0,
        )  # fmt: skip
        assert recipe == "v1" or 0 < (rows[:, views.BLUR] > 0).sum() < n
        # Crop, resize and flip come before these kernels: leave them out.
        rows[:, : views.FLIP + 1] = (0, 0, size, size, size, size, 0, 0, 0)
        mean, std = views.mean_std(recipe)
        finish = kernels_gpu.Finish(mean, std, torch.float32, "cpu")
        found = finish(torch.from_numpy(pixels.copy()), torch.from_numpy(rows)).permute(0, 2, 3, 1).numpy()
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
    lines = {"pixels": "*u8", "rows": "*fp32", "weights": "*fp32", "blurred": "*fp32"}
    tail = {"size": "i32", "taps": "constexpr", "block": "constexpr"}
    finish = lines | {"scale": "*fp32", "base": "*fp32", "out": "*bf16"} | tail
    for kernel, signature, constants in (
        (kernels_gpu.sum_kernel, pixels, {"block": 1024}),
        (kernels_gpu.colour_kernel, pixels, {"block": 1024}),
        (kernels_gpu.blur_kernel, lines | tail, {"taps": 13, "block": 1024}),
        (kernels_gpu.finish_kernel, finish, {"taps": 13, "block": 1024}),
    ):
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"]


if __name__ == "__main__":
    compile_for_hopper() if "--compile" in sys.argv else compare()
