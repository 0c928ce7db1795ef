"""What a run is: one flat, frozen, typed record. Every field is a flag of train.py and a key of recipes/*.yaml;
nothing below the entry point sees it (pipeline and model take plain arguments).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pipeline.files import write_atomically


def _(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    data: str = _("", "folder of shards, URL, brace pattern or YAML card")
    out: str = _("", "run folder; running the same command again continues what is in it")
    init: str = _("", "a MoCo .pth.tar that a new run starts from: its encoders, and its queue when it has one")
    seed: int = _(0, "of weights, order and views")
    epochs: int = _(200, "passes over the data, and the period of the step and cosine schedules; 0: until max_steps")
    max_steps: int = _(0, "stop after this many optimiser steps even if epochs are left; 0: no limit")
    batch_size: int = _(256, "global: images per optimiser step, over all ranks and micro-batches")
    accumulate: int = _(1, "micro-batches per optimiser step; queue and key encoder move once a step all the same")

    arch: str = _("resnet50", "torchvision ResNet, wide_resnet or resnext, or timm:NAME")
    width: int = _(1, "multiplies the channels (R50-w2x: 2, R50-w4x: 4)")
    small_stem: bool = _(False, "3x3 stride 1 stem without max-pooling, for images of about 32 pixels")
    dim: int = _(128, "of the embedding")
    mlp: bool = _(False, "two-layer projection head (MoCo v2) instead of a linear one (v1)")

    mechanism: Literal["moco", "end_to_end", "memory_bank"] = _(
        "moco", "where the negatives come from (paper, figure 2)"
    )
    symmetric: bool = _(False, "each view is query once and key once; the two losses are added")
    queue_size: int = _(65536, "keys in the dictionary")
    moco_momentum: float = _(0.999, "m of equation 2")
    momentum_schedule: Literal["constant", "cosine"] = _("constant", "cosine: from m to 1 over the run, as MoCo v3")
    temperature: float = _(0.07, "of the InfoNCE loss, equation 1")
    bn_groups: int = _(
        8, "batch-norm groups of the global batch, shared out over the ranks (the papers: 8 GPUs, 8 groups)"
    )
    shuffle_bn: bool = _(True, "shuffle the keys over the batch-norm groups; without it pretext accuracy nears 100 %%")

    views: str = _("v2", "augmentation: v1, v2, or cifar, that of the reference CIFAR-10 demo")
    image_size: int = _(224, "pixels")
    crop_min: float = _(0.2, "smallest share of the image's area in a random crop")

    lr: float = _(0.03, "used as given; the papers': 0.03 for a global batch of 256, in proportion for others")
    sgd_momentum: float = _(0.9, "of SGD")
    weight_decay: float = _(1e-4, "on all parameters, batch norm's and biases included, as in the reference code")
    schedule: Literal["step", "cosine", "exponential", "constant"] = _("cosine", "of the learning rate")
    milestones: tuple[int, ...] = _((120, 160), "epochs at which the step schedule multiplies lr by decay")
    decay: float = _(0.1, "factor of the step and exponential schedules")
    decay_steps: int = _(62500, "steps between two decays of the exponential schedule")
    warmup_epochs: int = _(0, "linear warm-up; the papers have none")

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _(
        "bf16", "of the encoders; loss, queue and momentum update are fp32"
    )
    compile: bool = _(False, "torch.compile both encoders")
    num_threads: int = _(0, "CPU threads of the data pipeline per rank; 0: its own choice")

    log_every: int = _(10, "steps; also how often host and GPU meet")
    save_every: int = _(1000, "steps between checkpoints")
    keep_checkpoints: int = _(3, "newest checkpoints kept")
    keep_every: int = _(0, "epochs: the checkpoint at the end of every so many is kept for good; 0: none")
    knn_data: str = _("", "labelled source whose images the kNN monitor classifies")
    knn_train: str = _("", "labelled source it looks the neighbours up in; empty: data, which must then have labels")
    knn_every: int = _(0, "epochs; 0: off")
    knn_features: Literal["backbone", "head"] = _("backbone", "what kNN compares; the reference CIFAR-10 demo: head")
    trackers: tuple[str, ...] = _(
        ("tensorboard",), "accelerate's trackers beside metrics.jsonl: tensorboard, wandb, ..."
    )
    max_bad_fraction: float = _(0.01, "stop when more of the images than this are unreadable")
    cache_dir: str = _("", "disk cache of remote shards")
    cache_gb: float = _(50.0, "its size")
    hang_seconds: float = _(
        30.0, "end all ranks when one makes no step for so long (or five times the slowest step so far); 0: never"
    )
    profile: int = _(0, "trace this many steps, print where their time goes, and stop")

    def validate(self) -> None:
        """Raises ValueError for what can be known to be wrong before anything heavy starts."""
        if not self.data:
            raise ValueError(
                "--data is missing: a folder of shards made by `python pipeline/make_shards.py IMAGES SHARDS`"
            )
        if not self.out:
            raise ValueError("--out is missing: the folder that this run is kept in, for example runs/photos")
        positive = "batch_size accumulate dim queue_size temperature bn_groups image_size lr decay_steps width"
        for name in (*positive.split(), "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, value in to_dict(self).items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{name} is {value}; it cannot be negative")
        if self.epochs == 0 and (self.max_steps == 0 or self.schedule in ("step", "cosine")):
            raise ValueError("epochs 0 needs max_steps, and a schedule that is not step or cosine")
        if not 0 <= self.moco_momentum <= 1:
            raise ValueError(f"moco_momentum is {self.moco_momentum}; it must be between 0 and 1")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min is {self.crop_min}; it must be above 0 and at most 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} micro-batches"
            )
        if self.knn_every and not self.knn_data:
            raise ValueError(f"knn_every is {self.knn_every} but knn_data names no labelled source")

    def images_per_rank(self, ranks: int) -> int:
        """Of one micro-batch. Raises ValueError when the batch does not divide."""
        if self.batch_size % (ranks * self.accumulate):
            near = max(1, round(self.batch_size / (ranks * self.accumulate))) * ranks * self.accumulate
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {ranks} ranks x {self.accumulate} micro-batches; "
                f"the nearest that does: {near}"
            )
        return self.batch_size // (ranks * self.accumulate)

    def bn_groups_per_rank(self, ranks: int) -> int:
        """`bn_groups` counts the groups of the whole batch, so that the result does not depend on how many ranks
        share it; a rank has at least one. Raises ValueError when the groups do not divide.
        """
        images = self.images_per_rank(ranks)
        groups = max(1, self.bn_groups // ranks)
        if self.bn_groups > ranks and self.bn_groups % ranks:
            raise ValueError(f"bn_groups {self.bn_groups} does not divide over {ranks} ranks; use {groups * ranks}")
        if images % groups:
            raise ValueError(f"{images} images per rank and micro-batch do not divide into {groups} batch-norm groups")
        return groups


# What may differ between the command that began a run and one that continues it; `data` only with the same fingerprint.
CHANGEABLE = frozenset(
    {
        "data",
        "out",
        "epochs",
        "max_steps",
        "accumulate",
        "precision",
        "compile",
        "num_threads",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "keep_every",
        "knn_data",
        "knn_train",
        "knn_every",
        "knn_features",
        "trackers",
        "max_bad_fraction",
        "cache_dir",
        "cache_gb",
        "hang_seconds",
        "profile",
    }
)


def parser() -> ArgumentParser:
    """Every field a flag, --config a YAML of fields, --print_config; unknown keys are errors."""
    parser = ArgumentParser(
        prog="train.py",
        usage="[accelerate launch] train.py --config recipes/NAME.yaml --data SHARDS --out RUN [--FIELD VALUE ...]",
        description="MoCo pre-training; recipes/ has published settings.",
    )
    parser.add_argument("--config", action="config", help="a YAML of the fields below; flags after it override it")
    types = get_type_hints(Recipe)
    for f in dataclasses.fields(Recipe):
        parser.add_argument(f"--{f.name}", type=types[f.name], default=f.default, help=f.metadata["help"])
    return parser


def parse(arguments: list[str] | None = None) -> Recipe:
    """From the command line. Prints one error and exits with 2 when an argument is not understood."""
    return _freeze(parser().parse_args(arguments).as_dict())


def load(path: str | Path) -> Recipe:
    """Reads a YAML of fields, such as RUN/recipe.yaml. Raises FileNotFoundError, and ValueError naming an unknown
    key.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(Recipe)})
        if unknown:
            raise ValueError(f"{path}: unknown recipe fields {', '.join(unknown)}")
        quiet = parser()
        quiet.exit_on_error = False
        return _freeze(quiet.parse_object(values).as_dict())
    except (ArgumentError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from error


def save(recipe: Recipe, path: str | Path) -> None:
    write_atomically(path, yaml.safe_dump(to_dict(recipe), sort_keys=False).encode())


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML and torch.save(weights_only) hold them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """field -> (old, new), for the fields that differ."""
    a, b = to_dict(old), to_dict(new)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def _freeze(values: dict[str, Any]) -> Recipe:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "config"}
    return Recipe(**fields)
