"""The flags of this room's commands. Nothing heavy is imported here: `--help` and a mistyped flag answer at once,
before the seconds that torch and DALI take.
"""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from pipeline.command import add_cache_flags
from pipeline.files import is_remote

FOLDERS = ("timm", "hf")  # formats that are a folder
ExportFormat = Literal["torchvision", "moco", "timm", "hf", "detectron2", "onnx"]
RUN = "run folder or its URL, a checkpoint of a run, a MoCo .pth.tar, or a ResNet's weights as torchvision names them"
SOURCE = "(folder of shards, URL, card)"
GRID = [0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]  # for a batch of 256
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
Similarity = restricted_number_type("Similarity", float, [(">=", -1), ("<=", 1)])


def knn() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.knn",
        description="Weighted kNN accuracy of an encoder; the last line is one JSON object.",
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("--train", type=str, required=True, help=f"labelled source whose features vote {SOURCE}")
    add("--val", type=str, required=True, help=f"labelled source to classify {SOURCE}")
    add_features_flag(parser)
    add("--k", type=PositiveInt, default=200, help="neighbours that vote; at most the number of training images")
    add("--temperature", type=PositiveFloat, default=0.1, help="votes weigh exp(similarity / temperature)")
    add_crop_flags(parser)
    add_precision_flag(parser, "similarities are always fp32")
    add("--num_threads", type=PositiveInt | None, help="decoding threads; all cores when left out")
    add_cache_flags(parser)
    add("--pixels", action="store_true", help="judge raw pixels (averaged down to 32x32 when larger)")
    add("--output", type=str | None, help="folder whose evaluations.jsonl keeps the figure where RUN is a bare file")
    return parser.parse_args()


def linear() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.linear",
        description="Linear protocol: accuracy of a linear classifier on frozen features; the last line is one JSON "
        "object.",
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("--train", type=str, required=True, help=f"labelled source to train on {SOURCE}")
    add("--val", type=str, required=True, help=f"labelled source to classify {SOURCE}")
    add("--out", type=str | None, help="folder for metrics and checkpoint, or its URL; RUN/linear when left out")
    add("--lr", type=PositiveFloat | list[PositiveFloat], default=GRID, help="one, or a list for a classifier each")
    add("--epochs", type=PositiveInt, default=100, help="passes over the training images")
    add("--batch_size", type=PositiveInt, default=256, help="images per step over all ranks")
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=float, default=0.0, help="weight decay of SGD")
    add_precision_flag(parser, "the classifier is fp32")
    add("--seed", type=int, default=0, help="seed of the classifier's weights, of order and crops")
    add("--num_threads", type=PositiveInt | None, help="decoding threads a rank; its share of the cores when left out")
    add_cache_flags(parser)
    return parser.parse_args()


def finetune() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.finetune",
        description="Fine-tuning: accuracy of a classifier whose layers are all trained, from an encoder on; the last "
        "line is one JSON object.",
    )
    add = parser.add_argument
    add("--config", action="config", help="a YAML of the flags below, as in recipes/finetune; flags after it override")
    add_encoder_flags(parser)
    add("--train", type=str, required=True, help=f"labelled source to train on {SOURCE}")
    add("--val", type=str, required=True, help=f"labelled source to classify {SOURCE}")
    add("--out", type=str | None, help="folder of log, checkpoint and model, or its URL; RUN/finetune when left out")
    add(
        "--fraction",
        type=Share,
        nargs="+",
        default=[1.0],
        help="parts of each class's training images, a training for each: the same images for everybody",
    )
    add("--lr", type=PositiveFloat, default=0.03, help="learning rate of the backbone")
    add("--lr_head", type=PositiveFloat | None, help="that of the new last layer; that of the backbone when left out")
    add("--epochs", type=PositiveInt, default=100, help="passes over the training images")
    add("--batch_size", type=PositiveInt, default=256, help="images per step over all ranks")
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=float, default=1e-4, help="weight decay, on batch norm and biases too")
    add("--schedule", type=Literal["step", "cosine", "constant"], default="step", help="of both learning rates")
    add(
        "--milestones",
        type=NonNegativeInt,
        nargs="*",
        default=[30, 60, 90],
        help="epochs at which the step schedule multiplies by --decay",
    )
    add("--decay", type=PositiveFloat, default=0.1, help="factor of the step schedule")
    add("--warmup_epochs", type=NonNegativeInt, default=0, help="epochs over which the rates rise to their values")
    add(
        "--precision",
        type=Literal["fp32", "bf16", "fp16"],
        default="fp32",
        help="number format of forward and backward pass; weights are always fp32, fp16 needs a GPU",
    )
    add("--seed", type=int, default=0, help="seed of the last layer's weights, of order and crops; not of --fraction")
    add_training_flags(parser)
    add("--num_threads", type=PositiveInt | None, help="decoding threads a rank; its share of the cores when left out")
    add_cache_flags(parser)
    return parser.parse_args()


def embed() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.embed",
        description="Features of every image of a source as .npy and a table; the last line is one JSON object.",
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("--data", type=str, required=True, help=f"source to embed {SOURCE}; labels are optional")
    add("--output", type=on_this_machine, required=True, help="folder of the features, which all machines see")
    add_features_flag(parser)
    add(
        "--views", type=NonNegativeInt, default=0, help="augmented views of each image to embed as well, as in training"
    )
    add_crop_flags(parser)
    add_precision_flag(parser, "features are always fp32")
    add("--num_threads", type=PositiveInt | None, help="decoding threads a rank; its share of the cores when left out")
    add("--seed", type=int, default=0, help="decides the augmented views")
    add_cache_flags(parser)
    return parser.parse_args()


def probe() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.probe",
        description="kNN, few-label classifiers and effective ranks from folders of features; the last line is one "
        "JSON object.",
    )
    add = parser.add_argument
    add("--train", type=on_this_machine, required=True, help="folder of transfer.embed with the training images")
    add("--val", type=on_this_machine, required=True, help="folder of transfer.embed with the images to classify")
    add("--output", type=on_this_machine, help="folder of table and picture; VAL/probe when left out")
    add("--k", type=list[PositiveInt], default=[1, 5, 10, 20, 50, 100, 200], help="numbers of neighbours for kNN")
    add("--temperature", type=list[PositiveFloat], default=[0.02, 0.07, 0.1, 0.5], help="temperatures for kNN")
    add("--shares", type=list[ClosedUnitInterval], default=[1.0, 0.1, 0.01], help="parts of the labels to learn from")
    add("--shots", type=list[PositiveInt], default=[1, 5, 10], help="labelled images of each class to learn from")
    add("--seeds", type=PositiveInt, default=5, help="draws of the few labels")
    add("--cost", type=PositiveFloat, default=1.0, help="scikit-learn's C: the larger, the weaker the regularisation")
    return parser.parse_args()


def neighbours() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.neighbours",
        description="Neighbours, near-duplicates and a map from a folder of features; the last line is one JSON "
        "object.",
    )
    add = parser.add_argument
    add("--features", type=on_this_machine, required=True, help="folder of transfer.embed")
    add("--images", type=Path, nargs="+", default=[], help="image files whose neighbours are looked for")
    add("--rows", type=NonNegativeInt, nargs="+", default=[], help="rows of the folder, from 0, likewise")
    add("--neighbours", type=PositiveInt, default=8, help="how many of each")
    add("--duplicates_above", type=Similarity | None, help="list pairs of at least this cosine similarity, -1 to 1")
    add(
        "--val", type=on_this_machine, help="a second folder of transfer.embed: pairs between the two instead of within"
    )
    add("--output", type=on_this_machine, help="folder of lists and pictures; FEATURES/neighbours when left out")
    add("--data", type=str | None, help="source of the folder's pictures, if it has moved since")
    add("--run", type=str | None, help="run or checkpoint that the features are of, if it has moved or gone on since")
    add_cache_flags(parser)
    return parser.parse_args()


def compare() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.compare",
        description="Several encoders beside each other, a row for each; only what the runs' ledgers do not have is "
        "judged. The last line is one JSON object.",
    )
    add = parser.add_argument
    add("runs", type=str, nargs="+", help=f"encoders, a row for each: {RUN}")
    add("--train", type=str, required=True, help=f"labelled source to learn from {SOURCE}")
    add("--val", type=str, required=True, help=f"labelled source to classify {SOURCE}")
    add(
        "--protocols",
        type=str,
        default="knn,linear,logistic",
        help="columns, with commas: knn, linear, logistic, finetune; of another one, what the ledgers have of it",
    )
    add("--output", type=on_this_machine, help="folder of tables and picture; compare/ in the first run when left out")
    add("--seeds", type=PositiveInt, default=3, help="trainings of linear and finetune; few-label draws of logistic")
    add("--no_random", action="store_true", help="leave out the row of the first run's encoder as it was initialised")
    add("--pixels", action="store_true", help="a row for raw pixels, judged by kNN alone")
    add("--k", type=PositiveInt, default=200, help="neighbours of kNN")
    add("--linear_epochs", type=PositiveInt, default=100, help="passes of the linear protocol")
    add(
        "--linear_lr",
        type=list[PositiveFloat],
        default=GRID,
        help="its learning rates, a classifier each; the best counts",
    )
    add("--finetune_epochs", type=PositiveInt, default=100, help="passes of fine-tuning; x0.1 at 60 and 80 %% of them")
    add("--finetune_lr", type=PositiveFloat, default=0.03, help="its learning rate")
    add("--finetune_lr_head", type=PositiveFloat | None, help="that of the new last layer; the same when left out")
    add("--fraction", type=Share, nargs="+", default=[1.0], help="parts of the labels for fine-tuning, a column each")
    add("--batch_size", type=PositiveInt, default=256, help="images per step over all ranks, and per forward pass")
    add("--image_size", type=PositiveInt | None, help="side of the crop in pixels; by default that of the first run")
    add_precision_flag(parser, "classifiers on frozen features are fp32")
    add("--num_threads", type=PositiveInt | None, help="decoding threads a rank; its share of the cores when left out")
    add_cache_flags(parser)
    return parser.parse_args()


def gallery() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.gallery", description="Query images with their nearest neighbours."
    )
    add = parser.add_argument
    add_encoder_flags(parser)
    add("--data", type=str, required=True, help=f"source to search {SOURCE}; labels are optional")
    add("--output", type=str, default="gallery.png", help="the PNG to write, or its URL")
    add("--queries", type=PositiveInt, default=8, help="rows of the picture")
    add("--neighbours", type=PositiveInt, default=8, help="neighbours in a row")
    add_features_flag(parser)
    add("--images", type=PositiveInt | None, help="search only the first so many images; all when left out")
    add("--batch_size", type=PositiveInt, default=256, help="images per forward pass")
    add("--seed", type=int, default=0, help="decides which images are queries")
    add_cache_flags(parser)
    return parser.parse_args()


def export() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.export",
        description="Writes a run's encoder for use elsewhere; the last line is one JSON object.",
    )
    add = parser.add_argument
    add("--run", type=str | None, help=RUN)
    add(
        "--output",
        type=str | None,
        help="file to write, such as r50.pth, r50.safetensors, r50.pkl, r50.onnx; for timm and hf a folder; or its URL",
    )
    add(
        "--format",
        type=ExportFormat,
        default="torchvision",
        help="who takes it: torchvision (a state dict), moco (the reference code, with all that its --resume needs), "
        "timm or hf (a folder for timm, or for transformers, with a model card), detectron2 (.pkl), onnx",
    )
    add("--linear", type=Path | None, help="folder of transfer.linear: its classifier becomes `fc` (torchvision, onnx)")
    add("--check", type=on_this_machine, help="an exported file or folder: verify its weights, say where it came from")
    args = parser.parse_args()
    if args.check is None and (args.run is None or args.output is None):
        parser.error("--run and --output are needed, or --check FILE")
    if args.check is not None and (args.run is not None or args.output is not None):
        parser.error("--check reads a file that is there: it goes without --run and --output")
    return args


def report() -> Namespace:
    parser = ArgumentParser(prog="python -m transfer.report", description="One HTML page about one run or several.")
    add = parser.add_argument
    add("runs", type=str, nargs="+", help="run folders, or their URLs")
    add("--output", type=str | None, help="page to write, or its URL; RUN/report.html of the first run when left out")
    add(
        "--images",
        type=NonNegativeInt,
        default=1000,
        help="how many of a run's images are searched for neighbours; 0: no such picture",
    )
    add("--features", type=on_this_machine, nargs="+", default=[], help="folders of transfer.embed: a map of each")
    add_cache_flags(parser)
    return parser.parse_args()


def curves() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.curves", description="Draws loss, learning rate, kNN and images/s of a run."
    )
    parser.add_argument("run", type=str, help="run folder, or its URL")
    parser.add_argument("--output", type=str | None, help="PNG to write, or its URL; RUN/curves.png when left out")
    return parser.parse_args()


def on_this_machine(text: str | Path) -> Path:
    """The type of a flag for a folder that cannot be at a URL, whose Path would be a local folder named `s3:`. The
    parser calls it again with what it returned."""
    if isinstance(text, str) and is_remote(text):
        raise ArgumentTypeError(f"{text} is a URL: this command needs a local folder here")
    return Path(text)


def encoder_arguments(args: Namespace) -> dict[str, Any]:
    """The arguments of `load_encoder` that the flags of `add_encoder_flags` give. ValueError for half of a pair."""
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std belong together: give both, three numbers each, for pixels from 0 to 1")
    mean_std = None if args.mean is None else (tuple(args.mean), tuple(args.std))
    if mean_std and not all(number > 0 for number in mean_std[1]):
        raise ValueError(f"--std is {args.std}; pixels are divided by it, so it must be above 0")
    return {"untrained": args.untrained, "image_size": args.get("image_size"), "mean_std": mean_std}


def add_encoder_flags(parser: ArgumentParser, *, crops: bool = True) -> None:
    """crops: with the size of the crop, for commands that show the encoder one."""
    add = parser.add_argument
    add("--run", type=str, required=True, help=RUN)
    add("--untrained", action="store_true", help="the same encoder as it was initialised")
    if crops:
        size = "side of the crop in pixels; by default the recipe's, 224 for a MoCo file (32 with a stride-1 stem)"
        add("--image_size", type=PositiveInt | None, help=size)
    usual = "by default the recipe's, ImageNet's for a MoCo file (CIFAR-10's with a stride-1 stem)"
    numbers: dict[str, Any] = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    add("--mean", **numbers, help=f"what pixels from 0 to 1 are normalised by: their mean; {usual}")
    add("--std", **numbers, help="and their standard deviation; with --mean")


def add_training_flags(parser: ArgumentParser, *, every: int = 10, unit: str = "epochs") -> None:
    """How a training of transfer/training.py is watched; none of it changes what it comes to."""
    add = parser.add_argument
    add("--evaluate_every", type=NonNegativeInt, default=every, help=f"{unit} between evaluations; 0: only at the end")
    add("--log_every", type=PositiveInt, default=20, help="steps between log lines; each one waits for the GPU")
    add("--save_every", type=PositiveInt, default=1000, help="steps between checkpoints")
    add(
        "--hang_seconds",
        type=NonNegativeFloat,
        default=600.0,
        help="end all ranks when one makes no step for so long (or five times the slowest so far); 0: never",
    )


def add_crop_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--resize",
        type=PositiveInt | None,
        help="short side before the crop; by default 256 for 224, nothing to crop below 96",
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="images per forward pass and rank")


def add_features_flag(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        type=Literal["backbone", "head"],
        default="backbone",
        help="what is compared: the backbone's pooled output, or the head's",
    )


def add_precision_flag(parser: ArgumentParser, rest: str) -> None:
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16"], default="fp32", help=f"number format of the encoder; {rest}"
    )
