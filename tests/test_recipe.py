"""Recipes: what they resolve to, what they refuse, and how they differ."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

import checkpoint
import recipe as recipes
from pipeline.pixels.view_recipe import RECIPES as VIEWS
from pipeline.pixels.view_recipe import ViewRecipe
from recipe import Recipe
from trainer import build
from trainer.resume import compare_recipes
from trainer.run_views import resolved, run_views, views_in_words

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
GOOD = Recipe(data="shards/a", out="runs/a")


def test_flags_override_the_file_and_the_file_the_defaults() -> None:
    r = recipes.parse(["--config", str(REPOSITORY / "recipes/moco_v2_r50.yaml"), "--lr", "1e-2", "--data", "d"])
    assert (r.lr, r.data, r.mlp, r.temperature, r.queue_size) == (0.01, "d", True, 0.2, 65536)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    r = replace(GOOD, lr=1e-5, milestones=(1, 2), trackers=())
    recipes.save(r, tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == r


@pytest.mark.parametrize("text", ["learning_rate: 1", "lr: fast", "- a list", "schedule: linear"])
def test_what_is_no_recipe_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        recipes.load(path)
    with pytest.raises(SystemExit) as exit:
        recipes.parse(["--config", str(path)])
    assert exit.value.code == 2


def test_an_unknown_flag_is_one_short_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        recipes.parse(["--learning_rate", "1"])
    assert exit.value.code == 2
    assert "learning_rate" in (said := capsys.readouterr().err)
    assert len(said.splitlines()) <= 4


def test_print_config_shows_what_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        recipes.parse(["--config", str(REPOSITORY / "recipes/moco_v1_r50.yaml"), "--seed", "7", "--print_config"])
    assert exit.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "seed: 7" in shown
    assert "views: v1" in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": ""}, "--data is missing"),
        ({"out": ""}, "--out is missing"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"moco_momentum": 1.5}, "moco_momentum is 1.5"),
        ({"crop_min": 0.0}, "crop_min is 0.0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std belong together"),
        ({"epochs": 0}, "epochs 0 needs max_steps"),
        ({"epochs": -5, "max_steps": 10, "schedule": "constant"}, "epochs is -5; it cannot be negative"),
        ({"seed": -1}, "seed is -1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"knn_every": -1}, "knn_every is -1"),
        ({"accumulate": 3}, "batch_size 256 does not divide into accumulate 3"),
    ],
)
def test_validate_names_the_number(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(GOOD, **change).validate()  # type: ignore[arg-type]


def test_batch_and_groups_are_shared_out_over_the_ranks() -> None:
    assert [GOOD.images_per_pass(n) for n in (1, 2, 8)] == [256, 128, 32]
    assert [GOOD.bn_groups_per_pass(n) for n in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ValueError, match=r"256 does not divide over 6 ranks.*nearest that does: 258"):
        GOOD.images_per_pass(6)
    with pytest.raises(ValueError, match=r"bn_groups 8 .groups of 30 images. does not divide over 3 ranks"):
        replace(GOOD, batch_size=240).bn_groups_per_pass(3)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_a_batch_norm_group_has_the_same_images_whatever_the_ranks_and_micro_batches(
    ranks: int, accumulate: int
) -> None:
    r = replace(GOOD, batch_size=1024, bn_groups=64, accumulate=accumulate)  # moco_v1_ig1b: groups of 16
    assert r.images_per_pass(ranks) / r.bn_groups_per_pass(ranks) == 16


def test_more_forward_passes_than_batch_norm_groups_are_refused_with_both_sizes() -> None:
    """Before, accumulate 4 turned groups of 8 images into groups of 2 without a word."""
    r = replace(GOOD, batch_size=16, bn_groups=2, accumulate=4)
    with pytest.raises(ValueError, match=r"groups of 8 images.*leave only 4 .*--bn_groups 4 .*groups of 4"):
        r.bn_groups_per_pass(1)
    with pytest.raises(ValueError, match="divides it"):
        replace(r, bn_groups=3, accumulate=1).bn_groups_per_pass(1)


def test_advice_for_a_small_gpu_says_what_becomes_of_batch_norm() -> None:
    keeps = build.what_to_lower(replace(GOOD, bn_groups=8), 1)
    assert "accumulate 2 (128 images at a time, not 256; lr as it is), or" in keeps
    halves = build.what_to_lower(replace(GOOD, bn_groups=8), 8)
    assert "accumulate 2 (16 images at a time, not 32; lr as it is) with bn_groups 16: batch norm over 16 " in halves
    assert "accumulate" not in build.what_to_lower(replace(GOOD, bn_groups=32), 32)


def test_a_run_folder_refuses_another_recipe_and_says_what_differs(tmp_path: Path) -> None:
    recipes.save(GOOD, tmp_path / "recipe.yaml")
    assert compare_recipes(tmp_path, replace(GOOD, lr=0.1)) == []  # stopped before its first checkpoint: nothing lost
    checkpoint.save(tmp_path, {}, step=1, keep=1)
    notes = compare_recipes(tmp_path, replace(GOOD, epochs=400, log_every=5, out=str(tmp_path), data="moved"))
    assert compare_recipes(tmp_path, replace(GOOD, bn_groups=16))[1].startswith(
        "batch norm was over groups of 32 images"
    )
    assert any("epochs changes from 200 to 400" in note for note in notes)
    assert any("cosine schedule is that of 400" in note for note in notes)
    assert not any(note.startswith("out ") for note in notes)
    with pytest.raises(ValueError, match=r"lr 0\.03 there and 0\.1 now.*another --out"):
        compare_recipes(tmp_path, replace(GOOD, lr=0.1))


def test_views_are_written_out_and_compared_as_they_are(tmp_path: Path) -> None:
    """A file may change or go; an older version wrote a name and a crop_min into recipe.yaml."""
    (tmp_path / "own.yaml").write_text("{blur: 0.1, solarise: 0.2}")
    own = resolved(replace(GOOD, views=str(tmp_path / "own.yaml"), crop_min=0.3, mean=(0.1,) * 3, std=(0.2,) * 3))
    (tmp_path / "own.yaml").unlink()
    recipes.save(own, tmp_path / "recipe.yaml")
    loaded = recipes.load(tmp_path / "recipe.yaml")
    assert loaded == own == resolved(own)
    query, key = run_views(loaded)
    assert query == key == ViewRecipe(crop_scale=(0.3, 1), blur=0.1, solarise=0.2, mean=(0.1,) * 3, std=(0.2,) * 3)
    pair = resolved(replace(GOOD, views="byol", key_views="byol_key"))
    assert run_views(pair) == (VIEWS["byol"], VIEWS["byol_key"]) and views_in_words(pair) == "byol and byol_key"

    checkpoint.save(tmp_path, {}, step=1, keep=1)
    (tmp_path / "recipe.yaml").write_text("{data: shards/a, out: runs/a, views: v2, crop_min: 0.2}")
    for same in (GOOD, resolved(GOOD), replace(GOOD, views=VIEWS["v2"].to_dict(), key_views="v2")):
        assert compare_recipes(tmp_path, same) == []
    for change, says in (
        ({"views": "byol"}, r"views\.blur 0\.5 there and 1\.0 now"),
        ({"key_views": "byol_key", "crop_min": 0.2}, r"key_views\.solarise None there and 0\.2 now"),
        ({"crop_min": 0.08}, r"views\.crop_scale \[0\.2, 1\.0\] there and \[0\.08, 1\.0\] now"),
        ({"mean": (0.5,) * 3, "std": (0.2,) * 3}, r"views\.mean \[0\.485.* now"),
    ):
        with pytest.raises(ValueError, match=says):
            compare_recipes(tmp_path, replace(GOOD, **change))  # type: ignore[arg-type]


def test_flags_for_views(capsys: pytest.CaptureFixture[str]) -> None:
    r = recipes.parse(
        ["--views", "byol", "--key_views", "own.yaml", "--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1"]
    )
    assert (r.views, r.key_views, r.mean, r.std, r.crop_min) == ("byol", "own.yaml", (0.1, 0.2, 0.3), (1, 1, 1), None)
    with pytest.raises(SystemExit):
        recipes.parse(["--mean", "0.1"])
    assert "--mean" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_says_where_it_comes_from_and_what_to_expect(path: Path) -> None:
    text = path.read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= 2
    r = replace(recipes.load(path), data="d", out="o")
    r.validate()
    assert r.images_per_pass(1) % r.bn_groups_per_pass(1) == 0
