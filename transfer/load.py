"""An encoder from whatever a user has: a run folder, one of its checkpoints, or a MoCo file of the reference code or of
its CIFAR-10 demo."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import nn

import checkpoint
import recipe as recipes
from model import interchange
from model.encoders import Encoder, build_encoder, check_image_size
from model.interchange import MoCoFile
from pipeline.labelled import NOT_AUGMENTED, Augmented, LabelledBatch, augmented_batches
from pipeline.pixels.views import MeanStd
from pipeline.sources.manifest import Source
from recipe import Recipe
from trainer.joining import Ranks
from trainer.mirror import bring
from trainer.run_views import run_views

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class CentralCrops:
    """How a source's images reach an encoder that is judged, and this rank's share of them."""

    image_size: int  # side of the centre crop in pixels
    mean_std: MeanStd  # by which pixels from 0 to 1 are normalised
    resize: int | None = None  # short side before the crop; None: `default_resize`
    batch_size: int = 256  # of this rank
    num_threads: int | None = None
    ranks: Ranks = ALONE
    max_bad_fraction: float = 0.01  # ValueError when more of the images do not decode

    def batches(
        self, source: Source, *, ranges: Sequence[range] | None = None, augmented: Augmented = NOT_AUGMENTED
    ) -> Iterator[tuple[LabelledBatch, tuple[torch.Tensor, ...]]]:
        """This rank's part of `source`: images fp32 [n, 3, image_size, image_size] on the device, labels, ids; and
        their augmented views. `ranges` and `augmented` as in `augmented_batches`."""
        return augmented_batches(
            source,
            augmented,
            image_size=self.image_size,
            resize=default_resize(self.image_size) if self.resize is None else self.resize,
            batch_size=self.batch_size,
            mean_std=self.mean_std,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=str(self.ranks.device),
            num_threads=self.num_threads,
            max_bad_fraction=self.max_bad_fraction,
            ranges=ranges,
        )


@dataclass(frozen=True)
class LoadedEncoder:
    """The query encoder in fp32 on the CPU, in eval mode, with what is needed to feed it as it was trained."""

    encoder: Encoder
    recipe: Recipe  # of a MoCo file: what it says of its encoder, the usual values for the rest
    image_size: int
    mean_std: MeanStd
    name: str  # for people: the run's folder or the file
    step: int = 0  # of the checkpoint; 0 when untrained or unknown
    has_head: bool = True  # False when the file had none: the encoder's own is then as it was initialised
    is_run: bool = True  # False for a MoCo file
    start: Literal["trained", "untrained"] = "trained"
    fingerprint: str = ""  # of the data that it was trained on; empty when untrained or unknown

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


def load_encoder(
    run: str | Path,
    *,
    untrained: bool = False,
    image_size: int | None = None,
    mean_std: MeanStd | None = None,
    feeds_images: bool = True,
) -> LoadedEncoder:
    """Reads the query encoder of `run`: a run folder or its URL (its newest good checkpoint), one checkpoint of a run
    wherever it lies, or a MoCo `.pth.tar`. The content of a file decides what it is.

    untrained: the same architecture as it was initialised, the baseline that training has to beat; a run folder needs
    no checkpoint then, and a file that is of no run gives the architecture, initialised with seed 0.
    image_size, mean_std: instead of the recipe's, or of those that are usual for a MoCo file, which says nothing of
    them: what is taken is said, but for a caller that feeds no images.
    Raises FileNotFoundError when there is no such run or no checkpoint in it, ValueError when it cannot be read.
    """
    path = Path(bring(str(run)))
    if path.is_file():
        content = interchange.load_plain(path)
        if not (isinstance(content, dict) and content.keys() >= {"encoder", "step"}):
            loaded = _of_moco_file(interchange.parse_moco(content, path), image_size, mean_std, untrained)
            if feeds_images and (image_size is None or mean_std is None):
                _say_what_is_usual(loaded, image_size is None, mean_std is None)
            return loaded
        return _of_run(_recipe_of(path, content), str(run), None if untrained else content, path, image_size, mean_std)
    if not (path / "recipe.yaml").is_file():
        raise FileNotFoundError(
            f"no recipe.yaml in {path}: give the folder that train.py wrote (--out), a checkpoint in it, or a MoCo "
            ".pth.tar"
        )
    state = None
    if not untrained:
        state = checkpoint.load_newest(path)
        if state is None:
            raise FileNotFoundError(f"no checkpoint in {path}/checkpoints yet; train longer or pass --untrained")
    return _of_run(recipes.load(path / "recipe.yaml"), str(run), state, path, image_size, mean_std)


def weights_hash(module: torch.nn.Module) -> str:
    """A hash of all parameters and statistics: the same file moved elsewhere is still the same encoder."""
    digest = xxhash.xxh3_64()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _recipe_of(path: Path, state: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint holds; that of its run folder for one without."""
    if "recipe" in state:
        return recipes.from_dict(state["recipe"], path)
    try:
        return recipes.load(path.parent.parent / "recipe.yaml")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is a checkpoint that holds no recipe: put it back into RUN/checkpoints, beside RUN/recipe.yaml"
        ) from None


def _of_run(
    r: Recipe, name: str, state: dict[str, Any] | None, path: Path, image_size: int | None, mean_std: MeanStd | None
) -> LoadedEncoder:
    """The encoder of recipe `r` with the weights of a checkpoint's `state`; None: as it was initialised. ValueError
    that names `path` when the recipe makes no encoder, or another one than the checkpoint's.
    """
    try:
        if r.image_size < 1:
            raise ValueError(f"image_size {r.image_size} is none that a run can have")
        run_mean_std = run_views(r)[0].mean_std
        encoder = _build(r)
        if state is not None:
            encoder.load_state_dict(state["encoder"])
        step = 0 if state is None else int(state["step"])
        data = "" if state is None else str(state.get("loader", {}).get("fingerprint", ""))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} and its recipe (arch {r.arch}, dim {r.dim}) do not fit: {reason[:200]}") from None
    normalised = mean_std or run_mean_std
    if image_size not in (None, r.image_size) and r.arch.startswith("timm:"):
        check_image_size(encoder.backbone, r.arch, image_size)
    start: Literal["trained", "untrained"] = "untrained" if state is None else "trained"
    about: dict[str, Any] = {"start": start, "fingerprint": data}
    return LoadedEncoder(encoder.eval(), r, image_size or r.image_size, normalised, name, step, **about)


def _build(r: Recipe) -> Encoder:
    """The architecture alone: split BN is plain BN in eval mode and has the same parameters and buffers."""
    # The run's own start: train.py seeds torch with the recipe's seed right before it builds the encoder.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        about: dict[str, Any] = {"small_stem": r.small_stem, "dim": r.dim, "mlp": r.mlp, "image_size": r.image_size}
        return build_encoder(r.arch, width=r.width, **about)


def _of_moco_file(file: MoCoFile, image_size: int | None, mean_std: MeanStd | None, untrained: bool) -> LoadedEncoder:
    r = Recipe(arch=file.arch, width=file.width, small_stem=file.small_stem, dim=file.dim, mlp=file.mlp)
    # Such a file does not say what it was trained on; a stride-1 stem is that of the reference's CIFAR-10 demo.
    if file.small_stem:
        r = replace(r, views="cifar", image_size=32)
    size, normalised = image_size or r.image_size, mean_std or run_views(r)[0].mean_std
    if untrained:  # with the seed that a recipe has by default
        encoder = _build(replace(r, image_size=size)).eval()
        return LoadedEncoder(encoder, r, size, normalised, file.path, is_run=False, start="untrained")
    encoder = interchange.encoder_of(file, image_size).eval()
    return LoadedEncoder(encoder, r, size, normalised, file.path, has_head=file.has_head, is_run=False)


def _say_what_is_usual(loaded: LoadedEncoder, size: bool, normalisation: bool) -> None:
    usual = "CIFAR-10's" if loaded.recipe.small_stem else "ImageNet's"
    taken = [f"{loaded.image_size} pixels (--image_size)"] if size else []
    taken += [f"{usual} mean and std (--mean --std)"] if normalisation else []
    print(f"note: {loaded.name} does not say how its images were fed; taken: {', '.join(taken)}", file=sys.stderr)
