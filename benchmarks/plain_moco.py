"""MoCo as one writes it in an afternoon: torchvision's transforms on PIL images, torch's DataLoader, a plain loop.

    python benchmarks/plain_moco.py --images FOLDER --bank SHARDS --val SHARDS --out RUN [--seed 0]

The other side of benchmarks/learning.py, on one process. Nothing of it is ours but kNN: `transfer.knn.evaluate` judges
its encoder as it judges train.py's. RUN/metrics.jsonl has the fields that train.py writes: the mean loss of each epoch,
and kNN. `--batches ours` feeds the same loop from our loader instead, which tells loop and data apart; `--nudge` begins
with weights that differ by a millionth, which shows how far rounding alone leads.
"""

import argparse
import copy
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIDE, CROP, DIM = 32, (0.08, 1.0), 128
Pairs = Iterable[tuple[Tensor, Tensor]]


def transform() -> Callable[[Image.Image], Tensor]:
    """The augmentation of the reference's CIFAR-10 demo, in torchvision's words."""
    return T.Compose(
        [
            T.RandomResizedCrop(SIDE, scale=CROP),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


def plain_batches(images: Path, batch_size: int, workers: int) -> Callable[[int], Pairs]:
    """Two views of each image of a class folder, in a new order each epoch; the rest of an epoch is dropped."""
    view = transform()
    dataset = ImageFolder(str(images), lambda image: (view(image), view(image)))
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    return lambda epoch: (views for views, _ in loader)


class SplitNorm(nn.BatchNorm2d):
    """Statistics over each of `groups` parts of the batch, as if each were a GPU."""

    def __init__(self, channels: int, *, groups: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var = self.running_mean.repeat(self.groups), self.running_var.repeat(self.groups)  # type: ignore[union-attr]
        weight, bias = self.weight.repeat(self.groups), self.bias.repeat(self.groups)
        parts = torch.cat(x.chunk(self.groups), dim=1)  # [n, groups*C, H, W]
        y = F.batch_norm(parts, mean, var, weight, bias, True, self.momentum or 0.0, self.eps)
        self.running_mean = mean.view(self.groups, -1).mean(dim=0)
        self.running_var = var.view(self.groups, -1).mean(dim=0)
        return torch.cat(y.chunk(self.groups, dim=1))


class Encoder(nn.Module):
    """A timm model and a linear head."""

    def __init__(self, arch: str, groups: int) -> None:
        super().__init__()
        norm = functools.partial(SplitNorm, groups=groups)
        self.backbone = timm.create_model(arch, num_classes=0, norm_layer=norm)
        self.head = nn.Linear(self.backbone.num_features, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


def train(
    f_q: Encoder,
    batches: Callable[[int], Pairs],
    *,
    epochs: int,
    lr: float,
    K: int,
    after: Callable[[int, float, Encoder], None],
    m: float = 0.99,
    temperature: float = 0.1,
    weight_decay: float = 5e-4,
) -> None:
    """MoCo on `batches(epoch)`, pairs of views [N, 3, S, S]; `after` gets each epoch's steps, mean loss and encoder."""
    f_k = copy.deepcopy(f_q).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(DIM, K), dim=0), 0
    sgd = torch.optim.SGD(f_q.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    for epoch in range(epochs):
        sgd.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (epoch + 1) / epochs))  # the demo counts from 1
        f_q.train()
        losses = []
        for x_q, x_k in batches(epoch):
            with torch.no_grad():
                for k, q in zip(f_k.parameters(), f_q.parameters()):
                    k.mul_(m).add_(q, alpha=1 - m)
                shuffled = torch.randperm(len(x_k))  # shuffle BN
                keys = F.normalize(f_k(x_k[shuffled]), dim=1)[shuffled.argsort()]
            queries = F.normalize(f_q(x_q), dim=1)
            positive = (queries * keys).sum(dim=1, keepdim=True)
            logits = torch.cat([positive, queries @ queue], dim=1) / temperature
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            queue[:, torch.arange(pointer, pointer + len(keys)) % K] = keys.T
            pointer = (pointer + len(keys)) % K
            losses.append(loss.item())
        after(len(losses), sum(losses) / len(losses), f_q)


def our_batches(shards: str, batch_size: int, seed: int) -> Callable[[int], Pairs]:
    """The batches that train.py gets."""
    from pipeline.loader import Loader
    from pipeline.sources.opening import open_source

    source = open_source(shards, progress=False)
    how: dict[str, Any] = {"views": "cifar", "image_size": SIDE, "crop_min": CROP[0], "num_threads": 1}
    loader = Loader(source, batch_size=batch_size, seed=seed, **how)
    return lambda epoch: ((b.query, b.key) for b in (next(loader) for _ in range(loader.steps_per_epoch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of class folders to train on")
    add("--bank", required=True, help="shards of the same images, labelled: kNN's memory")
    add("--val", required=True, help="labelled shards that kNN classifies")
    add("--out", type=Path, required=True, help="folder for metrics.jsonl, begun anew")
    add("--batches", choices=("plain", "ours"), default="plain", help="ours: from our loader, out of --bank")
    add("--arch", default="test_resnet", help="of timm")
    add("--epochs", type=int, default=20, help="passes over the images")
    add("--batch_size", type=int, default=128, help="images in a step")
    add("--bn_groups", type=int, default=4, help="groups of the batch with batch-norm statistics of their own")
    add("--queue_size", type=int, default=2048, help="K, the keys in the queue")
    add("--lr", type=float, default=0.06, help="learning rate, before its cosine")
    add("--knn_every", type=int, default=4, help="epochs between two measurements of kNN; 0: none")
    add("--workers", type=int, default=0, help="processes that load; 0: the training itself")
    add("--nudge", type=int, default=0, help="change the first weights by a millionth, each number in its way")
    add("--seed", type=int, default=0, help="of weights, order, views and shuffles")
    args = parser.parse_args()

    from pipeline.sources.opening import open_source
    from transfer.knn import evaluate
    from transfer.load import CentralCrops

    bank, val = (open_source(shards, progress=False) for shards in (args.bank, args.val))
    crops = CentralCrops(SIDE, (MEAN, STD), num_threads=1)
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = (args.out / "metrics.jsonl").open("w", buffering=1)
    done = {"steps": 0, "epochs": 0}

    def after(steps: int, loss: float, encoder: Encoder) -> None:
        done["steps"] += steps
        done["epochs"] += 1
        row = {"step": done["steps"], "epoch": done["epochs"], "loss": loss}
        if args.knn_every and done["epochs"] % args.knn_every == 0:
            judged = copy.deepcopy(encoder.backbone).eval()
            row["knn"] = evaluate(judged, bank, val, crops)["knn"]  # type: ignore[arg-type]
        metrics.write(json.dumps(row) + "\n")

    torch.manual_seed(args.seed)
    if args.batches == "ours":
        batches = our_batches(args.bank, args.batch_size, args.seed)
    else:
        batches = plain_batches(args.images, args.batch_size, args.workers)
    start = Encoder(args.arch, args.bn_groups)
    if args.nudge:
        noise = torch.Generator().manual_seed(args.nudge)
        with torch.no_grad():
            for weight in start.parameters():
                weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=noise))
    train(start, batches, epochs=args.epochs, lr=args.lr, K=args.queue_size, after=after)


if __name__ == "__main__":
    main()
