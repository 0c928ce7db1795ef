"""Each export format opened by its own library: how far its features are from ours, on photographs.

    python benchmarks/export_parity.py --images PHOTOS

Encoders are as they were initialised, but for batch-norm statistics taken from the photographs, so that every layer's
matter, and for a fifth of each residual branch's last scale, since training makes these small (`--branch_scale 1`: with
the full one rounding alone grows with depth, in every library). The difference is that of any feature, in parts of the
largest one; the first line of an architecture is that of torch in float32 from itself in float64. detectron2 is in no
package index: its files are looked at by `tests/transfer/test_export_formats.py`, by names and shapes.
"""

import argparse
import copy
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

import checkpoint
import recipe as recipes
from model.interchange import load_plain
from model.moco import MoCo
from pipeline import files
from pipeline.pixels.decode import picture
from transfer.export import export
from transfer.load import default_resize, load_encoder

ARCHES = (
    "resnet18",
    "resnet50",
    "resnet50 width 2",
    "resnext50_32x8d",
    "resnet18 small_stem",
    "timm:vit_tiny_patch16_224",
)
FORMATS = ("torchvision", "moco", "timm", "hf", "onnx")
LIBRARIES = {
    "torchvision": "torchvision",
    "moco": "torchvision",
    "timm": "timm",
    "hf": "transformers",
    "onnx": "onnxruntime",
}


def photographs(paths: Sequence[Path], size: int, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """fp32 [N, 3, size, size], resized and cropped as everywhere in `transfer`, normalised."""
    resize, crop = torchvision.transforms.Resize(default_resize(size)), torchvision.transforms.CenterCrop(size)
    pixels = [np.asarray(crop(resize(picture(np.frombuffer(path.read_bytes(), np.uint8))))) for path in paths]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255  # [N, 3, size, size]
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in mean_std)
    return (images - mean) / std


def make_run(folder: Path, arch: str, size: int, paths: Sequence[Path], branch_scale: float = 0.2) -> Path:
    """A run folder with an encoder whose batch norm has seen the photographs. `arch` as in `ARCHES`."""
    name, *options = arch.split()
    more = {"width": 2} if "width" in options else {"small_stem": True} if "small_stem" in options else {}
    folder.mkdir(parents=True)
    recipes.save(recipes.Recipe(arch=name, dim=16, image_size=size, **more), folder / "recipe.yaml")
    loaded = load_encoder(folder, untrained=True)
    images = photographs(paths, size, loaded.mean_std)
    with torch.no_grad():
        for module in loaded.encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the statistics become those of the photographs, without the initial ones
            if isinstance(module, BasicBlock | Bottleneck):
                (module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight.mul_(branch_scale)
        loaded.encoder.train()(images)
    moco = MoCo(loaded.encoder, dim=16, queue_size=24, temperature=0.2)
    state = {"encoder": loaded.encoder.state_dict(), "moco": moco.state_dict(), "step": 3, "epoch": 1.0}
    checkpoint.save(folder, state | {"loader": {"fingerprint": "photographs"}}, step=3, keep=1)
    return folder


def features(format: str, place: Path, arch: str, images: Tensor) -> Tensor:
    """[N, D] of the exported file or folder, opened by its library as that library's users do."""
    if format == "timm":
        import timm

        return timm.create_model(f"local-dir:{place}", pretrained=True).eval()(images)  # type: ignore[no-any-return]
    if format == "hf":
        from transformers import AutoModel

        return AutoModel.from_pretrained(place).eval()(images).pooler_output.flatten(1)  # type: ignore[no-any-return]
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    state = load_plain(place)
    if format == "moco":  # what the reference's main_lincls does with it
        start = "module.encoder_q."
        state = {name.removeprefix(start): t for name, t in state["state_dict"].items() if name.startswith(start)}
        state = {name: t for name, t in state.items() if not name.startswith("fc.")}
    net = getattr(torchvision.models, arch)()
    missing, unexpected = net.load_state_dict(state, strict=False)
    if set(missing) != {"fc.weight", "fc.bias"} or unexpected:
        raise ValueError(f"{place} does not fit {arch}: missing {missing}, unexpected {unexpected}")
    net.fc = torch.nn.Identity()
    return net.eval()(images)  # type: ignore[no-any-return]


def difference(run: Path, format: str, place: Path, images: Tensor) -> float:
    """The largest difference of a feature, in parts of the largest feature. Writes the export to `place`.

    ValueError when the format does not hold the architecture.
    """
    loaded = load_encoder(run)
    export(str(run), place, format)  # type: ignore[arg-type]
    with torch.no_grad():
        ours, theirs = loaded.encoder.backbone(images), features(format, place, loaded.recipe.arch, images)
    if ours.shape != theirs.shape:
        raise AssertionError(f"{format}: {tuple(theirs.shape)} features where ours are {tuple(ours.shape)}")
    return float((ours - theirs).abs().max() / ours.abs().max())


def rounding(backbone: torch.nn.Module, images: Tensor) -> float:
    """How far its float32 features are from those of float64, as `difference` has it."""
    with torch.no_grad():
        ours, exact = backbone(images), copy.deepcopy(backbone).double()(images.double())
    return float((ours - exact).abs().max() / exact.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--number", type=int, default=16, help="how many of them")
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--arches", nargs="+", default=list(ARCHES), help="architectures, with an option of theirs")
    parser.add_argument(
        "--branch_scale", type=float, default=0.2, help="factor on the last scale of each residual branch"
    )
    parser.add_argument("--output", type=Path, help="file for the table, beside standard output")
    args = parser.parse_args()
    kinds = {".jpg", ".jpeg", ".png"}
    paths = sorted(path for path in args.images.iterdir() if path.suffix.lower() in kinds)[: args.number]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", *sorted(set(LIBRARIES.values())))
    )
    lines = [f"{len(paths)} photographs, {args.size} pixels, fp32, CPU; {versions}"]
    lines += [f"{'architecture':28} {'format':12} {'opened by':13} largest difference / largest feature"]
    print(*lines, sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arches:
            run = make_run(
                Path(folder) / arch.replace(" ", "_").replace(":", "_") / "run",
                arch,
                args.size,
                paths,
                args.branch_scale,
            )
            loaded = load_encoder(run)
            images = photographs(paths, args.size, loaded.mean_std)
            lines.append(f"{arch:28} {'(none)':12} {'torch':13} {rounding(loaded.encoder.backbone, images):.1e}")
            print(lines[-1], flush=True)
            for format in FORMATS:
                if format in ("torchvision", "moco") and not hasattr(torchvision.models, arch):
                    continue  # in no model of torchvision by name
                place = run.parent / f"out_{format}{'.onnx' if format == 'onnx' else '.pth'}"
                try:
                    said = f"{difference(run, format, place, images):.1e}"
                except ValueError as error:
                    said = f"refused: {error}"
                lines.append(f"{arch:28} {format:12} {LIBRARIES[format]:13} {said}")
                print(lines[-1], flush=True)
    if args.output:
        files.write(str(args.output), "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    main()
