"""MoCo v2 written with lightly's classes, fed by lightly's own loader or by ours: only `batches` differs.

    python examples/lightly_moco.py --loader lightly --images ~/photos
    python examples/lightly_moco.py --loader ours --data shards/photos

After lightly's own example for MoCo (docs.lightly.ai). It is one process, so shuffling does not hide the statistics of
batch norm from it, there as here.
"""

import copy
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone: this program is in no package index
from pipeline.loader import Loader
from pipeline.manifest import open_source

Pairs = Iterator[tuple[Tensor, Tensor]]  # query and key, [N, 3, S, S] each


class MoCo(nn.Module):
    def __init__(self, arch: str, dim: int = 128) -> None:
        super().__init__()
        self.backbone = timm.create_model(arch, num_classes=0)
        features = self.backbone.num_features
        self.projection_head = MoCoProjectionHead(features, features, dim)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        x, shuffle = batch_shuffle(x)
        return batch_unshuffle(self.projection_head_momentum(self.backbone_momentum(x)), shuffle)


def lightly_batches(
    images: str, *, epochs: int, batch_size: int, workers: int, seed: int, views: dict[str, Any]
) -> Pairs:
    """lightly's dataset and transform behind torch's DataLoader. views: arguments of MoCoV2Transform."""
    dataset = LightlyDataset(images, transform=MoCoV2Transform(**views))
    torch.manual_seed(seed)
    loader = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    for _ in range(epochs):
        for (query, key), _, _ in loader:
            yield query, key


def our_batches(data: str, *, epochs: int, batch_size: int, workers: int, seed: int, views: dict[str, Any]) -> Pairs:
    """Our loader. views: `views`, `image_size` and `crop_min` as it takes them."""
    loader = Loader(
        open_source(data, progress=False),
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        num_threads=workers or None,
        **views,
    )
    for query, key, _ in loader:
        yield query, key
    loader.close()


def train(
    batches: Pairs, arch: str, *, lr: float, queue: int = 4096, temperature: float = 0.1, m: float = 0.99
) -> tuple[MoCo, list[float]]:
    """The trained model and the loss of each step: Algorithm 1 of the paper, as lightly's classes have it."""
    model = MoCo(arch)
    criterion = NTXentLoss(temperature=temperature, memory_bank_size=(queue, 128))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for query, key in batches:
        update_momentum(model.backbone, model.backbone_momentum, m=m)
        update_momentum(model.projection_head, model.projection_head_momentum, m=m)
        loss = criterion(model(query), model.forward_momentum(key))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--loader", choices=("ours", "lightly"), default="ours", help="who makes the views")
    add("--images", help="folder of images, which lightly's loader reads")
    add("--data", help="folder of shards made of them, which ours reads")
    add("--arch", default="resnet18", help="backbone, a name of timm's")
    add("--epochs", type=int, default=10, help="passes over the images")
    add("--batch_size", type=int, default=64, help="images in a step")
    add("--image_size", type=int, default=224, help="side of a view in pixels")
    add("--lr", type=float, default=0.03, help="learning rate")
    add("--workers", type=int, default=2, help="processes of lightly's loader, threads of ours")
    add("--seed", type=int, default=0, help="seed of weights, order and views")
    args = parser.parse_args()
    how = {"epochs": args.epochs, "batch_size": args.batch_size, "workers": args.workers, "seed": args.seed}
    if (args.data if args.loader == "ours" else args.images) is None:
        parser.error(f"--loader {args.loader} needs {'--data' if args.loader == 'ours' else '--images'}")
    if args.loader == "ours":
        batches = our_batches(args.data, **how, views={"views": "v2", "image_size": args.image_size})
    else:
        batches = lightly_batches(args.images, **how, views={"input_size": args.image_size})
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    _, losses = train(batches, args.arch, lr=args.lr)
    seconds = time.perf_counter() - began
    rate = len(losses) * args.batch_size / seconds
    print(f"{args.loader}: {len(losses)} steps in {seconds:.1f} s, {rate:.0f} images/s, last loss {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
