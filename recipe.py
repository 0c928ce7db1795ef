"""The settings of a run: one flat, frozen, typed record. Every field is a flag of train.py and a key of recipes/*.yaml;
nothing below the entry point sees it (pipeline and model take plain arguments).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from pipeline.files import is_remote, write_atomically


def _(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


BY_EPOCH = ("step", "cosine", "cosine_from_1")  # schedules that change once an epoch


@dataclass(frozen=True)
class Recipe:
    # --- data
    data: str = _("", "images to train on: folder of shards, tar, brace pattern, URL of these, or YAML card")
    max_bad_fraction: float = _(0.01, "stop when more than this share of the images cannot be read")
    cache_dir: str = _("", "folder of the disk cache for remote shards; empty: ~/.cache/moco-pipeline")
    cache_gb: float = _(50.0, "size of the disk cache for remote shards, in GiB")
    num_threads: int = _(0, "CPU threads of the data pipeline on each rank; 0: the rank's share of the machine's cores")

    # --- encoder
    arch: str = _(
        "resnet50",
        "encoder: resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x8d, resnext101_32x8d, or timm:NAME",
    )
    width: int = _(1, "factor on a ResNet's channels (the paper's R50-w2x: 2, R50-w4x: 4)")
    small_stem: bool = _(False, "3x3 first convolution with stride 1 and no max-pooling, for images of about 32 pixels")
    dim: int = _(128, "dimensions of the embedding that the head makes")
    mlp: bool = _(False, "two-layer projection head (MoCo v2) instead of a linear one (v1)")
    init: str = _("", "MoCo .pth.tar, of the reference code or of transfer.export, that a new run starts from")
    init_with: Literal["all", "weights"] = _(
        "all",
        "what a new run takes from init: all goes on with the file's training when it holds the optimiser (its "
        "momentum and epoch too); weights takes encoders and queue alone and begins at epoch 0",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _(
        "bf16", "number format of the encoders; loss, queue and momentum update are always fp32"
    )
    compile: bool = _(False, "run both encoders through torch.compile")

    # --- MoCo
    mechanism: Literal["moco", "end_to_end", "memory_bank"] = _(
        "moco", "where the negatives come from (figure 2 of the paper)"
    )
    symmetric: bool = _(
        False, "each view is query once and key once; the two losses are added, and the log gives their mean"
    )
    queue_size: int = _(65536, "keys in the queue; memory_bank: entries drawn as negatives")
    moco_momentum: float = _(0.999, "momentum of the key encoder, m of equation 2")
    momentum_schedule: Literal["constant", "cosine"] = _(
        "constant", "moco_momentum over the run; cosine: rising to 1 as in MoCo v3"
    )
    temperature: float = _(0.07, "temperature of the InfoNCE loss, equation 1")
    bn_groups: int = _(
        8,
        "groups of the global batch that batch norm takes its statistics over, batch_size / bn_groups images each, "
        "whatever the ranks and accumulate (the papers: 8, one a GPU)",
    )
    shuffle_bn: bool = _(True, "shuffle the keys over the batch-norm groups; without it pretext accuracy nears 100 %%")

    # --- views
    views: str | Mapping[str, Any] = _(
        "v2", "augmentation recipe: v1, v2, cifar, byol, byol_key, or a YAML file of the fields in docs/data.md"
    )
    key_views: str | Mapping[str, Any] = _("", "another one for the keys' views; empty: that of --views")
    image_size: int = _(224, "side of a view in pixels")
    crop_min: float | None = _(
        None, "smallest share of the image's area in a random crop; when left out that of --views, 0.2 but for byol's"
    )
    mean: tuple[float, float, float] | None = _(
        None, "mean of the channels, pixels from 0 to 1, by which views are normalised; when left out that of --views"
    )
    std: tuple[float, float, float] | None = _(
        None, "and their standard deviation; pipeline.statistics measures both; when left out that of --views"
    )

    # --- optimiser
    epochs: int = _(200, "passes over the data, and the period of the step and cosine schedules; 0: until max_steps")
    max_steps: int = _(0, "stop after this many optimiser steps even if epochs are left; 0: no limit")
    batch_size: int = _(256, "images per optimiser step, over all ranks and micro-batches")
    accumulate: int = _(1, "micro-batches per optimiser step, to save memory; queue and key encoder move once a step")
    lr: float = _(0.03, "learning rate, used as given (the papers': 0.03 per 256 images of batch_size)")
    sgd_momentum: float = _(0.9, "momentum of SGD")
    weight_decay: float = _(1e-4, "weight decay, on batch norm and biases too, as in the reference code")
    schedule: Literal["step", "cosine", "cosine_from_1", "exponential", "constant"] = _(
        "cosine", "schedule of the learning rate; cosine_from_1 counts epochs from 1, as the reference CIFAR-10 demo"
    )
    milestones: tuple[int, ...] = _((120, 160), "epochs at which the step schedule multiplies lr by decay")
    decay: float = _(0.1, "factor of the step and exponential schedules")
    decay_steps: int = _(62500, "steps between two decays of the exponential schedule")
    warmup_epochs: int = _(0, "epochs over which lr rises linearly to its value (the papers: none)")

    # --- run
    out: str = _("", "run folder, or its URL; the same command again continues what is in it")
    work_dir: str = _("", "local folder that a run lives in whose out is a URL; empty: a folder beside the disk cache")
    seed: int = _(0, "seed of weights, order and views")
    save_every: int = _(1000, "steps between checkpoints")
    keep_checkpoints: int = _(3, "how many of the newest checkpoints are kept")
    keep_every: int = _(0, "keep the checkpoint at the end of every so many epochs for good; 0: none")
    hang_seconds: float = _(
        30.0, "end all ranks when one makes no step for so long (or five times the slowest step so far); 0: never"
    )

    # --- watching
    log_every: int = _(10, "steps between log lines; each one waits for the GPU")
    knn_every: int = _(0, "epochs between measurements of the features, kNN accuracy and RankMe; 0: none")
    knn_data: str = _("", "labelled source whose images kNN classifies; empty: RankMe alone, of 4,096 training images")
    knn_train: str = _("", "labelled source in which kNN looks for neighbours; empty: that of --data, if it has labels")
    knn_features: Literal["backbone", "head"] = _(
        "backbone", "output that kNN compares (the reference CIFAR-10 demo: head)"
    )
    trackers: tuple[str, ...] = _(
        ("tensorboard",), "accelerate's trackers that get the metrics too: tensorboard, wandb, ...; []: none"
    )
    profile: int = _(0, "trace so many steps, print where their time goes, and stop; 0: train")

    def validate(self) -> None:
        """Raises ValueError for what can be known to be wrong before anything heavy starts."""
        if not self.data:
            raise ValueError(
                "--data is missing: a folder of shards made by `python pipeline/make_shards.py IMAGES SHARDS`"
            )
        if not self.out:
            raise ValueError("--out is missing: the folder that this run is kept in, for example runs/photos")
        if self.work_dir and not is_remote(self.out):
            raise ValueError(f"work_dir is for a run whose out is a URL; out {self.out} is a folder itself")
        positive = "batch_size accumulate dim queue_size temperature bn_groups image_size lr decay_steps width"
        for name in (*positive.split(), "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, value in to_dict(self).items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{name} is {value}; it cannot be negative")
        if self.epochs == 0 and (self.max_steps == 0 or self.schedule in BY_EPOCH):
            raise ValueError(f"epochs 0 needs max_steps, and a schedule that is none of {', '.join(BY_EPOCH)}")
        if not 0 <= self.moco_momentum <= 1:
            raise ValueError(f"moco_momentum is {self.moco_momentum}; it must be between 0 and 1")
        if self.crop_min is not None and not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min is {self.crop_min}; it must be above 0 and at most 1")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, three numbers each, for pixels from 0 to 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} micro-batches"
            )
        if self.mechanism == "end_to_end" and self.accumulate > 1:
            raise ValueError(
                f"mechanism end_to_end takes its negatives from the batch: accumulate {self.accumulate} would leave "
                f"{self.batch_size // self.accumulate - 1} of {self.batch_size - 1}; take accumulate 1 and a smaller "
                "batch_size"
            )

    def images_per_pass(self, ranks: int) -> int:
        """Images of one forward pass on one rank. Raises ValueError when the batch does not divide."""
        passes = ranks * self.accumulate
        if self.batch_size % passes:
            near = max(1, round(self.batch_size / passes)) * passes
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {ranks} ranks x {self.accumulate} micro-batches; "
                f"the nearest that does: {near}"
            )
        return self.batch_size // passes

    def bn_groups_per_pass(self, ranks: int) -> int:
        """Batch-norm groups of one forward pass on one rank: `bn_groups` counts those of the global batch, so that
        a group has batch_size / bn_groups images however ranks and micro-batches share the batch.

        Raises ValueError when that cannot be, with the numbers of groups that can.
        """
        images, passes = self.images_per_pass(ranks), ranks * self.accumulate
        size = self.batch_size // self.bn_groups
        if self.batch_size % self.bn_groups:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into bn_groups {self.bn_groups} of equal size; take a "
                "bn_groups that divides it"
            )
        shares = f"{ranks} ranks x {self.accumulate} micro-batches"
        if self.bn_groups < passes:
            raise ValueError(
                f"bn_groups {self.bn_groups} makes batch-norm groups of {size} images, but {shares} leave only "
                f"{images} to a forward pass: give --bn_groups {passes} for groups of {images}, or fewer ranks or "
                "micro-batches"
            )
        if self.bn_groups % passes:
            lower = self.bn_groups // passes * passes
            sizes = f"{lower} (groups of {self.batch_size / lower:g} images) or {lower + passes}"
            raise ValueError(
                f"bn_groups {self.bn_groups} (groups of {size} images) does not divide over {shares}; use {sizes}"
            )
        return self.bn_groups // passes


# Field that begins a group of flags -> its title. The fields of a group follow each other.
GROUPS = {
    "data": "data",
    "arch": "encoder",
    "mechanism": "MoCo",
    "views": "views",
    "epochs": "optimiser",
    "out": "run",
    "log_every": "watching",
}

# Fields that may differ between the command that began a run and one that continues it; `data` only with the same
# fingerprint.
CHANGEABLE = frozenset(
    {
        "data",
        "out",
        "work_dir",
        "epochs",
        "max_steps",
        "accumulate",
        "bn_groups",
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
    group = parser
    for f in dataclasses.fields(Recipe):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        about: dict[str, Any] = {"default": f.default, "help": f.metadata["help"]}
        if f.name in ("mean", "std"):  # three words, as for the commands in transfer/
            group.add_argument(f"--{f.name}", type=float, nargs=3, metavar=("R", "G", "B"), **about)
        else:
            group.add_argument(f"--{f.name}", type=types[f.name], **about)
    return parser


def parse(arguments: list[str] | None = None) -> Recipe:
    """From the command line. Prints one error and exits with 2 when an argument is not understood."""
    return _freeze(parser().parse_args(arguments).as_dict())


def load(path: str | Path) -> Recipe:
    """Reads a YAML of fields, such as RUN/recipe.yaml. Raises FileNotFoundError, and ValueError that names the file
    and what in it is no recipe.
    """
    content = Path(path).read_bytes()
    try:
        values = yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a recipe: {_reason(error)}") from error
    return from_dict({} if values is None else values, path)


def from_dict(values: object, where: str | Path) -> Recipe:
    """The recipe of plain values, as `to_dict` makes them. Raises ValueError that names `where` they are from, and
    what in them is no recipe.
    """
    try:
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, not `field: value` lines")
        unknown = sorted(str(key) for key in set(values) - {f.name for f in dataclasses.fields(Recipe)})
        if unknown:
            raise TypeError(f"unknown recipe fields {', '.join(unknown)}")
        quiet = parser()
        quiet.exit_on_error = False
        return _freeze(quiet.parse_object(values).as_dict())
    except (ArgumentError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} is not a recipe: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


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
