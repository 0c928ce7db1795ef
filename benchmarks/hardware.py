"""Where a benchmark ran: the card's name for file names, and the versions that go into every result."""

import importlib.util
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "triton", "accelerate", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "numba",
    "pillow", "webdataset", "simplejpeg", "jsonargparse", "timm",
)  # fmt: skip


def card(device: str) -> str:
    """The device for file names: "cpu", "h200", "h100_80gb_hbm3"."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(None if device == "cuda" else device)
    return re.sub(r"\W+|_+", "_", name.removeprefix("NVIDIA ")).strip("_").lower()


def processor() -> str:
    """The processor's own name: "AMD EPYC"."""
    named = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return named[1].strip() if named else platform.processor()


def is_installed(module: str) -> bool:
    """Whether it could be imported; nothing of it is but the packages around it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, card and versions of what is installed."""
    facts: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    facts["torch"] = torch.__version__  # with the CUDA version that it was built for
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 2**30, 1)}
        facts |= {"gpus": torch.cuda.device_count(), "cudnn": torch.backends.cudnn.version()}
    return facts
