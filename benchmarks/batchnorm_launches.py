"""Batch norm in 8 groups: launches and bytes of a ResNet-50 step with it, beside one group and beside its earlier form.

    python benchmarks/batchnorm_launches.py [--device cuda] [--output FILE]

Until November 2026 split batch norm was a batch norm for each part of the batch and a `torch.cat` of their outputs. Now
every part is written into its place in one output, on a GPU by three kernels for all parts (model/parts_norm_gpu.py).

1. counted, without a GPU: the operations that torch dispatches in a step (a query forward and backward, a key forward;
   bf16 autocast, channels-last) on tensors that have shapes and no memory. Views and allocations are left out; a Triton
   kernel is one operation. Bytes: each operation reads its inputs and writes its outputs once ("once"); and with every
   batch norm of torch's reading its input a second time, for the output after the statistics, as a GPU must where a
   part does not fit into its cache ("twice"). Our kernels are counted as what they are in both. In brackets: what the
   batch norms add to the same encoder without them, as more concatenations and sums of gradients are theirs too.
2. measured: such a step of the encoder, and of one batch norm, all forms in turn within every round, medians over
   rounds: CPU time with one thread, or device events with --device cuda.

The last line is one JSON object.
"""

import argparse
import copy
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks.hardware import hardware  # noqa: E402
from benchmarks.moco_step import in_turns  # noqa: E402
from model import parts_norm  # noqa: E402
from model.batchnorm import SplitBatchNorm, split_batchnorm  # noqa: E402
from model.encoders import Encoder, build_encoder  # noqa: E402

GROUPS = 8
WITHOUT, ONE, BEFORE, PARTS, KERNELS = (
    "no batch norm", "one group", "8 groups, before", "8 groups, part by part", "8 groups, GPU kernels",
)  # fmt: skip
# Operations that start no kernel, beside views.
NO_KERNEL = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "device"}


class Concatenated(SplitBatchNorm):
    """The earlier form."""

    def forward(self, input: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = (self.momentum or 0.0) / self.groups
        parts = []
        for i, part in enumerate(input.chunk(self.groups)):
            own = share / (1 - (self.groups - 1 - i) * share)
            running = (self.running_mean, self.running_var)
            parts.append(F.batch_norm(part, *running, self.weight, self.bias, True, own, self.eps))
        return torch.cat(parts)


def in_form(net: nn.Module, form: str) -> nn.Module:
    """`net`, its batch norms changed in place."""
    if form == WITHOUT:
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
    elif form != ONE:
        split_batchnorm(cast(Encoder, net), GROUPS)
        for child in net.modules():
            if form == BEFORE and isinstance(child, SplitBatchNorm):
                child.__class__ = Concatenated
    return net


def nbytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


class Count(TorchDispatchMode):
    """Sums up what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.once, self.again = 0, 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name not in NO_KERNEL and not operation.is_view:
            self.launches += 1
            self.once += nbytes(args[1:] if name == "copy_" else args) + nbytes(out)
            if name in ("native_batch_norm", "native_batch_norm_backward"):
                self.again += nbytes(args[: 1 if name == "native_batch_norm" else 2])  # backwards the gradient too
        return out


@contextmanager
def counting_kernels(count: Count) -> Iterator[None]:
    """In it split batch norm takes the GPU's way, with kernels that do nothing but be counted."""
    from model import parts_norm_gpu

    def launch(*args: Any, **_options: Any) -> None:
        count.launches += 1
        count.once += nbytes(args)  # each of them is read or written once

    kept = dict(vars(parts_norm_gpu)), parts_norm.way
    for name in kept[0]:
        if name.endswith("_kernel"):
            setattr(parts_norm_gpu, name, defaultdict(lambda: launch))
    parts_norm.way = lambda *_: parts_norm_gpu
    try:
        yield
    finally:
        vars(parts_norm_gpu).update(kept[0])
        parts_norm.way = kept[1]


def count_step(a: argparse.Namespace, form: str) -> Count:
    """A query forward and backward and a key forward with a.arch, nothing computed."""
    count = Count()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(a.count_batch, 3, a.count_size, a.count_size, dtype=torch.bfloat16)
        images = images.contiguous(memory_format=torch.channels_last)
        query, key = (in_form(build_encoder(a.arch, mlp=True), form) for _ in range(2))
        way = counting_kernels(count) if form == KERNELS else nullcontext()
        with count, way, torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                key(images)
            query(images).sum().backward()
    return count


def count_steps(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints and returns the counts of every form."""
    print(f"\ncounted: {a.count_batch} images of {a.count_size} pixels; in brackets what its batch norms add")
    print(f"{'':<26}{'launches':>16}{'GB, read once':>18}{'GB, read twice':>18}")
    counted: dict[str, dict[str, float]] = {}
    for form in (WITHOUT, ONE, BEFORE, PARTS, KERNELS):
        c = count_step(a, form)
        counted[form] = {"launches": c.launches, "gb_once": c.once / 1e9, "gb_twice": (c.once + c.again) / 1e9}
        own = {name: value - counted[WITHOUT][name] for name, value in counted[form].items()}
        print(
            f"{form:<26}{c.launches:>8,} ({own['launches']:>5,.0f})"
            + "".join(f"{counted[form][n]:>10.1f} ({own[n]:>5.1f})" for n in ("gb_once", "gb_twice")),
            flush=True,
        )
    return counted


def measure(a: argparse.Namespace, net: nn.Module, images: Tensor) -> dict[str, float]:
    """Prints and returns the median milliseconds of a step in every form."""
    net = net.to(a.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    images = images.to(a.device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    variants: dict[str, Callable[[], Any]] = {}
    for form in (ONE, BEFORE, KERNELS if a.device == "cuda" else PARTS):

        def run(net: nn.Module = in_form(copy.deepcopy(net), form)) -> None:  # noqa: B008
            with torch.autocast(a.device, dtype=torch.bfloat16, enabled=a.precision == "bf16"):
                with torch.no_grad():
                    net(images)
                net(images).float().mean().backward()
            net.zero_grad()
            images.grad = None

        variants[form] = run
    times = in_turns(variants, a.rounds, torch.device(a.device))
    for form, ms in times.items():
        print(f"  {form:<26}{ms:>9.2f} ms  {ms / times[ONE] - 1:+7.1%}", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the time is measured")
    parser.add_argument("--arch", default="resnet50", help="encoder")
    parser.add_argument("--count_batch", type=int, default=256, help="images of the step that is counted; 0: none is")
    parser.add_argument("--count_size", type=int, default=224, help="and their side in pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="images of the step that is measured")
    parser.add_argument("--image_size", type=int, default=64, help="and their side in pixels")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the step that is measured")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of measuring; 0: count only")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = hardware(a.device)
    print(f"{a.arch}, torch {facts['torch']}, {facts['cpu_cores']} cores, load {os.getloadavg()[0]:.1f}")
    result: dict[str, Any] = {"hardware": facts, "command": " ".join(sys.argv), "load": os.getloadavg()[0]}
    result["counted"] = count_steps(a) if a.count_batch else {}
    if a.rounds:
        where = "CPU time of one thread" if a.device == "cpu" else facts["gpu"]
        print(f"\nmeasured: {a.precision}, channels-last, {where}, medians of {a.rounds} rounds")
        size, side = a.image_size, a.image_size // 4
        print(f" {a.arch}, {a.batch_size} images of {size} pixels")
        result["encoder_ms"] = measure(a, build_encoder(a.arch, mlp=True), torch.randn(a.batch_size, 3, size, size))
        print(f" one batch norm of 256 channels, {a.batch_size} images of {side} pixels")
        layer = nn.Sequential(nn.BatchNorm2d(256))
        result["layer_ms"] = measure(a, layer, torch.randn(a.batch_size, 256, side, side))
    if a.output:
        a.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
