"""Common to transfer.detect and transfer.segment: where they begin, the schedule, the optimiser, a rank's share."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.joining import Ranks
from transfer.arguments import encoder_arguments
from transfer.class_maps import ClassMaps
from transfer.detection_data import Annotated
from transfer.load import LoadedEncoder, load_encoder, weights_hash
from transfer.training import Session, folder_of, plain, shared

WARMUP_FROM = 0.001  # of the learning rate, as Detectron2 has it


@dataclass(frozen=True)
class Schedule:
    """SGD as the paper's fine-tuning has it: steps of a tenth, at shares of all iterations."""

    iterations: int = 24000
    batch_size: int = 16  # over all ranks
    lr: float = 0.02
    decay_at: Sequence[float] = (0.75, 0.917)
    warmup: int = 1000
    momentum: float = 0.9
    weight_decay: float = 0.0001
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate at a step, from 0 on."""
        rate = self.lr * 0.1 ** sum(step >= round(share * self.iterations) for share in self.decay_at)
        done = min(1.0, step / self.warmup) if self.warmup else 1.0
        return rate * (WARMUP_FROM * (1 - done) + done)

    def optimizer(self, net: nn.Module, *, decay_norms: bool) -> torch.optim.SGD:
        """decay_norms False: no weight decay on batch norm, as in Detectron2."""
        norms = [p for module in net.modules() if isinstance(module, _BatchNorm) for p in module.parameters()]
        of_norms = {id(p) for p in norms}
        rest = [p for p in net.parameters() if id(p) not in of_norms]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": norms, "weight_decay": self.weight_decay if decay_norms else 0.0},
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def schedule_of(args: Namespace) -> Schedule:
    names = ("iterations", "batch_size", "lr", "decay_at", "warmup", "momentum", "weight_decay", "seed")
    return Schedule(**{name: args[name] for name in names})


def settings_of(
    name: str,
    loaded: LoadedEncoder,
    train_data: Annotated | ClassMaps,
    val_data: Annotated | ClassMaps,
    protocol: Any,
) -> dict[str, Any]:
    """Everything that makes another experiment of the command `name`, in plain values; protocol: a dataclass."""
    about = {"protocol": name, "encoder": weights_hash(loaded.encoder.backbone), "mean_std": loaded.mean_std}
    sets = {key: [data.fingerprint, len(data.files)] for key, data in (("train", train_data), ("val", val_data))}
    return plain(about | sets | asdict(protocol))


def refuse_foreign_picture(path: Path, state: dict[str, Any] | None, ranks: Ranks) -> None:
    """ValueError for a picture that no training here wrote, and that an evaluation would write over."""
    if state is None and shared(path.exists, ranks):
        raise ValueError(f"{path} is of no training that was here: take another --out, or move it away")


def training_arguments(args: Namespace) -> dict[str, Any]:
    """Those of `transfer.training.train` that are flags."""
    return {name: args[name] for name in ("precision", "evaluate_every", "save_every", "log_every")}


def load_start(args: Namespace, *, says: bool = True) -> LoadedEncoder:
    """The encoder that `--run` names. says: a note of what is taken for granted. Errors as `load_encoder`."""
    loaded = load_encoder(args.run, **encoder_arguments(args), feeds_images=False)
    if says and not loaded.is_run and args.mean is None:
        usual = "CIFAR-10's" if loaded.recipe.small_stem else "ImageNet's"
        said = f"note: {loaded.name} does not say how its images were fed; taken: {usual} mean and std (--mean --std)"
        print(said, file=sys.stderr)
    return loaded


def folder_after_recipe(args: Namespace, name: str) -> str:
    """As `folder_of`: when left out a folder named after the recipe too."""
    return folder_of(args, "_".join([name, *[Path(str(config)).stem for config in args.config or []][-1:]]))


def share_of(count: int, at: Session) -> Iterator[int]:
    """The images of a set that this rank judges. Each is a sign of life for the watchdog, as many on every rank."""
    for first in range(0, count, at.ranks.world_size):
        at.phase("evaluate")
        if first + at.ranks.rank < count:
            yield first + at.ranks.rank
