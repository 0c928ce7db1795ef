"""An ONNX graph of the backbone, or with the classifier of transfer.linear: `images` [N, 3, S, S] -> `features` [N, D]
or `logits` [N, C], for any N."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfer.load import LoadedEncoder
from transfer.provenance import KEY, initializers, tensors_hash


def onnx_file(loaded: LoadedEncoder, record: dict[str, Any], classifier: Mapping[str, Tensor]) -> bytes:
    """`classifier`: `fc.weight` [C, D] and `fc.bias` [C]; empty: the features. Batch norm is folded into the
    convolutions. ValueError when the package is missing or the model is beyond the exporter."""
    try:
        import onnx
        import onnxscript  # noqa: F401  the exporter's
    except ImportError as error:
        raise ValueError("--format onnx needs two packages: pip install -e '.[onnx]'") from error
    net: nn.Module = loaded.encoder.backbone
    if classifier:
        classes, width = classifier["fc.weight"].shape
        fc = nn.Linear(width, classes)
        fc.load_state_dict({name.removeprefix("fc."): tensor for name, tensor in classifier.items()})
        net = nn.Sequential(net, fc)
    images = torch.zeros(2, 3, loaded.image_size, loaded.image_size)  # 1 would be taken for a constant
    try:
        program = torch.onnx.export(
            net.eval(),
            (images,),
            input_names=["images"],
            output_names=["logits" if classifier else "features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # a model of any kind can be beyond it in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"torch's ONNX exporter cannot hold {loaded.recipe.arch}: {reason[:300]}") from error
    assert program is not None
    model = program.model_proto
    record = record | {"weights": tensors_hash(initializers(model))}
    onnx.helper.set_model_props(model, {KEY: json.dumps(record)})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
