"""Run by test_parts_norm.py in a process of its own: the GPU's kernels of split batch norm in Triton's interpreter,
against the library's batch norm; with --compile for Hopper."""

import sys

import torch
from torch import Tensor

from model import parts_norm, parts_norm_gpu


def away(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def compare(shape: tuple[int, ...], groups: int, dtype: torch.dtype, offset: float, limit: float) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x = (2 * torch.randn(shape) + offset).to(dtype).contiguous(memory_format=layout)
    gradient = torch.randn(shape).to(dtype)  # in another layout, as a mean over pixels gives it
    weight, bias, mean, var = torch.rand(4, shape[1]) + 0.5
    assert parts_norm_gpu.fits(x)
    found, expected = [], []
    for module, to, results in ((parts_norm_gpu, dtype, found), (parts_norm, torch.float64, expected)):
        wide = torch.float64 if to == torch.float64 else torch.float32
        own = [t.to(wide, copy=True) for t in (weight, bias, mean, var)]
        out, *kept = module.forward(x.to(to), *own, groups=groups, momentum=0.1, eps=1e-5)
        results += [out, *own[2:], *module.backward(gradient.to(to), x.to(to), own[0], *kept, eps=1e-5)]
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        allowed = limit if i in (0, 3) else min(limit, 100 * 2**-24 * (1 + offset))
        assert away(ours, theirs) < allowed, (shape, groups, dtype, offset, i, away(ours, theirs))
    assert found[0].dtype == found[3].dtype == dtype and found[4].dtype == torch.float32
    assert found[0].stride() == found[3].stride() == x.stride()


def compile_for_hopper() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "tile": parts_norm_gpu.TILE, "block": parts_norm_gpu.BLOCK, "repeat": parts_norm_gpu.REPEAT,
        "most": parts_norm_gpu.CHUNKS,
    }  # fmt: skip
    numbers = dict.fromkeys(("rows", "channels", "chunk", "chunks", "groups", "blocks"), "i32")
    numbers |= {"momentum": "fp32", "eps": "fp32"}
    kernels = [kernel for name, kernel in vars(parts_norm_gpu).items() if name.endswith("_kernel")]
    assert len(kernels) == 6
    for kernel in kernels:
        signature = dict[str, str]()
        for name in kernel.arg_names:
            pointer = "*bf16" if name in ("x", "gradient", "out") else "*fp32"
            signature[name] = "constexpr" if name in constants else numbers.get(name, pointer)
        own = {name: value for name, value in constants.items() if name in signature}
        source = ASTSource(kernel, signature, own)
        assert triton.compile(source, GPUTarget("cuda", 90, 32), dict(parts_norm_gpu.FUSION)).asm["cubin"]


if __name__ == "__main__":
    if sys.argv[-1] == "--compile":
        compile_for_hopper()
    else:
        compare((4, 70, 2, 3), 2, torch.float32, 0, 1e-5)  # channels beyond one block
        compare((4, 5, 19, 21), 2, torch.float32, 0, 1e-5)  # several chunks, the last of them shorter
        compare((4, 5, 19, 21), 1, torch.float32, 1000, 1e-3)  # nothing cancels
        compare((32, 8), 4, torch.float32, 0, 1e-5)
        compare((4, 8, 5, 5), 2, torch.bfloat16, 0, 2**-7)
        compare((4, 8, 5, 5), 2, torch.float16, 0, 2**-10)
