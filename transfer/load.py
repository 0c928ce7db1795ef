"""An encoder from whatever a user has: a run folder, one of its checkpoints, or a MoCo checkpoint of the reference
code (`.pth.tar`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import nn

import checkpoint
import recipe as recipes
from model import interchange
from model.encoders import Encoder, build_encoder
from pipeline.pixels.views import MeanStd, mean_std
from recipe import Recipe


@dataclass(frozen=True)
class LoadedEncoder:
    """The query encoder in fp32 on the CPU, in eval mode, with what is needed to feed it as it was trained."""

    encoder: Encoder
    image_size: int
    mean_std: MeanStd
    views: str
    name: str  # for people: the run's folder or the file
    step: int  # of the checkpoint; 0 when untrained or unknown
    recipe: Recipe | None  # None for a foreign checkpoint
    has_head: bool  # False when the file had none: the encoder's own is then as it was initialised

    def part(self, features: Literal["backbone", "head"]) -> nn.Module:
        """The module whose output is `features`: [N, 3, S, S] -> [N, D]. ValueError for a head that the file lacks."""
        if features == "backbone":
            return self.encoder.backbone
        if not self.has_head:
            raise ValueError(f"{self.name} holds a backbone without a projection head: --features backbone judges that")
        return self.encoder


def default_resize(image_size: int) -> int:
    """Short side in pixels before the centre crop: 256 for 224 as everyone does; small pictures (under 96) keep
    their whole field of view."""
    return image_size if image_size < 96 else round(image_size * 256 / 224)


def load_encoder(run: str | Path, *, untrained: bool = False) -> LoadedEncoder:
    """Reads the query encoder of `run`: a run folder (its newest good checkpoint), a file in RUN/checkpoints, or a
    MoCo `.pth.tar`.

    untrained: the same architecture as it was initialised, the baseline that training has to beat; a run folder needs
    no checkpoint then.
    Raises FileNotFoundError when there is no such run or no checkpoint in it, ValueError when it cannot be read.
    """
    path = Path(run)
    if path.is_file() and path.parent.name != "checkpoints":
        return _load_foreign(path, untrained)
    folder = path.parent.parent if path.is_file() else path
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(
            f"no recipe.yaml in {folder}: give the folder that train.py wrote (--out), or a MoCo .pth.tar"
        )
    r = recipes.load(folder / "recipe.yaml")
    encoder = _build(r)
    step = 0
    if not untrained:
        state = checkpoint.load(path) if path.is_file() else checkpoint.load_newest(folder)
        if state is None:
            raise FileNotFoundError(f"no checkpoint in {folder}/checkpoints yet; train longer or pass --untrained")
        encoder.load_state_dict(state["encoder"])
        step = int(state["step"])
    return LoadedEncoder(encoder.eval(), r.image_size, mean_std(r.views), r.views, str(run), step, r, True)


def weights_hash(module: torch.nn.Module) -> str:
    """Of all parameters and statistics: the same file moved elsewhere is still the same encoder."""
    digest = xxhash.xxh3_64()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _build(r: Recipe) -> Encoder:
    """The architecture alone: split BN is plain BN in eval mode and has the same parameters and buffers."""
    # The run's own start: train.py seeds torch with the recipe's seed right before it builds the encoder.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        return build_encoder(r.arch, width=r.width, small_stem=r.small_stem, dim=r.dim, mlp=r.mlp)


def _load_foreign(path: Path, untrained: bool) -> LoadedEncoder:
    if untrained:
        raise ValueError(f"--untrained needs a run folder with its recipe, {path} is a bare checkpoint")
    file = interchange.read_moco(path)
    encoder = interchange.encoder_of(file)
    # Such a file does not say what it was trained on; a stride-1 stem is that of the reference's CIFAR-10 demo.
    small = encoder.backbone.get_submodule("conv1").stride == (1, 1)
    views = "cifar" if small else "v2"
    return LoadedEncoder(
        encoder.eval(), 32 if small else 224, mean_std(views), views, str(path), 0, None, file.has_head
    )
