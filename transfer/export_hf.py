"""A folder for transformers: `AutoModel.from_pretrained(DIR)`, `AutoImageProcessor.from_pretrained(DIR)`."""

from typing import Any

from torchvision.models.resnet import Bottleneck

from model.encoders import RESNETS
from transfer.load import LoadedEncoder, default_resize
from transfer.model_card import folder_content


def hf_folder(loaded: LoadedEncoder, record: dict[str, Any], figures: dict[str, float]) -> dict[str, bytes]:
    """File name -> content, under the names of transformers' ResNet. ValueError for what that class does not have."""
    r = loaded.recipe
    if r.arch not in RESNETS:
        raise ValueError(f"transformers' ResNet holds no {r.arch}: --format timm does")
    block, depths, groups, _ = RESNETS[r.arch]
    if groups != 1:
        raise ValueError(f"transformers' ResNet has no groups, so it holds no {r.arch}: --format timm does")
    if r.small_stem:
        raise ValueError(
            f"transformers' ResNet has no 3x3 stride-1 stem (small_stem): --format torchvision holds {r.arch}"
        )
    mean, std = loaded.mean_std
    size = loaded.image_size
    state = {hf_name(name): tensor.contiguous() for name, tensor in loaded.encoder.backbone.state_dict().items()}
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "layer_type": "bottleneck" if block is Bottleneck else "basic",
        "depths": depths,
        "embedding_size": 64 * r.width,
        "hidden_sizes": [64 * 2**stage * block.expansion * r.width for stage in range(4)],
        "hidden_act": "relu",
        "num_channels": 3,
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": default_resize(size)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    usage = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("FOLDER")  # or "USER/NAME" on the hub\n'
        'net = AutoModel.from_pretrained("FOLDER").eval()\n'
        'inputs = processor(image, return_tensors="pt")\n'
        f"features = net(**inputs).pooler_output.flatten(1)  # [1, {loaded.encoder.features}]"
    )
    return folder_content(
        state,
        {"config.json": config, "preprocessor_config.json": processor},
        record,
        figures,
        library="transformers",
        usage=usage,
    )


def hf_name(name: str) -> str:
    """transformers' name of a tensor of torchvision's ResNet: `layer2.0.conv1.weight` is
    `encoder.stages.1.layers.0.layer.0.convolution.weight`."""
    parts = name.split(".")
    kinds = {"conv": "convolution", "bn": "normalization"}
    if not parts[0].startswith("layer"):  # conv1, bn1
        return f"embedder.embedder.{kinds[parts[0][:-1]]}.{parts[1]}"
    stage, block = int(parts[0][-1]) - 1, parts[1]
    if parts[2] == "downsample":
        inside = f"shortcut.{('convolution', 'normalization')[int(parts[3])]}"
    else:
        inside = f"layer.{int(parts[2][-1]) - 1}.{kinds[parts[2][:-1]]}"
    return f"encoder.stages.{stage}.layers.{block}.{inside}.{parts[-1]}"
