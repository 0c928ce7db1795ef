"""benchmarks/against_reference.py replays train.py in the code of a checkout. Here a stand-in of our own, after the
paper's Algorithm 1, is that checkout, with a fault in its v2; MOCO_CHECKOUT names a real one to be tried too."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, cpu_environment

BUILDER = '''
import torch
from torch import distributed as dist, nn
from torch.nn.functional import normalize

class MoCo(nn.Module):
    """One momentum update, a shuffle over the ranks, eq. 1, and the queue, in that order."""

    def __init__(self, encoder, dim, size, m, temperature, mlp):
        super().__init__()
        self.m, self.temperature, self.fault = m, temperature, 0.01 if mlp else 0.0
        self.encoder_q, self.encoder_k = encoder(num_classes=dim), encoder(num_classes=dim)
        for net in (self.encoder_q, self.encoder_k) if mlp else ():
            wide = net.fc.in_features
            net.fc = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), net.fc)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def everyone(rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def forward(self, im_q, im_k):
        n, rank = len(im_q), dist.get_rank()
        own = slice(rank * n, rank * n + n)
        q = normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                key.data = self.m * key.data + (1 - self.m + self.fault) * query.data
            images = self.everyone(im_k)
            order = torch.randperm(len(images)).cuda()
            keys = self.everyone(normalize(self.encoder_k(images[order[own]]), dim=1))
            keys = keys[order.argsort()]
        positive = (q * keys[own]).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ self.queue.clone()], dim=1) / self.temperature
        at = int(self.queue_ptr)
        self.queue[:, at : at + len(keys)] = keys.T
        self.queue_ptr[0] = (at + len(keys)) % self.queue.shape[1]
        return logits, torch.zeros(n, dtype=torch.int64).cuda()
'''
MAIN_MOCO = """
import math

def adjust_learning_rate(optimizer, epoch, args):
    cosine = 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    steps = 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
    optimizer.param_groups[0]["lr"] = args.lr * (cosine if args.cos else steps)

def train(loader, model, criterion, optimizer, epoch, args):
    model.train()
    for images, _ in loader:
        loss = criterion(*model(im_q=images[0], im_k=images[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""

specification = importlib.util.spec_from_file_location(
    "against_reference", REPOSITORY / "benchmarks" / "against_reference.py"
)
assert specification is not None and specification.loader is not None
against_reference: Any = importlib.util.module_from_spec(specification)
sys.modules["against_reference"] = against_reference
specification.loader.exec_module(against_reference)
ranks: Any = sys.modules["benchmarks.reference_ranks"]


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("module.queue", "queue"),
        ("module.queue_ptr", "pointer"),
        ("module.encoder_q.fc.0.weight", "query parameters"),
        ("module.encoder_k.conv1.weight", "key parameters"),
        ("module.encoder_k.bn1.running_var", "statistics"),
        ("module.encoder_q.bn1.num_batches_tracked", "statistics"),
    ],
)
def test_each_tensor_belongs_to_a_quantity(name: str, quantity: str) -> None:
    assert ranks.quantity(name) == quantity


def test_a_difference_that_is_no_number_is_not_small() -> None:
    assert ranks.difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert ranks.difference(torch.tensor([1.0]), torch.tensor([torch.nan])) == math.inf


def test_losses_of_as_many_ranks_are_compared_rank_by_rank() -> None:
    assert against_reference.losses_apart([[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [1.0, 2.0]]) == 2
    assert against_reference.losses_apart([[2.0, 3.0]], [[3.0, 4.0], [1.0, 2.5]]) == 0.25


def run(checkout: Path, *flags: str) -> tuple[int, str, str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "against_reference.py"), "--moco", str(checkout), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=cpu_environment(), timeout=1500)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.process
def test_a_right_reference_agrees_and_a_wrong_momentum_shows(tmp_path: Path) -> None:
    (tmp_path / "moco").mkdir()
    (tmp_path / "moco" / "__init__.py").touch()
    (tmp_path / "moco" / "builder.py").write_text(BUILDER)
    (tmp_path / "main_moco.py").write_text(MAIN_MOCO)
    (tmp_path / "main_lincls.py").touch()
    code, out, error = run(tmp_path, "--steps", "2", "--only", "v1 2:2 float64", "v2 1:2 float64")
    assert code == 1, error
    report = json.loads(out.splitlines()[-1])
    v1, v2 = report["cases"]["v1 2:2 float64"], report["cases"]["v2 1:2 float64"]
    assert set(v1) == set(against_reference.QUANTITIES) and all(0 <= found < 1e-9 for found in v1.values())
    assert v2["statistics"] is None and v2["pointer"] == 0
    assert v2["key parameters"] > 1e-3 and v2["loss"] > 1e-6
    assert not report["same"] and report["largest"]["float64"]["key parameters"] == v2["key parameters"]
    assert not list(tmp_path.rglob("__pycache__"))  # nothing is written into the checkout


@pytest.mark.process
def test_the_reference_itself() -> None:
    checkout = os.environ.get("MOCO_CHECKOUT")
    if not checkout:
        pytest.skip("MOCO_CHECKOUT names no work tree of facebookresearch/moco")
    code, out, error = run(Path(checkout))
    assert code == 0, out + error
