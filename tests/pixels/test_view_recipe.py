"""View recipes as data: names, files and fields give the same record; a bad one is one clear error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.pixels.view_recipe import CIFAR, IMAGENET, RECIPES, ViewRecipe, name_of, view_pair, view_recipe


def test_the_named_recipes_are_the_published_ones() -> None:
    v1, v2, cifar, byol, key = (RECIPES[name] for name in ("v1", "v2", "cifar", "byol", "byol_key"))
    assert (v1.jitter, v1.hue, v1.grey_first, v1.blur) == (1, 0.4, True, 0)
    assert (v2.jitter, v2.hue, v2.grey_first, v2.blur, v2.blur_sigma) == (0.8, 0.1, False, 0.5, (0.1, 2))
    assert cifar == replace(v2, blur=0, mean=CIFAR[0], std=CIFAR[1])
    # moco-v3's main_moco.py: both ColorJitter(.4, .4, .2, .1) p .8, grey .2; blur p 1 and .1; solarise p 0 and .2.
    assert (byol.brightness, byol.contrast, byol.saturation, byol.hue, byol.crop_scale[0]) == (0.4, 0.4, 0.2, 0.1, 0.08)
    assert (byol.blur, byol.solarise, key.blur, key.solarise, key.solarise_threshold) == (1, 0, 0.1, 0.2, 128)
    assert replace(key, blur=1, solarise=0) == byol
    assert all(r.mean_std == IMAGENET for r in (v1, v2, byol, key))


@pytest.mark.parametrize("name", RECIPES)
def test_a_record_survives_yaml_and_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(RECIPES[name].to_dict()))
    assert view_recipe(str(path)) == view_recipe(path) == RECIPES[name]
    assert view_recipe(json.loads(json.dumps(RECIPES[name].to_dict()))) == RECIPES[name]
    assert name_of(view_recipe(name, crop_min=0.05, mean=[0, 0, 0], std=[1, 1, 1])) == name


def test_fields_that_are_left_out_are_those_of_v2_and_arguments_override() -> None:
    own = view_recipe({"solarise": 0.5, "mean": [0.1, 0.2, 0.3]})
    assert own == ViewRecipe(solarise=0.5, mean=(0.1, 0.2, 0.3)) and name_of(own) == "own"
    assert view_recipe("byol", crop_min=0.3).crop_scale == (0.3, 1)
    assert view_recipe("v2", mean=(0.5, 0.5, 0.5), std=[0.5, 0.5, 0.5]).mean_std == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"blurr": 0.5}, "no field 'blurr': did you mean blur"),
        ({"blur": 1.5}, "blur is 1.5; it must be a number from 0 to 1"),
        ({"flip": "often"}, "flip is 'often'; it must be a number from 0 to 1"),
        ({"jitter": True}, "jitter is True; it must be a number"),
        ({"grey": float("nan")}, "grey is nan; it must be a number from 0 to 1"),
        ({"hue": 0.6}, "hue is 0.6; it must be a number from 0 to 0.5"),
        ({"brightness": -0.1}, "brightness is -0.1; it must be a number from 0 to 10"),
        ({"grey_first": 1}, "grey_first is 1; it must be true or false"),
        ({"crop_scale": [0.5, 0.2]}, r"crop_scale is \[0.5, 0.2\]; .*low no higher than high"),
        ({"crop_scale": [0, 1]}, r"crop_scale is \[0.0, 1.0\]; .*above 0 and at most 1"),
        ({"crop_ratio": 1}, "crop_ratio is 1; it must be 2 numbers"),
        ({"blur_sigma": [0.1, 3]}, r"blur_sigma is \[0.1, 3.0\]; .*from 0 to 2.4"),
        ({"solarise_threshold": 0.5}, "solarise_threshold is 0.5; it must be a whole number from 1 to 255"),
        ({"mean": [124, 116, 104]}, r"mean is \[124.0, 116.0, 104.0\]; .*from 0 to 1"),
        ({"mean": [0.5]}, r"mean is \[0.5\]; it must be 3 numbers"),
        ({"std": [0.2, 0, 0.2]}, r"std is \[0.2, 0.0, 0.2\]; .*above 0"),
    ],
)
def test_a_bad_field_is_named_with_value_and_range(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^key_views: {says}"):
        view_pair("v2", fields)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match=f"own.yaml: {says}"):
        view_recipe(path)


@pytest.mark.parametrize(
    ("views", "says"),
    [
        ("v3", "views 'v3' is none of v1, v2, cifar, byol, byol_key, and no YAML file"),
        ("/no/such.yaml", "views: cannot read /no/such.yaml: No such file"),
        (3, "views is 3; it must be a name"),
    ],
)
def test_what_is_no_view_recipe(views: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        view_recipe(views)
    for text, said in (("- a\n", "holds list"), ("a: [", "is no YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            view_recipe(tmp_path / "bad.yaml")


def test_query_and_key_are_normalised_alike() -> None:
    assert view_pair("byol", "byol_key") == (RECIPES["byol"], RECIPES["byol_key"])
    assert view_pair("v1", None) == view_pair("v1", "") == (RECIPES["v1"],) * 2
    with pytest.raises(ValueError, match=r"key_views: mean is \[0.4914, .*must be that of views, \[0.485"):
        view_pair("v2", "cifar")
    both = {"mean": [0.5] * 3, "std": [0.2] * 3}
    assert view_pair("v2", "cifar", **both)[1].mean == (0.5,) * 3
    for crop_min in (0, 1.5, "small"):
        with pytest.raises(ValueError, match=r"crop_min is .*; it must be above 0 and at most 1"):
            view_pair("v2", None, crop_min=crop_min)
