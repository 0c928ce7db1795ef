"""A training loop of one's own on `pipeline.loader.Loader`: SimCLR's loss between BYOL's two views of each image.

    python examples/own_loop.py --data shards/photos --output own.pt --epochs 10

The same command goes on where it was stopped, with the samples and views that would have come next.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
import torchvision
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone: this program is in no package index
from pipeline.loader import Loader
from pipeline.manifest import open_source


def train(
    data: str, output: Path, *, epochs: int, batch_size: int = 64, image_size: int = 224, device: str = "cpu"
) -> list[float]:
    """The loss of each step that was made now."""
    loader = Loader(
        open_source(data),
        views="byol",
        key_views="byol_key",
        image_size=image_size,
        batch_size=batch_size,
        epochs=epochs,
        device=device,
    )
    net = torchvision.models.resnet18(num_classes=128).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03 * batch_size / 256, momentum=0.9, weight_decay=1e-4)
    if output.exists():
        saved = torch.load(output, map_location=device, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
    losses = []
    for query, key, _ in loader:
        q, k = functional.normalize(net(query)), functional.normalize(net(key))  # [N, 128]
        loss = functional.cross_entropy(q @ k.T / 0.2, torch.arange(len(q), device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        done = loader.state_dict()["batches"]
        if done % loader.steps_per_epoch == 0:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
            torch.save(state, output)
            print(f"step {done} of {len(loader)}  loss {loss.item():.3f}", flush=True)
    loader.close()
    return losses


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help="folder of shards, URL or card")
    parser.add_argument("--output", type=Path, required=True, help="file that the training is saved in")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data, those before included")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a step")
    parser.add_argument("--image_size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    options = vars(parser.parse_args())
    train(options.pop("data"), options.pop("output"), **options)


if __name__ == "__main__":
    main()
