"""What a new run takes from the file that --init names, and what it says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from model.encoders import Encoder
from model.moco import MoCo
from recipe import Recipe
from trainer.build import begin_from, build_dictionary, build_net

DEMO = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "fc"}


class Position:
    """A loader of 7 steps an epoch, of which only the place in the order matters here."""

    steps_per_epoch = 7

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seed": 0, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def begin(path: Path, **options: Any) -> tuple[int, str, Position, torch.optim.SGD, Encoder, MoCo]:
    r = Recipe(
        arch="resnet18", small_stem=True, dim=16, queue_size=24, bn_groups=2, batch_size=8, symmetric=True,
        moco_momentum=0.9, init=str(path), **options,
    )  # fmt: skip
    net = build_net(r, 1)
    moco = build_dictionary(r, net, 1, 100, torch.device("cpu"))
    optimizer, loader, notes = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), Position(), list[str]()
    step = begin_from(r, net, moco, optimizer, loader, notes)  # type: ignore[arg-type]
    assert isinstance(moco, MoCo)
    return step, notes[0], loader, optimizer, net, moco


def demo_net(seed: int) -> torchvision.models.ResNet:
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=16)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def demo_names(net: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    numbers = {name: number for number, name in DEMO.items()}
    parts = {name: name.split(".", 1) for name in net.state_dict()}
    return {f"{prefix}.net.{numbers[a]}.{b}": net.state_dict()[name] for name, (a, b) in parts.items()}


@pytest.mark.slow
def test_the_training_of_a_demo_file_goes_on(tmp_path: Path) -> None:
    """The CIFAR-10 demo's model_last.pth after epoch 3: weights, momentum, queue and pointer, epoch; and the momentum
    update that its key encoder lags, made up for."""
    query, key = demo_net(0), demo_net(1)
    optimizer = torch.optim.SGD([*query.parameters(), *key.parameters()], 0.06, momentum=0.9)
    for parameter in query.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    queue = torch.nn.functional.normalize(torch.randn(16, 24), dim=0)
    state = demo_names(query, "encoder_q") | demo_names(key, "encoder_k")
    state |= {"queue": queue, "queue_ptr": torch.tensor([16])}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "model_last.pth")

    step, note, loader, ours, net, moco = begin(tmp_path / "model_last.pth")
    assert step == loader.batches == 3 * 7
    assert moco.shuffler.count == 2 * step  # symmetric: two passes a step
    assert note.endswith("query encoder, key encoder, queue, optimiser; begins at epoch 3")
    for mine, theirs, lagging, mine_k in zip(
        net.parameters(), query.parameters(), key.parameters(), moco.encoder_k.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(ours.state[mine]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])
        torch.testing.assert_close(mine_k, 0.9 * lagging + 0.1 * theirs)
    assert torch.equal(moco.queue, queue) and int(moco.queue_ptr) == 16
    assert ours.param_groups[0]["lr"] == 0.1  # the recipe's, as everything but the state

    step, note, loader, ours, _, moco = begin(tmp_path / "model_last.pth", init_with="weights")
    assert step == loader.batches == moco.shuffler.count == 0 and not ours.state
    assert note.endswith("query encoder, key encoder, queue; begins at epoch 0")


def test_a_file_without_a_head_is_said_to_have_none(tmp_path: Path) -> None:
    torch.save(demo_net(0).state_dict(), tmp_path / "backbone.pth")
    step, note, _, ours, net, moco = begin(tmp_path / "backbone.pth")
    assert step == 0 and not ours.state
    assert note.endswith("backbone (the head begins anew); begins at epoch 0")
    assert all(torch.equal(q, k) for q, k in zip(net.parameters(), moco.encoder_k.parameters()))
    assert int(moco.queue_filled) == 0
