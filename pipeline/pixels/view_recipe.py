"""A view recipe: which augmentations a view goes through, how strongly, and by what its pixels are normalised. Data
alone: `views` draws the parameters of single views from it.

Five have names: v1 (He et al. 2020), v2 (Chen et al. 2020), cifar (the reference CIFAR-10 demo), and byol with byol_key
(Grill et al. 2020, for query and key, with the probabilities of MoCo v3's published code).
"""

import dataclasses
import difflib
import math
import numbers
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

Pair = tuple[float, float]
Triple = tuple[float, float, float]
MeanStd = tuple[Triple, Triple]  # of channels in [0, 1]

IMAGENET: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR: MeanStd = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
MOST_SIGMA = 2.4  # the GPU's blur has 13 taps each way
MOST = {"hue": 0.5, "brightness": 10.0, "contrast": 10.0, "saturation": 10.0}  # 1 for all others


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _error(name: str, value: object, range: str) -> ValueError:
    return ValueError(f"{name} is {list(value) if isinstance(value, tuple) else value!r}; it must be {range}")


@dataclass(frozen=True)
class ViewRecipe:
    """The order: crop, resize, flip, grey where it comes first, jitter (its four ops in any order), grey, blur,
    solarise, normalise. Ops are torchvision's. ValueError that names the field, its value and its range.
    """

    crop_scale: Pair = (0.2, 1.0)  # share of the image's area
    crop_ratio: Pair = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability, as all below that are not said to be something else
    jitter: float = 0.8
    brightness: float = 0.4  # strengths as ColorJitter has them: a factor from 1 - 0.4 to 1 + 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # a shift from -0.1 to 0.1 of a turn
    grey: float = 0.2
    grey_first: bool = False  # before the jitter
    blur: float = 0.5
    blur_sigma: Pair = (0.1, 2.0)  # in pixels of the view
    solarise: float = 0.0
    solarise_threshold: int = 128  # levels from it on are inverted
    mean: Triple = IMAGENET[0]  # of pixels in [0, 1]
    std: Triple = IMAGENET[1]

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if isinstance(default, tuple):
                if not (isinstance(value, list | tuple) and len(value) == len(default) and all(map(_is_number, value))):
                    raise _error(name, value, f"{len(default)} numbers")
                object.__setattr__(self, name, tuple(float(number) for number in value))
            elif isinstance(default, bool):
                if not isinstance(value, bool):
                    raise _error(name, value, "true or false")
            elif name == "solarise_threshold":
                if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 255):
                    raise _error(name, value, "a whole number from 1 to 255")
            else:
                most = MOST.get(name, 1.0)
                if not (_is_number(value) and 0 <= value <= most):
                    raise _error(name, value, f"a number from 0 to {most:g}")
                object.__setattr__(self, name, float(value))
        ordered = "[low, high], low no higher than high, "
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise _error("crop_scale", self.crop_scale, ordered + "above 0 and at most 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise _error("crop_ratio", self.crop_ratio, ordered + "above 0")
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= MOST_SIGMA:
            raise _error("blur_sigma", self.blur_sigma, ordered + f"from 0 to {MOST_SIGMA}")
        if not all(0 <= number <= 1 for number in self.mean):
            raise _error("mean", self.mean, "three numbers from 0 to 1, of pixels from 0 to 1")
        if not all(0 < number <= 1 for number in self.std):
            raise _error("std", self.std, "three numbers above 0 and at most 1, of pixels from 0 to 1")

    @property
    def mean_std(self) -> MeanStd:
        return self.mean, self.std

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; `view_recipe` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ViewRecipe)}

_BYOL = ViewRecipe(crop_scale=(0.08, 1.0), saturation=0.2, blur=1.0)
RECIPES = {
    "v1": ViewRecipe(jitter=1.0, hue=0.4, grey_first=True, blur=0.0),
    "v2": ViewRecipe(),
    # The demo's crops begin at 0.08 of the area, as crop_min in recipes/cifar10_*.yaml says.
    "cifar": ViewRecipe(blur=0.0, mean=CIFAR[0], std=CIFAR[1]),
    "byol": _BYOL,
    "byol_key": replace(_BYOL, blur=0.1, solarise=0.2),
}

AnyViews = str | Path | Mapping[str, Any] | ViewRecipe


def view_recipe(
    views: AnyViews, *, crop_min: float | None = None, mean: Any = None, std: Any = None, where: str = "views"
) -> ViewRecipe:
    """The recipe that `views` is: one of `RECIPES` by its name, a YAML file of fields, or such fields; those left out
    are v2's. `crop_min`, `mean` and `std` take the place of its own where they are given.

    Raises ValueError that names `where` it was asked for, the field, its value and its range.
    """
    made, read_from = _made(views, where)
    changes: dict[str, Any] = {} if crop_min is None else {"crop_scale": (crop_min, made.crop_scale[1])}
    changes |= {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    if crop_min is not None and not (_is_number(crop_min) and 0 < crop_min <= made.crop_scale[1]):
        raise ValueError(
            f"crop_min is {crop_min!r}; it must be above 0 and at most {made.crop_scale[1]:g}, the largest share that "
            f"{read_from} has"
        )
    return replace(made, **changes) if changes else made


def view_pair(views: AnyViews, key_views: AnyViews | None, **changes: Any) -> tuple[ViewRecipe, ViewRecipe]:
    """The recipes of query and key, `changes` as in `view_recipe`; without key_views the query's for both. ValueError
    also when they do not normalise alike: the two encoders must see the same colours.
    """
    query = view_recipe(views, **changes)
    key = query if key_views is None or key_views == "" else view_recipe(key_views, **changes, where="key_views")
    for name in ("mean", "std"):
        mine, theirs = list(getattr(query, name)), list(getattr(key, name))
        if mine != theirs:
            raise ValueError(f"key_views: {name} is {theirs}; it must be that of views, {mine}: give both the same")
    return query, key


def name_of(recipe: ViewRecipe) -> str:
    """For people: the name of a recipe that has one, else "own"; mean, std and the smallest crop do not count."""
    for name, known in RECIPES.items():
        crop = (recipe.crop_scale[0], known.crop_scale[1])
        if replace(known, crop_scale=crop, mean=recipe.mean, std=recipe.std) == recipe:
            return name
    return "own"


def add_view_flags(parser: Any) -> None:
    """--views, --key_views and --crop_min of the commands that draw views; a name or file that is none is an error of
    the command line."""

    def flag(views: AnyViews) -> ViewRecipe:
        try:
            return view_recipe(views)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    known = f"{', '.join(RECIPES)}, or a YAML file of the fields in docs/data.md"
    add = parser.add_argument
    add("--views", type=flag, default="v2", help=f"augmentation recipe: {known}")
    add("--key_views", type=flag, default=None, help="another one for the keys' views; when left out that of --views")
    add(
        "--crop_min",
        type=float,
        default=None,
        help="smallest share of the image's area in a random crop; when left out that of --views, 0.2 but for byol's",
    )


def _made(views: AnyViews, where: str) -> tuple[ViewRecipe, str]:
    """The recipe, and what to call it in an error."""
    if isinstance(views, ViewRecipe):
        return views, where
    if isinstance(views, str) and views in RECIPES:
        return RECIPES[views], views
    if isinstance(views, Mapping):
        return _from_fields(views, where), where
    if not isinstance(views, str | Path):
        raise ValueError(f"{where} is {views!r}; it must be a name, a YAML file of fields, or the fields themselves")
    path = Path(views)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"{where} {str(views)!r} is none of {', '.join(RECIPES)}, and no YAML file of fields")
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{where}: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    return _from_fields(content, str(path)), str(path)


def _from_fields(fields: Any, where: str) -> ViewRecipe:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} holds {type(fields).__name__}, not `field: value` lines")
    for name in fields:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(str(name), _DEFAULTS, n=1)
            meant = f": did you mean {near[0]}?" if near else f"; there are {', '.join(_DEFAULTS)}"
            raise ValueError(f"{where}: no field {name!r}{meant}")
    try:
        return ViewRecipe(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
