"""MoCo's released files (`.pth.tar`) in and out: their keys, ours, and nothing that needs code to be unpickled.

Theirs: {"epoch", "arch", "state_dict", "optimizer"} with `module.encoder_q.*` and `module.encoder_k.*` in torchvision's
names, the head as `fc.weight`, `fc.bias` (v1) or `fc.0.*`, `fc.2.*` (v2), `module.queue` [dim, K] and
`module.queue_ptr` [1].
Ours: `Encoder`'s `backbone.*` and `head.*`.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from model.encoders import RESNETS, Encoder, build_encoder
from model.moco import MoCo

WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning, in any order
# The CIFAR-10 demo takes torchvision's ResNet apart into `net`, a sequence without max-pooling.
DEMO = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4", "9": "fc"}
HEADS = ({"weight", "bias"}, {"0.weight", "0.bias", "2.weight", "2.bias"})  # below `head.`, of v1 and v2
VIT = ("cls_token", "class_token", "patch_embed", "patch_embeddings", "pos_embed", "conv_proj")
RUN = {"encoder", "moco", "loader"}  # keys of a checkpoint of train.py
USE_ITS_OWN_CODE = "foreign files are read as ResNets alone, so judge it with the code that wrote it"


class MoCoFile(NamedTuple):
    """The content of such a file, under our names; `key_encoder` and `queue` are empty and None when stripped."""

    path: str
    arch: str
    width: int
    small_stem: bool
    dim: int  # of the head's output; 128 when the file has no head
    mlp: bool
    epoch: int  # epochs trained, 0 when the file does not say
    encoder: dict[str, Tensor]
    key_encoder: dict[str, Tensor]
    queue: Tensor | None  # [dim, K]
    queue_ptr: int
    optimizer: Mapping[str, Any] | None  # the state dict of its SGD
    key_encoder_updated: bool  # False: it lags the query encoder's last step, as the reference's
    names: dict[str, str]  # our name of a tensor in `encoder` -> its name in the file

    @property
    def has_head(self) -> bool:
        return any(name.startswith("head.") for name in self.encoder)


def read_moco(path: str | Path) -> MoCoFile:
    """Reads a released MoCo v1 or v2 file, one of the reference code's or of its CIFAR-10 demo, one of
    `reference_checkpoint`, or a bare ResNet's state. Errors are those of `load_plain` and `parse_moco`.
    """
    return parse_moco(load_plain(path), path)


def load_plain(path: str | Path) -> Any:
    """The content of a file of torch.save or safetensors: tensors and plain values; no code of it is run.

    FileNotFoundError, and ValueError when it is neither, is damaged, or holds more than that.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        beginning = file.read(9)
    try:
        if beginning[8:] == b"{" and beginning[:1] != b"\x80":  # a length and a JSON object
            return safetensors.torch.load_file(path)
        if beginning[:2] == b"PK":
            with zipfile.ZipFile(path) as records:
                if sum(record.file_size for record in records.infolist()) > 2 * path.stat().st_size:
                    raise ValueError(f"{path} is refused: its records are compressed, which torch.save never does")
                if (broken := records.testzip()) is not None:
                    raise ValueError(f"{path} is damaged: the checksum of {broken} differs")
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values too, and common in such files
            return torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # bytes that are no checkpoint can end in any error of the unpickler
        # torch's own words advise to load the file unsafely: they are not handed on.
        found = re.search(r"(?:GLOBAL|global|class) ['`\"]?([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found is not None:
            raise ValueError(
                f"{path} is refused: it holds more than tensors and plain values ({found.group(1)}), so it is no file "
                "of this program, and nothing of it was run; ask for a file that holds its state_dict alone"
            ) from None
        raise ValueError(
            f"{path} is no file of torch.save or safetensors, or is damaged ({type(error).__name__})"
        ) from None


def parse_moco(content: Any, path: str | Path) -> MoCoFile:
    """`content`, which `load_plain` read from `path`, in our names. ValueError that says what else the file is."""
    content = content if isinstance(content, Mapping) else {}
    tensors = content.get("state_dict", content)
    tensors = tensors if isinstance(tensors, Mapping) else {}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():  # a few bytes with a stride of 0 would ask for an encoder of terabytes
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{path} is refused: {name} claims {list(tensor.shape)} numbers, and the file holds fewer")
    if other := _what_else(content, tensors):
        raise ValueError(f"{path} {other}")
    if not tensors:
        raise ValueError(f"{path} holds no state dict of tensors")
    names = _our_names(tensors, "encoder_q.") or _our_names(tensors, "encoder.")
    key_names = _our_names(tensors, "encoder_k.") if names else {}
    if not names:  # a bare backbone: what fc it has is a classifier of something else
        bare = _our_names(tensors, "backbone.") or _our_names(tensors, "")
        names = {ours: name for ours, name in bare.items() if not ours.startswith("head.")}
    elif {ours.removeprefix("head.") for ours in names if ours.startswith("head.")} not in HEADS:  # another method's
        names = {ours: name for ours, name in names.items() if not ours.startswith("head.")}
    encoder = {ours: tensors[name] for ours, name in names.items()}
    arch = str(content.get("arch", ""))
    width, small_stem = 1, False
    if not arch.startswith("timm:"):
        arch, width, small_stem = _recognise(encoder, path, list(tensors))
    last = encoder.get("head.2.weight", encoder.get("head.weight"))
    if last is not None and last.ndim != 2:
        raise ValueError(f"{path} has a head of shape {list(last.shape)}, not [dim, features]")
    epoch = content.get("epoch", 0)
    rest = {_unwrap(name): tensor for name, tensor in tensors.items() if "queue" in name}
    optimizer = content.get("optimizer")
    queue, pointer = rest.get("queue"), rest.get("queue_ptr", torch.zeros(1, dtype=torch.int64))
    if queue is not None and not (
        queue.ndim == 2
        and queue.is_floating_point()
        and pointer.numel() == 1
        and pointer.dtype == torch.int64
        and 0 <= pointer.item() < queue.shape[1]
    ):
        raise ValueError(f"the queue of {path} is {list(queue.shape)} with pointer {pointer.tolist()}, not [dim, K]")
    return MoCoFile(
        path=str(path),
        arch=arch,
        width=width,
        small_stem=small_stem,
        dim=128 if last is None else int(last.shape[0]),
        mlp="head.2.weight" in encoder,
        epoch=epoch if isinstance(epoch, int) else 0,
        encoder=encoder,
        key_encoder={ours: tensors[name] for ours, name in key_names.items()},
        queue=queue,
        queue_ptr=0 if queue is None else int(pointer.item()),
        optimizer=optimizer if isinstance(optimizer, Mapping) and optimizer.get("param_groups") else None,
        key_encoder_updated=content.get("key_encoder_updated") is True,
        names=names,
    )


def encoder_of(file: MoCoFile, image_size: int | None = None) -> Encoder:
    """The file's query encoder, for images of that size as `build_encoder` has it. Without `has_head` its head is as it
    was initialised: nothing may be computed from it."""
    about: dict[str, Any] = {"width": file.width, "small_stem": file.small_stem, "dim": file.dim, "mlp": file.mlp}
    encoder = build_encoder(file.arch, **about, image_size=image_size)
    load_query(encoder, file)
    return encoder


def load_query(encoder: Encoder, file: MoCoFile) -> None:
    """The file's query encoder into `encoder`; ValueError that names the tensors that do not fit as the file does."""
    load_into(encoder, file.encoder, where=file.path, spelled=lambda name: file.names.get(name) or _theirs(name))


def load_into(
    encoder: Encoder, state: Mapping[str, Tensor], *, where: str = "the state", spelled: Callable[[str], str] = str
) -> None:
    """Loads and reports: a head may be missing as a whole, and BN's step counts of old files; nothing else may.

    ValueError naming keys that are missing, unknown, or of another shape, as `spelled` says of our names.
    """
    own = encoder.state_dict()
    has_head = any(name.startswith("head.") for name in state)
    missing = [
        spelled(name)
        for name in own
        if name not in state and not name.endswith("num_batches_tracked") and (has_head or not name.startswith("head."))
    ]
    unknown = [spelled(name) for name in state if name not in own]
    other = [
        f"{spelled(name)} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(f"{where} does not fit the encoder; {what}: {', '.join(names[:4])}{more}")
    encoder.load_state_dict(dict(state), strict=False)


def continue_from(file: MoCoFile, encoder: Encoder, moco: MoCo, *, m: float) -> None:
    """Puts such a file into a run that goes on training: both encoders and, when it is there, the queue.

    Without a key encoder in the file (the released ones are stripped) it starts as a copy of the query encoder, as at
    the start of any run. The reference's key encoder lags one momentum update, which it makes at the beginning of its
    next forward pass; ours has made it by then, so it is made here, with momentum `m`. ValueError when shapes differ,
    with both.
    """
    load_query(encoder, file)
    load_into(moco.encoder_k, file.key_encoder or encoder.state_dict(), where=f"the key encoder of {file.path}")
    if file.key_encoder and not file.key_encoder_updated:
        moco.momentum_update(encoder, m)
    if file.queue is None:
        return
    if file.queue.shape != moco.queue.shape:
        theirs, ours = tuple(file.queue.shape), tuple(moco.queue.shape)
        raise ValueError(f"the queue of {file.path} is {theirs}, the run's (dim, queue_size) is {ours}")
    with torch.no_grad():
        moco.queue.copy_(file.queue)
        moco.queue_ptr.fill_(file.queue_ptr)
        moco.queue_filled.fill_(moco.queue.shape[1])
        moco.enqueues.fill_(1)
        moco.queue_born.fill_(1)


def momentum_state(file: MoCoFile, encoder: Encoder) -> dict[int, dict[str, Tensor]]:
    """The `state` of torch's SGD over `encoder.parameters()`, from the file's optimiser; empty when it has none.

    Its parameters stand in the same order: the backbone's, then the head's; those of the key encoder, which follow,
    have no state. ValueError when it is no SGD of this encoder.
    """
    if file.optimizer is None:
        return {}
    state, parameters = file.optimizer.get("state"), list(encoder.parameters())
    buffers = [state[i].get("momentum_buffer") for i in sorted(state)] if isinstance(state, Mapping) else []
    is_sgd = "nesterov" in file.optimizer["param_groups"][0]
    if is_sgd and all(buffer is None for buffer in buffers):  # without momentum
        return {}
    shapes = [buffer.shape if isinstance(buffer, Tensor) else None for buffer in buffers]
    if shapes != [parameter.shape for parameter in parameters]:
        raise ValueError(
            f"the optimiser of {file.path} has {len(shapes)} momentum buffers that are not those of SGD over the "
            f"{len(parameters)} parameters of the encoder; --init_with weights leaves it out"
        )
    return {i: {"momentum_buffer": buffer} for i, buffer in enumerate(buffers)}


def reference_checkpoint(
    encoder: Mapping[str, Tensor],
    moco: Mapping[str, Tensor] | None = None,
    *,
    arch: str,
    epoch: int = 0,
    optimizer: Mapping[str, Any] | None = None,
    key_encoder_updated: bool = True,
) -> dict[str, Any]:
    """The object that torch.save is to write for a file in the reference's layout.

    encoder: state of the `Encoder`; moco: state of the `MoCo`, or what there is of it; optimizer: state dict of SGD,
    see `over_both_encoders`. A plain ResNet by torchvision's name loads into the reference's main_lincls with fc.weight
    and fc.bias missing, as it wants; with all three its main_moco goes on training (--resume). The reference makes one
    more momentum update before its first keys: its own key encoder lags one, ours (`key_encoder_updated`) does not.
    """
    moco = moco or {}
    key_encoder = {name.removeprefix("encoder_k."): t for name, t in moco.items() if name.startswith("encoder_k.")}
    state = {f"module.encoder_q.{_theirs(name)}": t for name, t in encoder.items()}
    state |= {f"module.encoder_k.{_theirs(name)}": t for name, t in key_encoder.items()}
    if "queue" in moco:
        state |= {"module.queue": moco["queue"], "module.queue_ptr": moco["queue_ptr"].reshape(1)}
    content: dict[str, Any] = {"epoch": epoch, "arch": arch}
    content["state_dict"] = {name: t.detach().cpu() for name, t in state.items()}
    if key_encoder:
        content["key_encoder_updated"] = key_encoder_updated  # a key of our own, for the way back
    if optimizer is not None:
        content["optimizer"] = dict(optimizer)
    return content


def over_both_encoders(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of torch's SGD over the query encoder as the reference's optimiser has it: it counts the key
    encoder's parameters too, behind the others and without state."""
    (group,) = optimizer["param_groups"]
    return {**optimizer, "param_groups": [{**group, "params": list(range(2 * len(group["params"])))}]}


def _what_else(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """For people: which kind of file of another program this is, and what to do with it. "" for none that is known."""
    if content.keys() >= RUN:
        return (
            "is a checkpoint of a run of this program: `python -m transfer.export --format moco --run` turns it into a "
            "MoCo file"
        )
    if content.keys() >= {"heads", "settings"}:
        return "is a classifier of transfer.linear: give the run that it was trained on"
    if content.keys() >= {"student", "teacher"}:
        kind = "is a full DINO checkpoint (student and teacher)"
        if _is_vit(content["teacher"]):
            return f"{kind} of a vision transformer: {USE_ITS_OWN_CODE}"
        return f"{kind}: save what it holds as 'teacher' alone, with torch.save, and give that file"
    names = {_unwrap(name): name for name in tensors}
    v3 = next((names[name] for name in names if name.startswith("base_encoder.")), "")
    if v3:
        kind = "is a MoCo v3 file (base_encoder and momentum_encoder, no queue)"
        if _is_vit(tensors):
            return f"{kind} of a vision transformer: {USE_ITS_OWN_CODE}"
        prefix = v3[: v3.index("base_encoder.") + len("base_encoder.")]
        return (
            f"{kind}, and MoCo v1 and v2 are read here: save the tensors whose names begin with {prefix} under the "
            "rest of these names, with torch.save, and give that file"
        )
    if _is_vit(tensors) and not str(content.get("arch", "")).startswith("timm:"):
        return (
            f"is no MoCo v1 or v2 file but a vision transformer: {USE_ITS_OWN_CODE}; one that was trained here "
            "(--arch timm:vit_...) is judged from its run folder"
        )
    return ""


def _is_vit(state: object) -> bool:
    return isinstance(state, Mapping) and any(part in str(name).split(".") for name in state for part in VIT)


def _our_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Our name -> name in the file, of the tensors below `prefix`."""
    below = {_unwrap(name): name for name in tensors}
    below = {name.removeprefix(prefix): full for name, full in below.items() if name.startswith(prefix)}
    if below and all(name.startswith("net.") for name in below):
        parts = {name: name.split(".", 2) for name in below}
        below = {".".join((DEMO.get(p[1], p[1]), *p[2:])): below[name] for name, p in parts.items()}
    return {_ours(name): full for name, full in below.items()}


def _unwrap(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _ours(name: str) -> str:
    return f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"backbone.{name}"


def _theirs(name: str) -> str:
    return re.sub(r"^head\.", "fc.", name).removeprefix("backbone.")


def _recognise(encoder: Mapping[str, Tensor], path: str | Path, names: list[str]) -> tuple[str, int, bool]:
    """(arch, width, small_stem) of a ResNet from our names and the shapes of its state."""
    first = encoder.get("backbone.conv1.weight")
    second = encoder.get("backbone.layer1.0.conv2.weight")  # [out, in / groups, 3, 3]; out is in
    if first is None or second is None or first.ndim != 4 or second.ndim != 4 or not second.shape[1]:
        raise ValueError(
            f"{path} is no MoCo v1 or v2 file: it has no ResNet's conv1.weight and layer1.0.conv2.weight below "
            f"encoder_q, encoder or backbone, nor at the top; it has {', '.join(names[:3])} ..."
        )
    layers = [
        len({name.split(".")[2] for name in encoder if name.startswith(f"backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    width = first.shape[0] // 64
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
