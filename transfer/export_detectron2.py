"""A .pkl for detectron2's ResNets, as the reference's converter writes it: MODEL.WEIGHTS FILE.pkl.

Its configuration has to say MODEL.RESNETS.STRIDE_IN_1X1 False and INPUT.FORMAT RGB, and the mean and std of the record
times 255: detectron2's own defaults are those of Caffe's weights.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from model.encoders import RESNETS
from transfer.load import LoadedEncoder
from transfer.provenance import KEY, tensors_hash

RENAMED: list[tuple[str, Callable[[re.Match[str]], str]]] = [  # torchvision's names -> detectron2's, in this order
    (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"\bbn(\d)\b", lambda m: f"conv{m[1]}.norm"),
    (r"\bdownsample\.0\b", lambda m: "shortcut"),
    (r"\bdownsample\.1\b", lambda m: "shortcut.norm"),
    (r"^(?!res)", lambda m: "stem."),
]


def detectron2_file(loaded: LoadedEncoder, record: dict[str, Any]) -> bytes:
    """The pickle: arrays by name below `model`, with the projection head as the converter has it (`stem.fc.*`), which
    detectron2 leaves aside. ValueError for an architecture that its ResNets do not have."""
    r = loaded.recipe
    if r.arch not in RESNETS:
        raise ValueError(f"detectron2's converter knows torchvision's ResNets alone, not {r.arch}")
    if r.small_stem or r.width != 1:
        what = "a 3x3 stride-1 stem (small_stem)" if r.small_stem else f"a stem of width {r.width}"
        raise ValueError(f"detectron2's ResNet has no {what}: --format torchvision holds {r.arch} with it")
    state = loaded.encoder.state_dict() if loaded.has_head else loaded.encoder.backbone.state_dict(prefix="backbone.")
    names = {name: re.sub(r"^head\.", "fc.", name).removeprefix("backbone.") for name in state}
    model = {detectron2_name(names[name]): tensor.numpy() for name, tensor in state.items()}
    record = record | {"weights": tensors_hash(model)}
    buffer = io.BytesIO()
    _Plain(buffer, protocol=5).dump({"model": model, "__author__": "MOCO", "matching_heuristics": True, KEY: record})
    return buffer.getvalue()


def detectron2_name(name: str) -> str:
    """`layer1.0.downsample.1.weight` is `res2.0.shortcut.norm.weight`, `conv1.weight` is `stem.conv1.weight`."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


class _Plain(pickle.Pickler):
    """Arrays by NumPy's public constructor: its own way names modules that older versions, which many installations of
    detectron2 have, do not know."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(np.ascontiguousarray(obj).tobytes()))
        return NotImplemented
