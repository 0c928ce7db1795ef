"""MoCo's released files (`.pth.tar`) in and out: their keys, ours, and nothing that needs code to be unpickled.

Theirs: {"epoch", "arch", "state_dict"} with `module.encoder_q.*` and `module.encoder_k.*` in torchvision's names, the
head as `fc.weight`, `fc.bias` (v1) or `fc.0.*`, `fc.2.*` (v2), `module.queue` [dim, K] and `module.queue_ptr` [1].
Ours: `Encoder`'s `backbone.*` and `head.*`.
"""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.encoders import RESNETS, Encoder, build_encoder
from model.moco import MoCo

WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning, in any order


class MoCoFile(NamedTuple):
    """What such a file holds. The states have our names; `key_encoder` and `queue` are empty and None when stripped."""

    arch: str
    width: int
    small_stem: bool
    dim: int  # of the head's output; 128 when the file has no head
    mlp: bool
    epoch: int  # epochs trained, 0 when the file does not say
    encoder: dict[str, Tensor]
    key_encoder: dict[str, Tensor]
    queue: Tensor | None
    queue_ptr: int

    @property
    def has_head(self) -> bool:
        return any(name.startswith("head.") for name in self.encoder)


def read_moco(path: str | Path) -> MoCoFile:
    """Reads a released MoCo v1 or v2 file, one of the reference code's, one of `write_moco`, or a bare ResNet's state.

    ValueError when it is none of these, or when reading it would mean running code from it.
    """
    content = _load_plain(Path(path))
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    state = {_unwrap(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    query = _below(state, "encoder_q.") or _below(state, "encoder.")
    if query:
        encoder, key_encoder = _to_ours(query), _to_ours(_below(state, "encoder_k."))
    else:  # a bare backbone: what fc it has is a classifier of something else
        bare = _below(state, "backbone.") or state
        encoder = {name: t for name, t in _to_ours(bare).items() if not name.startswith("head.")}
        key_encoder = {}
    arch = str(content.get("arch", ""))
    width, small_stem = 1, False
    if not arch.startswith("timm:"):
        arch, width, small_stem = _recognise(encoder, path)
    last = encoder.get("head.2.weight", encoder.get("head.weight"))
    pointer = state.get("queue_ptr")
    return MoCoFile(
        arch=arch,
        width=width,
        small_stem=small_stem,
        dim=128 if last is None else int(last.shape[0]),
        mlp="head.2.weight" in encoder,
        epoch=int(content.get("epoch", 0)),
        encoder=encoder,
        key_encoder=key_encoder,
        queue=state.get("queue"),
        queue_ptr=0 if pointer is None else int(pointer.flatten()[0]),
    )


def encoder_of(file: MoCoFile) -> Encoder:
    """The file's query encoder. Without `has_head` its head is as it was initialised: nothing may be computed from
    it."""
    encoder = build_encoder(file.arch, width=file.width, small_stem=file.small_stem, dim=file.dim, mlp=file.mlp)
    load_into(encoder, file.encoder)
    return encoder


def load_into(encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    """Loads and reports: a head may be missing as a whole, and BN's step counts of old files; nothing else may.

    ValueError naming keys that are missing, unknown, or of another shape.
    """
    own = encoder.state_dict()
    has_head = any(name.startswith("head.") for name in state)
    missing = [
        name
        for name in own
        if name not in state and not name.endswith("num_batches_tracked") and (has_head or not name.startswith("head."))
    ]
    unknown = [name for name in state if name not in own]
    other = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(f"the file does not fit the encoder; {what}: {', '.join(names[:4])}{more}")
    encoder.load_state_dict(dict(state), strict=False)


def continue_from(file: MoCoFile, encoder: Encoder, moco: MoCo) -> None:
    """Puts such a file into a run that goes on training: both encoders and, when it is there, the queue.

    Without a key encoder in the file (the released ones are stripped) it starts as a copy of the query encoder, as at
    the start of any run. ValueError when shapes differ, with both.
    """
    load_into(encoder, file.encoder)
    load_into(moco.encoder_k, file.key_encoder or encoder.state_dict())
    if file.queue is None:
        return
    if file.queue.shape != moco.queue.shape:
        raise ValueError(f"the file's queue is {tuple(file.queue.shape)}, the run's is {tuple(moco.queue.shape)}")
    with torch.no_grad():
        moco.queue.copy_(file.queue)
        moco.queue_ptr.fill_(file.queue_ptr)
        moco.queue_filled.fill_(moco.queue.shape[1])
        moco.enqueues.fill_(1)
        moco.queue_born.fill_(1)


def write_moco(
    path: str | Path,
    encoder: Mapping[str, Tensor],
    moco: Mapping[str, Tensor] | None = None,
    *,
    arch: str,
    epoch: int = 0,
) -> None:
    """Writes a file in the reference's layout, whole or not at all.

    encoder: state of the `Encoder`; moco: state of the `MoCo`, for files that training can continue from. A plain
    ResNet by torchvision's name loads into the reference's main_lincls with fc.weight and fc.bias missing, as it wants.
    """
    state = {f"module.encoder_q.{name}": t for name, t in _to_theirs(encoder).items()}
    if moco is not None:
        key_encoder = {name.removeprefix("encoder_k."): t for name, t in moco.items() if name.startswith("encoder_k.")}
        state |= {f"module.encoder_k.{name}": t for name, t in _to_theirs(key_encoder).items()}
        state["module.queue"] = moco["queue"]
        state["module.queue_ptr"] = moco["queue_ptr"].reshape(1)
    content = {"epoch": epoch, "arch": arch, "state_dict": {name: t.detach().cpu() for name, t in state.items()}}
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _load_plain(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class) ['`\"]?([\w.]+)", str(error))
        what = found.group(1) if found else str(error).splitlines()[0]
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values ({what}), and reading that means running "
            "code from the file; save its state_dict alone, on a machine that trusts it, and read that"
        ) from error
    except Exception as error:  # bytes that are no checkpoint can end in any error of the unpickler
        raise ValueError(f"{path} is no file of torch.save ({type(error).__name__}: {str(error)[:80]})") from error


def _unwrap(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"backbone.{name}": t
        for name, t in state.items()
    }


def _to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^head\.", "fc.", name).removeprefix("backbone."): t for name, t in state.items()}


def _recognise(encoder: Mapping[str, Tensor], path: str | Path) -> tuple[str, int, bool]:
    """(arch, width, small_stem) of a ResNet from the names and shapes of its state."""
    first = encoder.get("backbone.conv1.weight")
    if first is None or "backbone.layer1.0.conv2.weight" not in encoder:
        raise ValueError(
            f"{path} is no MoCo v1 or v2 file: no ResNet under encoder_q, backbone or at the top; "
            f"it has {', '.join(list(encoder)[:3])} ..."
        )
    layers = [
        len({name.split(".")[2] for name in encoder if name.startswith(f"backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    width = first.shape[0] // 64
    second = encoder["backbone.layer1.0.conv2.weight"]  # [out, in / groups, 3, 3]; out is in
    deep = "backbone.layer1.0.conv3.weight" in encoder
    groups = second.shape[0] // second.shape[1]
    for arch, (block, blocks, own_groups, per_group) in RESNETS.items():
        if (block.expansion == 4, blocks, own_groups) == (deep, layers, groups) and second.shape[0] == (
            per_group * own_groups * width
        ):
            return arch, width, first.shape[2] == 3
    raise ValueError(
        f"{path} holds a ResNet with stages of {layers} blocks, {groups} groups and first width {second.shape[0]}, "
        f"which is none of {', '.join(RESNETS)}"
    )
