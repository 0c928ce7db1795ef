"""A folder that timm opens by itself: `timm.create_model("local-dir:DIR", pretrained=True)`."""

import math
from typing import Any

from model.encoders import RESNETS, timm_options
from transfer.load import LoadedEncoder, default_resize
from transfer.model_card import folder_content

KEPT = ("first_conv", "classifier", "pool_size", "fixed_input_size")  # of timm's own configuration of an architecture


def timm_folder(loaded: LoadedEncoder, record: dict[str, Any], figures: dict[str, float]) -> dict[str, bytes]:
    """File name -> content. `resolve_data_config` of the opened model gives the size, mean, std, crop and interpolation
    that the encoder was judged with here. ValueError for an architecture that timm cannot be told to build."""
    import timm

    r = loaded.recipe
    arguments: dict[str, Any] = {}
    if r.arch.startswith("timm:"):
        name = r.arch.removeprefix("timm:")
        arguments = timm_options(name, r.image_size)
    else:
        if r.small_stem or r.width != 1:
            what = "a 3x3 stride-1 stem (small_stem)" if r.small_stem else f"width {r.width}"
            raise ValueError(f"timm has no {r.arch} with {what}: --format torchvision holds it")
        _, _, groups, width = RESNETS[r.arch]
        name = r.arch if timm.is_model(r.arch) else r.arch.partition("_")[0].replace("resnext", "resnet")
        if name != r.arch:
            arguments = {"cardinality": groups, "base_width": width}
    size, (mean, std) = loaded.image_size, loaded.mean_std
    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own_config = own.to_dict() if own is not None else {}
    data = {"input_size": [3, size, size], "mean": list(mean), "std": list(std)}
    data |= {"crop_pct": crop_share(size), "crop_mode": "center", "interpolation": "bilinear"}
    features = loaded.encoder.features
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "moco",
            "num_classes": 0,
            **data,
            **{key: own_config[key] for key in KEPT if own_config.get(key) is not None},
        },
    }
    state = {key: tensor.contiguous() for key, tensor in loaded.encoder.backbone.state_dict().items()}
    usage = (
        "import timm\n\n"
        'net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:USER/NAME"\n'
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))\n"
        f"features = net(transform(image).unsqueeze(0))  # [1, {features}]"
    )
    return folder_content(
        state,
        {"config.json": config},
        record,
        figures,
        library="timm",
        usage=usage,
    )


def crop_share(size: int) -> float:
    """The share of the short side that is cropped, such that timm, which divides and rounds down, resizes to ours."""
    resize = default_resize(size)
    share = size / resize
    while math.floor(size / share) < resize:
        share = math.nextafter(share, 0)
    return share
