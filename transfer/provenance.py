"""Where an exported encoder came from: written into the file, or beside it as FILE.json, and read back.

A record says: program and version, format, the run's name, recipe, step, fingerprint of the data, how images are fed,
`encoder` (the hash of the backbone, the same in every format) and `weights` (the hash of the tensors in this file).
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open

from model.interchange import load_plain
from transfer.ledger import version
from transfer.load import LoadedEncoder, default_resize, weights_hash

PROGRAM = "moco-pipeline"
KEY = "provenance"  # in every format that has room for it
WEIGHTS = "model.safetensors"  # in a folder that timm or transformers opens
ENCODER = ("arch", "width", "small_stem", "dim", "mlp")  # all that a file of another program tells of its recipe
PLACES = ("data", "out", "cache_dir", "work_dir", "init", "knn_data", "knn_train")  # fields that name this machine's


def provenance(loaded: LoadedEncoder, format: str) -> dict[str, Any]:
    """The record of an export of `loaded`, without the hash of the file's tensors. No path of this machine is in it."""
    mean, std = loaded.mean_std
    recipe = asdict(loaded.recipe)
    record = {
        "program": PROGRAM,
        "version": version(),
        "format": format,
        "run": Path(loaded.name).name,
        "recipe": {name: recipe[name] for name in recipe if (name not in PLACES if loaded.is_run else name in ENCODER)},
        "step": loaded.step,
        "data": loaded.fingerprint,
        "input": {
            "image_size": loaded.image_size,
            "resize": default_resize(loaded.image_size),
            "interpolation": "bilinear",
            "mean": list(mean),
            "std": list(std),
        },
        "encoder": f"xxh3_64:{weights_hash(loaded.encoder.backbone)}",
    }
    return dict(json.loads(json.dumps(record)))  # as it comes back: tuples are lists in every format


def tensors_hash(tensors: Mapping[str, torch.Tensor | np.ndarray]) -> str:
    """A hash of names, types, shapes and contents, whatever the order."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        tensor = tensors[name]
        array = tensor.detach().cpu().contiguous().numpy() if isinstance(tensor, torch.Tensor) else tensor
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return f"xxh3_64:{digest.hexdigest()}"


def beside(path: str | Path) -> str:
    """Where the record of a format without room for it lies."""
    return f"{path}.json"


def check(place: str | Path) -> dict[str, Any]:
    """The record of an exported file or folder, after the hash of its tensors has been found to be the noted one.

    FileNotFoundError, and ValueError when it is no export of this program or is not what was written.
    """
    record, tensors = _read(Path(place))
    if record.get("program") != PROGRAM or "weights" not in record:
        raise ValueError(f"{place} does not say where it came from: it is no export of this program")
    if (found := tensors_hash(tensors)) != record["weights"]:
        raise ValueError(f"{place} holds other weights than were exported: {found}, and {record['weights']} is noted")
    return record


def is_ours(place: Path) -> bool:
    """Whether this program exported the file: it may write over it."""
    try:
        return _read(place)[0].get("program") == PROGRAM
    except (OSError, ValueError):
        return False


def _read(place: Path) -> tuple[dict[str, Any], Mapping[str, torch.Tensor | np.ndarray]]:
    """The record ({} when there is none) and the tensors. ValueError when the file is damaged or of no known format."""
    file = place / WEIGHTS if place.is_dir() else place
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if file.suffix == ".pkl":
        content = read_arrays(file)
        return _record(content.get(KEY)), content.get("model", {})
    if file.suffix == ".onnx":
        return _read_onnx(file)
    content = load_plain(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no state dict of tensors")
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return _parsed((opened.metadata() or {}).get(KEY)), content
    if isinstance(content.get("state_dict"), dict):
        return _record(content.get(KEY)), content["state_dict"]
    note = Path(beside(file))
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return _parsed(note.read_text() if note.is_file() else None), tensors


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        return _record(json.loads(text)) if text else {}
    except ValueError:
        return {}


def _record(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class _ArraysOnly(pickle.Unpickler):
    """Takes `numpy.ndarray` alone of all that a pickle can call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        raise ValueError(f"it names {module}.{name}, and nothing of it was run")


def read_arrays(file: Path) -> dict[str, Any]:
    """The content of a .pkl as `transfer.export_detectron2` writes it. ValueError for one that would run code."""
    try:
        with file.open("rb") as opened:
            content = _ArraysOnly(opened).load()
    except Exception as error:  # bytes that are no pickle can end in any error of the unpickler
        raise ValueError(f"{file} is no .pkl of this program: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file} is no .pkl of this program: it holds no model")
    return content


def _read_onnx(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record ({} without one) and the constants of the graph. ValueError when the file is no ONNX model."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError(f"{file}: reading ONNX needs a package: pip install -e '.[onnx]'") from error
    try:
        model = onnx.load(str(file))
        tensors = initializers(model)
        record = json.loads(next((each.value for each in model.metadata_props if each.key == KEY), "{}"))
    except Exception as error:  # protobuf's own kinds
        raise ValueError(f"{file} is no ONNX model, or is damaged: {error}") from None
    return record if isinstance(record, dict) else {}, tensors


def initializers(model: Any) -> dict[str, np.ndarray]:
    """The constants of an ONNX graph by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
