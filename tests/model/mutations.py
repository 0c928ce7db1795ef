"""Puts known faults into copies of the code, one at a time, and sees the test that is there for it fail.

    python tests/model/mutations.py [--only 12]

Prints one line a fault and exits with 1 when a test does not notice its fault. The points' numbers are those of
`test_subtle_points.py`. Takes some minutes: every fault is a run of pytest, some with real ranks.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Fault(NamedTuple):
    point: int
    what: str
    file: str
    right: str
    wrong: str
    test: str  # a pytest -k expression over the model's tests


FAULTS = [
    Fault(
        1,
        "momentum update copies batch-norm statistics",
        "model/moco.py",
        "        torch._foreach_lerp_(keys, queries, 1.0 - m)",
        "        torch._foreach_lerp_(keys, queries, 1.0 - m)\n"
        "        for mine, theirs in zip(self.encoder_k.buffers(), encoder.buffers()):\n"
        "            mine.copy_(theirs)",
        "point_01",
    ),
    Fault(
        1,
        "key encoder in eval mode",
        "model/moco.py",
        ".requires_grad_(False).train()",
        ".requires_grad_(False).eval()",
        "point_01",
    ),
    Fault(2, "key encoder trainable", "model/moco.py", ".requires_grad_(False).train()", ".train()", "point_02"),
    Fault(
        2,
        "key encoder is the query encoder",
        "model/moco.py",
        "copy.deepcopy(encoder).requires_grad_(False)",
        "encoder",
        "point_02",
    ),
    Fault(
        3,
        "a fresh key head",
        "model/moco.py",
        "        generator = torch.Generator()",
        "        self.encoder_k.head[2].reset_parameters()\n        generator = torch.Generator()",
        "point_03",
    ),
    Fault(4, "momentum the wrong way round", "model/moco.py", "queries, 1.0 - m)", "queries, m)", "point_04"),
    Fault(
        4,
        "momentum update inside every forward",
        "model/moco.py",
        "        if isinstance(images, Tensor):\n            images = self.shuffle(images)",
        "        torch._foreach_mul_(list(self.encoder_k.parameters()), 0.999)\n"
        "        if isinstance(images, Tensor):\n            images = self.shuffle(images)",
        "point_04",
    ),
    Fault(
        5,
        "momentum update in bf16",
        "model/moco.py",
        "        torch._foreach_lerp_(keys, queries, 1.0 - m)",
        "        for k, q in zip(keys, queries):\n            k.copy_(k.bfloat16().lerp(q.bfloat16(), 1.0 - m))",
        "point_05",
    ),
    Fault(5, "16-bit parameters accepted", "model/moco.py", "        if narrow:", "        if False:", "16_bits"),
    Fault(
        6, "queries not normalised", "model/moco.py", "q = F.normalize(q.float(), dim=1)", "q = q.float()", "point_06"
    ),
    Fault(
        6,
        "keys not normalised",
        "model/moco.py",
        "return F.normalize(encode_shuffled(self.encoder_k, images, self.group).float(), dim=1)",
        "return encode_shuffled(self.encoder_k, images, self.group).float()",
        "point_06",
    ),
    Fault(
        7,
        "keys enqueued before the loss",
        "model/moco.py",
        "        return contrastive_loss(q, keys, self.queue, self.temperature)",
        "        self.enqueue(keys)\n        return contrastive_loss(q, keys, self.queue, self.temperature)",
        "point_07",
    ),
    Fault(
        8,
        "tail dropped where the queue wraps",
        "model/moco.py",
        "        good = finite[last]",
        "        good = finite[last] & (self.queue_ptr + torch.arange(most) < size)",
        "point_08",
    ),
    Fault(
        9,
        "queue of own keys only",
        "model/moco.py",
        "keys = gather_rows(keys.detach().float(), self.group)",
        "keys = keys.detach().float()",
        "point_09",
    ),
    Fault(
        10,
        "queue from the rank's random state",
        "model/moco.py",
        "torch.randn(dim, queue_size, generator=generator)",
        "torch.randn(dim, queue_size)",
        "point_10_queue",
    ),
    Fault(
        10,
        "a difference between ranks not looked for",
        "model/ranks.py",
        "    if faults:",
        "    if False:",
        "point_10_a and 2",
    ),
    Fault(
        11,
        "each rank its own permutation",
        "model/batchnorm.py",
        "draw_permutation(world * images.shape[0], seed, count)",
        "draw_permutation(world * images.shape[0], seed + rank, count)",
        "point_11 and 2",
    ),
    Fault(
        11,
        "unshuffle forgets the places",
        "model/batchnorm.py",
        "return rows.index_select(0, route.place_back)",
        "return rows",
        "point_11 and 2",
    ),
    Fault(
        12,
        "permutation inside each rank",
        "model/batchnorm.py",
        "    route = plan_route(draw_permutation(world * images.shape[0], seed, count), rank, world, images.device)",
        "    n = images.shape[0]\n"
        "    blocks = [draw_permutation(n, seed, count) + r * n for r in range(world)]\n"
        "    route = plan_route(np.concatenate(blocks), rank, world, images.device)",
        "point_12 and across_ranks and 2",
    ),
    Fault(
        12,
        "permutation inside each group",
        "model/batchnorm.py",
        "    return np.random.default_rng((seed, count)).permutation(rows)",
        "    blocks = np.arange(rows).reshape(4, -1)\n"
        "    return np.random.default_rng((seed, count)).permuted(blocks, axis=1).reshape(-1)",
        "point_12 and across_groups",
    ),
    Fault(
        13,
        "queries through the gather, which has no gradient",
        "model/moco.py",
        "        return contrastive_loss(q, keys, self.queue, self.temperature)",
        "        q, keys = gather_rows(q, self.group), gather_rows(keys, self.group)\n"
        "        return contrastive_loss(q, keys, self.queue, self.temperature)",
        "point_13 and 2",
    ),
    Fault(
        13,
        "end-to-end: gradients of other ranks' losses lost",
        "model/ranks.py",
        "        dist.all_reduce(total, group=ctx.group)",
        "        pass",
        "end_to_end and equal_one",
    ),
    Fault(
        14,
        "loss under autocast",
        "model/moco.py",
        "with torch.autocast(q.device.type, enabled=False):",
        "if True:",
        "point_14",
    ),
    Fault(
        14,
        "normalised in 16 bits",
        "model/moco.py",
        "q = F.normalize(q.float(), dim=1)",
        "q = F.normalize(q, dim=1).float()",
        "point_14",
    ),
    Fault(
        15,
        "batch norm's weights left out",
        "model/batchnorm.py",
        "        self.train(original.training)",
        "        self.train(original.training).requires_grad_(False)",
        "point_15",
    ),
    Fault(
        17,
        "queue not in the checkpoint",
        "model/moco.py",
        "generator=generator), dim=0))",
        "generator=generator), dim=0), persistent=False)",
        "point_17",
    ),
    Fault(
        17,
        "pointer not in the checkpoint",
        "model/moco.py",
        'self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))',
        'self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64), persistent=False)',
        "point_17",
    ),
    Fault(
        17,
        "count of shuffles not in the checkpoint",
        "model/batchnorm.py",
        'self.seed, self.count = int(state["seed"]), int(state["count"])',
        "pass",
        "point_17",
    ),
    Fault(
        18,
        "queue in the keys' dtype",
        "model/moco.py",
        "generator=generator), dim=0))",
        "generator=generator), dim=0).bfloat16())",
        "point_18",
    ),
    Fault(
        19,
        "split by a view of NCHW memory",
        "model/batchnorm.py",
        "        running = (self.running_mean, self.running_var)\n",
        "        n, c, h, w = input.shape\n"
        "        view = input.contiguous().view(n // self.groups, c * self.groups, h, w)\n"
        "        wide = [t.repeat(self.groups) for t in (self.weight, self.bias)]\n"
        "        return nn.functional.batch_norm(view, None, None, *wide, True, 0.1, self.eps).view(n, c, h, w)\n",
        "point_19",
    ),
    Fault(
        19,
        "layout lost in the shuffle",
        "model/batchnorm.py",
        "    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):",
        "    if False:",
        "shuffle_on_one_device",
    ),
    Fault(
        22,
        "forward past DDP",
        "tests/model/moco_runs.py",
        "                q = prepared(x)\n                keys",
        "                q = encoder(x)\n                keys",
        "point_22 and 2",
    ),
    Fault(
        23,
        "evaluation moves the statistics",
        "model/batchnorm.py",
        "        if not self.training or self.groups == 1:\n",
        "        if not self.training:\n"
        "            running = (self.running_mean, self.running_var)\n"
        "            return nn.functional.batch_norm(input, *running, self.weight, self.bias, True, 0.1, self.eps)\n"
        "        if self.groups == 1:\n",
        "point_23",
    ),
]


def run(fault: Fault) -> str:
    """The first test that failed, or "" when none did."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder) / fault.file
        text = path.read_text()
        if fault.right not in text:
            return f"cannot be put in: {fault.file} has no {fault.right.strip().splitlines()[0]!r} any more"
        path.write_text(text.replace(fault.right, fault.wrong, 1))
        files = [
            f"tests/model/test_{name}.py" for name in ("subtle_points", "moco", "moco_ranks", "batchnorm", "mechanisms")
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", fault.test, *files],
            cwd=folder,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=folder),
            capture_output=True,
            text=True,
            timeout=400,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode == 1 and failed:
        return failed[0].removeprefix("FAILED tests/model/")[:150]
    return "" if done.returncode == 0 else f"pytest itself: {done.stdout[-300:]}{done.stderr[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=int, help="the faults of one point")
    only = parser.parse_args().only
    missed = 0
    for fault in FAULTS:
        if only in (None, fault.point):
            seen = run(fault)
            noticed = seen.startswith("test_")
            missed += not noticed
            print(f"{'seen  ' if noticed else 'MISSED'} {fault.point:2d} {fault.what}: {seen}", flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
