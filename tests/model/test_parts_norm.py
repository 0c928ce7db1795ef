"""The two ways of split batch norm, the library's part by part and the GPU's kernels; and what they keep in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cpu_environment
from torch import Tensor, nn

from model.batchnorm import SplitBatchNorm


def images(layout: torch.memory_format = torch.channels_last) -> Tensor:
    return (3 * torch.randn(16, 6, 5, 5) + 1).to(memory_format=layout)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_in_16_bits_as_autocast_gives_them(dtype: torch.dtype, affine: bool, tracked: bool) -> None:
    """Weights and statistics stay fp32: the output to the bit that of batch norms of the parts, and the gradient."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine, track_running_stats=tracked)
    split = SplitBatchNorm(norm, 4)
    x = images().to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected = torch.cat([norm(part) for part in x.chunk(4)])
        found = split(y)
    weight = torch.randn_like(expected)
    expected.backward(weight)
    found.backward(weight)
    assert found.dtype == dtype and torch.equal(found, expected) and torch.equal(y.grad, x.grad)  # type: ignore[arg-type]
    for ours, theirs in zip(split.parameters(), norm.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
def test_compiled_without_weights_or_running_statistics() -> None:
    split = SplitBatchNorm(nn.BatchNorm2d(6, affine=False, track_running_stats=False), 4)
    x = images().requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, found = split(x), torch.compile(split, backend="aot_eager", fullgraph=True)(y)
    weight = torch.randn_like(expected)
    expected.backward(weight)
    found.backward(weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(y.grad, x.grad)


def test_the_input_and_two_numbers_a_channel_are_kept_for_the_gradient() -> None:
    kept = dict[int, int]()

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, split = images().requires_grad_(), SplitBatchNorm(nn.BatchNorm2d(6), 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        split(x)
    assert sum(kept.values()) == x.nbytes + 2 * 4 * 6 * 4 + 6 * 4  # and the weight


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_of_one_value_has_no_variance(compiled: bool) -> None:
    split = SplitBatchNorm(nn.BatchNorm2d(3), 4)
    if compiled:
        split.compile(backend="eager")
    with pytest.raises(ValueError, match="bn_groups 4 has one value a channel"):
        split(torch.randn(4, 3, 1, 1))
    assert split.num_batches_tracked == 0


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("what", ["", "--compile"])
def test_the_gpus_kernels_without_a_gpu(what: str) -> None:
    """In Triton's interpreter, against the library's batch norm in float64; and compiled for Hopper."""
    pytest.importorskip("triton")
    if what == "--compile" and os.uname().machine != "x86_64":
        pytest.skip("Triton brings its assembler for x86-64")
    child = Path(__file__).with_name("parts_interpreted.py")
    env = cpu_environment(**({} if what == "--compile" else {"TRITON_INTERPRET": "1"}))
    result = subprocess.run([sys.executable, str(child), what], env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((32, 256, 14, 14), torch.channels_last, torch.bfloat16),
        ((32, 256, 14, 14), torch.channels_last, torch.float16),
        ((32, 256, 14, 14), torch.channels_last, torch.float32),
        ((16, 100, 63, 65), torch.channels_last, torch.bfloat16),  # nothing is a multiple of anything
        ((64, 512), torch.contiguous_format, torch.bfloat16),
        ((32, 256, 14, 14), torch.contiguous_format, torch.bfloat16),  # these two are the library's
        ((32, 256, 14, 14), torch.channels_last, torch.float64),
    ],
)
def test_on_a_gpu_as_on_a_cpu(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Beside float64 on the CPU; and twice the same bits."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (2 * torch.randn(shape) + 3).to(dtype)
    x = x.to(memory_format=layout) if len(shape) == 4 else x
    weight = torch.randn(shape).to(dtype)
    found = list[list[Tensor]]()
    for device, to, own in (("cuda", dtype, wide), ("cuda", dtype, wide), ("cpu", torch.float64, torch.float64)):
        norm = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
        nn.init.constant_(norm.weight, 1.5)
        split = SplitBatchNorm(norm, 4).to(device, own)
        y = x.to(device, to).requires_grad_()
        out = split(y)
        assert out.dtype == to and out.stride() == y.stride()
        out.backward(weight.to(device, to))
        results = (out, y.grad, split.weight.grad, split.bias.grad, split.running_mean, split.running_var)
        found.append([t.detach().cpu() for t in results if t is not None])
    first, second, expected = found
    assert len(first) == len(expected) == 6 and all(map(torch.equal, first, second))
    limit = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for i, (ours, theirs) in enumerate(zip(first, expected)):
        away = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert away < (limit if i < 2 else min(limit, 1e-4)), (i, float(away))
