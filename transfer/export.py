"""The encoder of a run for use elsewhere: torchvision's names, or a file of the reference MoCo code's layout."""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.export()  # before the imports that take seconds

import functools
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from jsonargparse import Namespace
from safetensors.torch import save as serialize

import checkpoint
from model.encoders import RESNETS, timm_options
from model.interchange import over_both_encoders, read_moco, reference_checkpoint
from pipeline import files
from pipeline.command import command
from recipe import Recipe
from trainer.mirror import bring
from transfer.load import LoadedEncoder, load_encoder, weights_hash


def torchvision_state(loaded: LoadedEncoder) -> dict[str, torch.Tensor]:
    """The backbone's parameters and statistics under torchvision's names; `fc`, which it was not trained with, is
    missing: `torchvision.models.resnet50().load_state_dict(state, strict=False)`."""
    return {name: tensor.contiguous() for name, tensor in loaded.encoder.backbone.state_dict().items()}


def classifier_state(folder: Path, loaded: LoadedEncoder) -> dict[str, torch.Tensor]:
    """`fc.weight` and `fc.bias` of the best classifier that transfer.linear trained in `folder` on this encoder.

    Raises FileNotFoundError when there is none, ValueError when it belongs to other weights.
    """
    saved = checkpoint.load_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"no classifier in {folder}: give the folder that transfer.linear wrote (--out)")
    if saved["settings"]["encoder"] != weights_hash(loaded.encoder.backbone):
        raise ValueError(f"the classifier in {folder} was trained on other weights than those of {loaded.name}")
    newest = saved["rows"][-len(saved["settings"]["lr"]) :]
    best = max(range(len(newest)), key=lambda i: newest[i]["top1"])
    return {f"fc.{name}": saved["heads"][f"layers.{best}.{name}"] for name in ("weight", "bias")}


def write_state(state: dict[str, torch.Tensor], output: str | Path, loaded: LoadedEncoder) -> None:
    """A state dict: as safetensors, which says what it is of, when `output` ends so, else by torch.save."""
    with files.writing(str(output)) as written:
        if str(output).endswith(".safetensors"):
            written.write(serialize(state, metadata={"source": loaded.name, "step": str(loaded.step)}))
        else:
            torch.save(state, written)


def building_code(r: Recipe) -> str:
    """Python that makes `net`, the model which the torchvision format of such an encoder fits: a small stem or other
    widths are in no model of torchvision by name."""
    if r.arch.startswith("timm:"):
        name = r.arch.removeprefix("timm:")
        more = "".join(f", {option}={value}" for option, value in timm_options(name, r.image_size).items())
        return f"import timm; net = timm.create_model({name!r}, num_classes=0{more})"
    if r.width > 1:  # of all layers, unlike torchvision's wide_resnet
        stem = ", small_stem=True" if r.small_stem else ""
        return (
            f"from model.encoders import build_encoder; net = build_encoder({r.arch!r}, width={r.width}{stem}).backbone"
        )
    code = f"import torchvision; net = torchvision.models.{r.arch}()"
    if not hasattr(torchvision.models, r.arch):
        block, layers, groups, width = RESNETS[r.arch]
        code = (
            f"from torchvision.models.resnet import {block.__name__}, ResNet; net = ResNet({block.__name__}, {layers}, "
            f"groups={groups}, width_per_group={width})"
        )
    if r.small_stem:
        code += "; import torch; net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"
        code += "; net.maxpool = torch.nn.Identity()"
    return code


def what_it_fits(r: Recipe, format: Literal["torchvision", "moco"]) -> str:
    """For people: which model takes the file."""
    if format == "torchvision":
        return f"it fits the model of `{building_code(r)}`; net.load_state_dict(state, strict=False)"
    if hasattr(torchvision.models, r.arch) and r.width == 1 and not r.small_stem:
        return f"it fits the reference code with -a {r.arch}, and --run and --init here"
    return f"it fits --run and --init here; the reference code has no such encoder: {building_code(r)}"


def export(
    run: str, output: str | Path, format: Literal["torchvision", "moco"], linear: Path | None = None
) -> str | Path:
    """Writes the query encoder of `run` (a run folder, a checkpoint in it, or a MoCo .pth.tar) to `output`.

    torchvision: a state dict, as safetensors when `output` ends so, else by torch.save; `linear`, a folder of
    transfer.linear, adds its classifier as `fc`. moco: with key encoder, queue, optimiser and epoch, so that the
    reference's own scripts evaluate it and either code trains it further. Says on standard error which model takes it.
    """
    if linear is not None and format != "torchvision":
        raise ValueError("a classifier goes into the torchvision format alone")
    place = files.local_path(str(output))
    read = [path for path in (Path(run), *Path(run).glob("checkpoints/*")) if path.exists()]
    if (place.exists() and any(map(place.samefile, read))) or str(output).startswith(files.join(run, "checkpoints/")):
        raise ValueError(f"--output {output} is what the encoder is read from: name another file")
    loaded = load_encoder(run, feeds_images=False)
    print(f"note: {output}: {what_it_fits(loaded.recipe, format)}", file=sys.stderr)
    files.make_folder_of(str(output))
    if format == "torchvision":
        state = torchvision_state(loaded)
        if linear is not None:
            state |= classifier_state(linear, loaded)
        write_state(state, output, loaded)
        return output
    content = _moco_content(run, loaded)
    with files.writing(str(output)) as written:
        torch.save(content, written)
    return output


def _moco_content(run: str, loaded: LoadedEncoder) -> dict[str, Any]:
    """Whole: what the run or the file holds of key encoder, queue, optimiser and epoch goes along."""
    if not loaded.is_run:
        file = read_moco(loaded.name)
        parts = {f"encoder_k.{name}": t for name, t in file.key_encoder.items()}
        if file.queue is not None:
            parts |= {"queue": file.queue, "queue_ptr": torch.tensor(file.queue_ptr)}
        about: dict[str, Any] = {"arch": file.arch, "epoch": file.epoch}
        about["key_encoder_updated"] = file.key_encoder_updated
        return reference_checkpoint(file.encoder, parts, optimizer=file.optimizer, **about)
    path = Path(bring(run))
    saved = checkpoint.load(path) if path.is_file() else checkpoint.load_newest(path)
    assert saved is not None  # load_encoder has read it
    epoch, mechanism = float(saved["epoch"]), loaded.recipe.mechanism
    if epoch != int(epoch):
        where = f"the run is at epoch {epoch:.2f}, and such files know whole epochs"
        print(f"note: {where}: training goes on from {int(epoch)}", file=sys.stderr)
    if mechanism != "moco":
        print(f"note: mechanism {mechanism} has no key encoder and no queue to go on with", file=sys.stderr)
    optimizer = over_both_encoders(saved["optimizer"]) if "optimizer" in saved else None
    moco = saved["moco"] if mechanism == "moco" else None
    return reference_checkpoint(saved["encoder"], moco, arch=loaded.recipe.arch, epoch=int(epoch), optimizer=optimizer)


def main(args: Namespace) -> None:
    print(export(args.run, args.output, args.format, args.linear))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
