"""The flags of transfer.detect and transfer.segment. Nothing heavy is imported here, as in `arguments`."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from transfer.arguments import add_encoder_flags, add_training_flags, on_this_machine


def detect() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.detect",
        description="Fine-tunes a detector on an encoder: boxes, masks or keypoints; the last line is one JSON object.",
    )
    add = parser.add_argument
    _add_start(parser, "detection")
    add("--data", type=on_this_machine, required=True, help="VOCdevkit, or a folder with COCO's annotations/*.json")
    add("--train_set", type=list[str], required=True, help="such as [2007_trainval, 2012_trainval] or a JSON's name")
    add("--val_set", type=list[str], required=True, help="such as [2007_test] or [instances_val2017]")
    add("--body", type=Literal["c4", "dilated_c5", "fpn"], default="c4", help="what is built on the encoder")
    add("--task", type=Literal["boxes", "masks", "keypoints"], default="boxes", help="what is found")
    add("--short_side", type=PositiveInt | list[PositiveInt], default=[800], help="pixels; training draws from a list")
    add("--long_side", type=PositiveInt | None, help="pixels at most; 1333 for a short side of 800 when left out")
    add("--detections", type=PositiveInt, default=100, help="at most so many are judged in an image")
    add("--least_score", type=ClosedUnitInterval, default=0.05, help="detections below it are left out")
    add("--rois", type=PositiveInt, default=512, help="boxes of an image that a step trains on; half as many anchors")
    add("--proposals", type=PositiveInt, default=1000, help="boxes of an image that the heads look at when judged")
    add("--precise_batches", type=NonNegativeInt, default=200, help="whose mean statistics judge; 0: the running ones")
    _add_training(parser, lr=0.02, warmup=1000, decay_at=[0.75, 0.917])
    return parser.parse_args()


def segment() -> Namespace:
    parser = ArgumentParser(
        prog="python -m transfer.segment",
        description="Fine-tunes an encoder as an FCN for semantic segmentation; the last line is one JSON object.",
    )
    add = parser.add_argument
    _add_start(parser, "segmentation")
    add("--data", type=on_this_machine, required=True, help="VOCdevkit, or the folder of Cityscapes")
    add("--train_set", type=list[str], required=True, help="such as [2012_train] or [train]")
    add("--val_set", type=list[str], required=True, help="such as [2012_val] or [val]")
    add("--masks", type=str, default="SegmentationClass", help="folder of the class maps in each year of a VOCdevkit")
    add("--crop", type=PositiveInt, default=513, help="side of the crops to train on, in pixels")
    add("--short_side", type=PositiveInt | None, help="shrinks images to it first, to train and to judge; as they are")
    add("--head_dilation", type=PositiveInt, default=6, help="of the two new 3x3 convolutions")
    _add_training(parser, lr=0.003, warmup=0, decay_at=[0.7, 0.9])
    return parser.parse_args()


def _add_start(parser: ArgumentParser, recipes: str) -> None:
    parser.add_argument("--config", action="config", help=f"a YAML of flags, as in recipes/{recipes}")
    add_encoder_flags(parser, crops=False)
    parser.add_argument("--out", type=str | None, help="folder of the training, or its URL; inside RUN when left out")
    parser.add_argument("--images", type=PositiveInt | None, help="only the first so many of each set, to try it out")


def _add_training(parser: ArgumentParser, *, lr: float, warmup: int, decay_at: list[float]) -> None:
    add = parser.add_argument
    add("--iterations", type=PositiveInt, default=24000, help="steps in all; warm-up apart, the schedule shrinks along")
    add("--batch_size", type=PositiveInt, default=16, help="images per step over all ranks")
    add("--lr", type=PositiveFloat, default=lr, help="learning rate of every layer")
    add("--decay_at", type=list[ClosedUnitInterval], default=decay_at, help="parts of the steps; then lr falls to 0.1")
    add("--warmup", type=NonNegativeInt, default=warmup, help="steps in which lr rises along a line")
    add("--momentum", type=NonNegativeFloat, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=NonNegativeFloat, default=0.0001, help="weight decay of SGD")
    precision = "number format of the network; fp16 takes a GPU"
    add("--precision", type=Literal["fp32", "bf16", "fp16"], default="fp32", help=precision)
    add_training_flags(parser, every=0, unit="steps")
    add("--num_threads", type=PositiveInt, default=4, help="threads a rank that load images")
    add("--seed", type=int, default=0, help="decides new weights, order, augmentation and sampled boxes")
