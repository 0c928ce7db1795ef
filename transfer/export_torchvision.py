"""torchvision's names and models: the state of a backbone, the classifier of transfer.linear on it, the code of the
model that takes both."""

import io
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save as serialize

import checkpoint
from model.encoders import RESNETS, timm_options
from pipeline import files
from recipe import Recipe
from transfer.load import LoadedEncoder, weights_hash


def torchvision_state(loaded: LoadedEncoder) -> dict[str, torch.Tensor]:
    """The backbone's parameters and statistics under torchvision's names; `fc`, which it was not trained with, is
    missing: `torchvision.models.resnet50().load_state_dict(state, strict=False)`."""
    return {name: tensor.contiguous() for name, tensor in loaded.encoder.backbone.state_dict().items()}


def state_file(state: dict[str, torch.Tensor], output: str | Path, about: dict[str, str]) -> bytes:
    """A state dict: as safetensors, which holds `about`, when `output` ends so, else as torch.save writes it."""
    if str(output).endswith(".safetensors"):
        return serialize(state, metadata=about)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_state(state: dict[str, torch.Tensor], output: str | Path, loaded: LoadedEncoder) -> None:
    """Writes `state`, which was made of `loaded`, to a file or URL; see `state_file`."""
    files.write(str(output), state_file(state, output, {"source": loaded.name, "step": str(loaded.step)}))


def trained_classifier(folder: Path, loaded: LoadedEncoder) -> dict[str, torch.Tensor]:
    """`fc.weight` [C, D] and `fc.bias` [C] of the best classifier that transfer.linear trained in `folder` on this
    encoder.

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
