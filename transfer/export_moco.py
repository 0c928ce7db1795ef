"""A file of the reference MoCo code's layout: its scripts evaluate it, and either code trains it further."""

import sys
from pathlib import Path
from typing import Any

import torch

import checkpoint
from model.interchange import over_both_encoders, read_moco, reference_checkpoint
from trainer.mirror import bring
from transfer.load import LoadedEncoder


def moco_content(run: str, loaded: LoadedEncoder) -> dict[str, Any]:
    """Whole: what the run or the file holds of key encoder, queue, optimiser and epoch goes along."""
    if not loaded.is_run:
        file = read_moco(loaded.name)
        parts = {f"encoder_k.{name}": t for name, t in file.key_encoder.items()}
        if file.queue is not None:
            parts |= {"queue": file.queue, "queue_ptr": torch.tensor(file.queue_ptr)}
        about: dict[str, Any] = {"arch": file.arch, "epoch": file.epoch}
        about["key_encoder_updated"] = file.key_encoder_updated
        return reference_checkpoint(file.encoder, parts, optimizer=file.optimizer, **about)
    path = Path(bring(run))
    saved = checkpoint.load(path) if path.is_file() else checkpoint.load_newest(path)
    assert saved is not None  # load_encoder has read it
    epoch, mechanism = float(saved["epoch"]), loaded.recipe.mechanism
    if epoch != int(epoch):
        where = f"the run is at epoch {epoch:.2f}, and such files know whole epochs"
        print(f"note: {where}: training goes on from {int(epoch)}", file=sys.stderr)
    if mechanism != "moco":
        print(f"note: mechanism {mechanism} has no key encoder and no queue to go on with", file=sys.stderr)
    optimizer = over_both_encoders(saved["optimizer"]) if "optimizer" in saved else None
    moco = saved["moco"] if mechanism == "moco" else None
    return reference_checkpoint(saved["encoder"], moco, arch=loaded.recipe.arch, epoch=int(epoch), optimizer=optimizer)
