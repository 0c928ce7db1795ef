"""The encoder of a run for use elsewhere: torchvision's names, or a file of the reference MoCo code's layout."""

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save as serialize

import checkpoint
from model.interchange import read_moco, write_moco
from pipeline.command import command
from pipeline.files import writing_beside
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


def export(run: str, output: Path, format: Literal["torchvision", "moco"], linear: Path | None = None) -> Path:
    """Writes the query encoder of `run` (a run folder, a checkpoint in it, or a MoCo .pth.tar) to `output`.

    torchvision: a state dict, as safetensors when `output` ends so, else by torch.save; `linear`, a folder of
    transfer.linear, adds its classifier as `fc`. moco: with the key encoder and
    the queue of a MoCo run, so that the reference's own scripts evaluate it and either code can train it further.
    """
    if linear is not None and format != "torchvision":
        raise ValueError("a classifier goes into the torchvision format alone")
    loaded = load_encoder(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    if format == "torchvision":
        state = torchvision_state(loaded)
        if linear is not None:
            state |= classifier_state(linear, loaded)
        with writing_beside(output) as written:
            if output.suffix == ".safetensors":
                written.write(serialize(state, metadata={"source": loaded.name, "step": str(loaded.step)}))
            else:
                torch.save(state, written)
        return output
    if loaded.recipe is None:
        file = read_moco(run)
        write_moco(output, file.encoder, arch=file.arch, epoch=file.epoch)
        return output
    path = Path(run)
    saved = checkpoint.load(path) if path.is_file() else checkpoint.load_newest(path)
    assert saved is not None  # load_encoder has read it
    dictionary = saved["moco"] if loaded.recipe.mechanism == "moco" else None
    write_moco(output, saved["encoder"], dictionary, arch=loaded.recipe.arch, epoch=int(saved["epoch"]))
    return output


def main() -> None:
    parser = ArgumentParser(prog="python -m transfer.export", description="Writes a run's encoder for use elsewhere.")
    parser.add_argument("--run", type=str, required=True, help="run folder, a checkpoint in it, or a MoCo .pth.tar")
    parser.add_argument("--output", type=Path, required=True, help="the file, such as r50.pth or r50.safetensors")
    parser.add_argument("--format", type=Literal["torchvision", "moco"], default="torchvision", help="whose layout")
    parser.add_argument("--linear", type=Path | None, help="folder of transfer.linear: its classifier becomes `fc`")
    args = parser.parse_args()
    print(export(args.run, args.output, args.format, args.linear))


if __name__ == "__main__":
    command(main)
