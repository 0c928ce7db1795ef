"""The encoder of a run for use elsewhere: a file or folder that another library opens by itself.

    python -m transfer.export --run runs/photos --format timm --output r50_timm
    python -m transfer.export --check r50_timm

Every export says where it came from (`transfer.provenance`).
"""

from transfer import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.export()  # before the imports that take seconds

import functools
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from jsonargparse import Namespace

from pipeline import files
from pipeline.command import command
from trainer.mirror import bring
from transfer import provenance
from transfer.arguments import FOLDERS, ExportFormat
from transfer.export_detectron2 import detectron2_file
from transfer.export_hf import hf_folder
from transfer.export_moco import moco_content
from transfer.export_onnx import onnx_file
from transfer.export_timm import timm_folder
from transfer.export_torchvision import building_code, state_file, torchvision_state, trained_classifier
from transfer.load import LoadedEncoder, load_encoder
from transfer.model_card import known_figures

SUFFIXES = {"detectron2": ".pkl", "onnx": ".onnx"}  # by which their libraries know such files, and so does --check


def export(run: str, output: str | Path, format: ExportFormat, linear: Path | None = None) -> str | Path:
    """Writes the query encoder of `run` (a run folder, a checkpoint in it, or a MoCo .pth.tar) to `output`.

    torchvision: a state dict, as safetensors when `output` ends so, else by torch.save. moco: with key encoder, queue,
    optimiser and epoch. timm, hf: a folder with weights, configuration and model card. detectron2: a .pkl. onnx: a
    graph for any number of images. `linear`, a folder of transfer.linear, adds its classifier to torchvision and onnx.
    Says on standard error which model takes it. ValueError for an architecture that the format does not hold, and where
    something lies at `output` that this program did not write.
    """
    given, output = output, str(output)
    if linear is not None and format not in ("torchvision", "onnx"):
        raise ValueError("a classifier goes into --format torchvision or onnx alone")
    if not output.endswith(suffix := SUFFIXES.get(format, "")):
        raise ValueError(f"--output {output}: a file for {format} is known by its ending, {suffix}")
    _refuse_to_overwrite(run, output, format)
    loaded = load_encoder(run, feeds_images=False)
    record = provenance.provenance(loaded, format)
    classifier = {} if linear is None else trained_classifier(linear, loaded)
    if format in FOLDERS:
        figures = known_figures(loaded, Path(bring(run))) if loaded.is_run else {}
        content = (timm_folder if format == "timm" else hf_folder)(loaded, record, figures)
        _write_folder(output, content)
    else:
        for place, data in _file(run, output, format, loaded, record, classifier).items():
            files.make_folder_of(place)
            files.write(place, data)
    print(f"note: {output}: {what_it_fits(loaded, format, output)}", file=sys.stderr)
    return given


def what_it_fits(loaded: LoadedEncoder, format: ExportFormat, output: str) -> str:
    """For people: what takes the file."""
    r = loaded.recipe
    if format == "torchvision":
        return f"it fits the model of `{building_code(r)}`; net.load_state_dict(state, strict=False)"
    if format == "timm":
        return f'timm.create_model("local-dir:{output}", pretrained=True)'
    if format == "hf":
        return f'transformers.AutoModel.from_pretrained("{output}")'
    if format == "detectron2":
        mean, std = ([round(255 * number, 3) for number in numbers] for numbers in loaded.mean_std)
        return (
            "MODEL.WEIGHTS of detectron2, with MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT RGB, "
            f"MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}"
        )
    if format == "onnx":
        return f"its input is `images` [N, 3, {loaded.image_size}, {loaded.image_size}], normalised as training was"
    if hasattr(torchvision.models, r.arch) and r.width == 1 and not r.small_stem:
        return f"it fits the reference code with -a {r.arch}, and --run and --init here"
    return f"it fits --run and --init here; the reference code has no such encoder: {building_code(r)}"


def _file(
    run: str,
    output: str,
    format: ExportFormat,
    loaded: LoadedEncoder,
    record: dict[str, Any],
    classifier: Mapping[str, torch.Tensor],
) -> dict[str, bytes]:
    """Place -> content: the file, and before it the record where the format has no room for that."""
    if format == "detectron2":
        return {output: detectron2_file(loaded, record)}
    if format == "onnx":
        return {output: onnx_file(loaded, record, classifier)}
    if format == "moco":
        content = moco_content(run, loaded)
        content[provenance.KEY] = record | {"weights": provenance.tensors_hash(content["state_dict"])}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return {output: buffer.getvalue()}
    state = torchvision_state(loaded) | dict(classifier)
    record = record | {"weights": provenance.tensors_hash(state)}
    about = {"source": loaded.name, "step": str(loaded.step), provenance.KEY: json.dumps(record)}
    note = {} if output.endswith(".safetensors") else {provenance.beside(output): json.dumps(record, indent=1).encode()}
    return note | {output: state_file(state, output, about)}


def _write_folder(output: str, content: Mapping[str, bytes]) -> None:
    """Locally the folder appears whole; at a URL its configuration, without which no library opens it, comes last."""
    if files.is_remote(output):
        for name in sorted(content, key=lambda name: name == "config.json"):
            files.write(files.join(output, name), content[name])
        return
    place = files.local_path(output)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name[:200]}.", dir=place.parent))
    try:
        for name, data in content.items():
            files.write(str(beside / name), data)
        beside.chmod(0o755)  # mkdtemp makes it the user's alone
        files.rename(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _refuse_to_overwrite(run: str, output: str, format: ExportFormat) -> None:
    """ValueError where something lies at `output`: a file that is read, a folder with content, or what this program did
    not export."""
    place = files.local_path(output)
    read = [path for path in (Path(run), *Path(run).glob("checkpoints/*")) if path.exists()]
    if (place.exists() and any(map(place.samefile, read))) or output.startswith(files.join(run, "checkpoints/")):
        raise ValueError(f"--output {output} is what the encoder is read from: name another file")
    if format in FOLDERS:
        if (place.exists() and not place.is_dir()) or files.names(output):
            raise ValueError(f"--output {output} is there and is no empty folder: name another, or remove it")
        return
    if files.is_remote(output):
        return
    for there in (place, Path(provenance.beside(place))) if format == "torchvision" else (place,):
        if there.is_dir():
            raise ValueError(f"--output {output}: {there} is a folder; --format {format} writes a file")
        if there.exists() and not provenance.is_ours(place):
            raise ValueError(f"--output {output}: {there} is there and is no export of this program: name another file")


def main(args: Namespace) -> None:
    if args.check is not None:
        print(json.dumps(provenance.check(args.check)))
        return
    output = export(args.run, args.output, args.format, args.linear)
    print(json.dumps({"output": str(output), "format": args.format}))


if __name__ == "__main__":
    command(functools.partial(main, ARGUMENTS))
