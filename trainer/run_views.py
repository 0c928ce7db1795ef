"""The view recipes of a run, from the fields of its recipe."""

from dataclasses import replace
from typing import Any

from pipeline.pixels.view_recipe import ViewRecipe, name_of, view_pair
from recipe import Recipe


def run_views(r: Recipe) -> tuple[ViewRecipe, ViewRecipe]:
    """The view recipes of query and key, with the run's crop_min, mean and std in them. ValueError that names the
    field, its value and its range."""
    return view_pair(r.views, r.key_views, crop_min=r.crop_min, mean=r.mean, std=r.std)


def resolved(r: Recipe) -> Recipe:
    """The same recipe with its view recipes written out: it then depends on no file. ValueError as `run_views`."""
    query, key = run_views(r)
    return replace(r, views=query.to_dict(), key_views=key.to_dict() if r.key_views else "")


def comparable(r: Recipe) -> dict[str, Any]:
    """The view fields of a recipe, one by one: equal where the views are, however they were asked for."""
    query, key = run_views(r)
    fields = {f"views.{name}": value for name, value in query.to_dict().items()}
    return fields | {f"key_views.{name}": value for name, value in key.to_dict().items() if key != query}


def views_in_words(r: Recipe) -> str:
    """For people: v2, or byol and byol_key."""
    query, key = run_views(r)
    return name_of(query) if query == key else f"{name_of(query)} and {name_of(key)}"
