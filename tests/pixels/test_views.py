"""The parameters of views: torchvision's distributions, keyed by (seed, epoch, sample id, view) and nothing else."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms as T

from pipeline.permutation import mix
from pipeline.pixels import views
from pipeline.pixels.views import sample_views

N = 4000


def draw(recipe: str = "v2", n: int = N, height: int = 375, width: int = 500, **changes: Any) -> dict[str, np.ndarray]:
    arguments: dict[str, Any] = {"seed": 1, "epochs": np.zeros(n, int), "sample_ids": np.arange(n), "view": 0}
    arguments |= {"image_size": 224, "crop_min": 0.2} | changes
    rows = sample_views(recipe, heights=np.full(n, height), widths=np.full(n, width), **arguments)
    return dict(zip(views.COLUMNS, rows.T))


def torchvision_crops(height: int, width: int, scale: float) -> np.ndarray:
    """top, left, height, width: [N, 4]"""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([T.RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3]) for _ in range(N)])


def same_distribution(a: Any, b: Any) -> bool:
    """Kolmogorov-Smirnov on two samples: False rejects at p = 0.001."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)).max()
    return bool(distance < 1.95 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 200), (32, 32)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    ours, theirs = draw(height=height, width=width), torchvision_crops(height, width, 0.2)
    for i, column in enumerate(("top", "left", "height", "width")):
        assert same_distribution(ours[column], theirs[:, i]), column
    assert same_distribution(ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours["width"] / ours["height"], theirs[:, 3] / theirs[:, 2])


def test_the_test_of_crops_would_notice_another_scale() -> None:
    ours, theirs = draw(crop_min=0.2), torchvision_crops(375, 500, 0.08)
    assert not same_distribution(ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(draw(crop_min=0.08)["height"], theirs[:, 2])


@pytest.mark.parametrize(
    ("recipe", "saturation", "hue"), [("v1", 0.4, 0.4), ("v2", 0.4, 0.1), ("cifar", 0.4, 0.1), ("byol", 0.2, 0.1)]
)
def test_jitter_is_distributed_as_torchvisions(recipe: str, saturation: float, hue: float) -> None:
    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, saturation, hue)
    theirs = [
        T.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(N)
    ]
    ours = draw(recipe)
    on = ours["order"] >= 0
    for i, column in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert same_distribution(ours[column][on], [t[1 + i] for t in theirs]), column
        other = draw("v2" if recipe == "v1" else "v1")
        if column == "hue":  # 0.1 against 0.4 must fail
            assert not same_distribution(other[column][other["order"] >= 0], [t[1 + i] for t in theirs])
    # All 24 orders, each as often: chi squared with 23 degrees of freedom is below 50 with p = 0.999.
    counts = np.bincount(ours["order"][on].astype(int), minlength=24)
    assert len(counts) == 24
    assert ((counts - on.sum() / 24) ** 2 / (on.sum() / 24)).sum() < 50


@pytest.mark.parametrize(
    ("recipe", "jitter", "grey", "blur", "solarise"),
    [
        ("v1", 1.0, 0.2, 0.0, 0.0),
        ("v2", 0.8, 0.2, 0.5, 0.0),
        ("cifar", 0.8, 0.2, 0.0, 0.0),
        ("byol", 0.8, 0.2, 1.0, 0.0),
        ("byol_key", 0.8, 0.2, 0.1, 0.2),
    ],
)
def test_probabilities_of_the_recipes(recipe: str, jitter: float, grey: float, blur: float, solarise: float) -> None:
    ours = draw(recipe)
    before, after = ours["grey_before"], ours["grey_after"]
    assert not (after if recipe == "v1" else before).any()  # v1: grey comes before the jitter
    shares = {"jitter": (ours["order"] >= 0, jitter), "grey": (before + after, grey), "flip": (ours["flip"], 0.5)}
    shares |= {"blur": (ours["blur"] > 0, blur), "solarise": (ours["solarise"] > 0, solarise)}
    assert set(ours["solarise"]) <= {0, 128}
    for name, (values, p) in shares.items():
        # Four standard deviations: 0.8 against 1 would be 30 of them.
        assert abs(np.mean(values) - p) <= 4 * np.sqrt(p * (1 - p) / N), name
    if blur:
        sigma = ours["blur"][ours["blur"] > 0]
        assert same_distribution(sigma, np.random.default_rng(0).uniform(0.1, 2.0, N))


def test_probabilities_and_strengths_of_an_own_recipe() -> None:
    """Each field moves its own column; a strength above 1 begins at 0, as in ColorJitter."""
    own = views.ViewRecipe(
        crop_scale=(0.5, 0.6), crop_ratio=(1.0, 1.0), flip=0.9, jitter=1.0, brightness=2.0, contrast=0, saturation=1.0,
        hue=0.5, grey=0.7, grey_first=True, blur=1.0, blur_sigma=(1.0, 1.0), solarise=0.4, solarise_threshold=200,
    )  # fmt: skip
    arguments: dict[str, Any] = {"seed": 1, "epochs": np.zeros(N, int), "sample_ids": np.arange(N), "view": 0}
    rows = sample_views(own, heights=[400] * N, widths=[400] * N, image_size=64, **arguments)
    ours = dict(zip(views.COLUMNS, rows.T))
    area = ours["height"] * ours["width"] / 400**2
    assert (ours["height"] == ours["width"]).all() and 0.49 < area.min() < 0.51 and 0.59 < area.max() < 0.61
    assert (ours["order"] >= 0).all() and (ours["contrast"] == 1).all() and (ours["blur"] == 1).all()
    for column, low, high in (("brightness", 0, 3), ("saturation", 0, 2), ("hue", -0.5, 0.5)):
        assert same_distribution(ours[column], np.random.default_rng(0).uniform(low, high, N)), column
    for column, p in (("flip", 0.9), ("grey_before", 0.7), ("grey_after", 0), ("solarise", 0.4)):
        assert abs((ours[column] > 0).mean() - p) < 0.04, column
    assert set(ours["solarise"]) == {0, 200}


def test_named_recipes_draw_the_rows_that_every_run_so_far_has_seen() -> None:
    """Stored when recipes became data: a run that continues must see the same views, bit by bit."""
    stored = {
        "v1": "4067abcbc79dc4d2", "v2": "ba496c451fe1156d", "cifar": "098bfce9b256cc60",
    }  # fmt: skip
    rng = np.random.default_rng(1)
    sizes = {"heights": rng.integers(1, 900, N), "widths": rng.integers(1, 900, N), "image_size": 224}
    keys: dict[str, Any] = {"seed": 7, "epochs": np.arange(N) % 9, "sample_ids": np.arange(N) * 977, "view": 1}
    for name, digest in stored.items():
        rows = sample_views(name, **keys, **sizes, crop_min=0.2)[:, : views.BLUR + 1]
        assert hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16] == digest, name
        assert sample_views(name, **keys, **sizes)[:, : views.BLUR + 1].tobytes() == rows.tobytes()


def test_a_row_depends_on_its_own_key_alone() -> None:
    ids, sizes = np.array([7, 123456789012, 0, 3]), np.array([375, 100, 31, 2000])
    common: dict[str, Any] = {"seed": 5, "view": 1, "image_size": 224, "crop_min": 0.2}
    together = sample_views("v2", epochs=[3, 0, 9, 3], sample_ids=ids, heights=sizes, widths=sizes, **common)
    for i, epoch in enumerate([3, 0, 9, 3]):
        alone = sample_views(
            "v2", epochs=[epoch], sample_ids=ids[i : i + 1], heights=sizes[i : i + 1], widths=sizes[i : i + 1], **common
        )
        assert alone.tobytes() == together[i].tobytes()


def test_every_part_of_the_key_counts_and_views_are_independent() -> None:
    first = draw()
    for changes in ({"seed": 2}, {"epochs": np.ones(N, int)}, {"view": 1}, {"sample_ids": np.arange(N) + N}):
        other = draw(**changes)
        for column in ("top", "width", "brightness", "hue", "blur"):
            assert abs(np.corrcoef(first[column], other[column])[0, 1]) < 0.08, (changes, column)


def test_the_generator_is_splitmix64() -> None:
    # The first output of the published generator from state 0 is the finaliser of its increment.
    increment = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert mix(increment)[0] == 0xE220A8397B1DCDAF
    # These numbers key every run there has been: a change of them changes what a resumed run sees.
    expected = [0.46271980776181976, 0.1837144040540567, 0.8023863275945929]
    np.testing.assert_allclose(views._uniforms(1, [2], [3], 1)[0, :3], expected, rtol=1e-15)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (1, 3), (1, 1000), (5000, 3), (4, 3), (9000, 12000)])
def test_crops_never_leave_the_image(height: int, width: int) -> None:
    for crop_min in (0.01, 0.08, 0.2, 1.0):
        ours = draw(n=500, height=height, width=width, crop_min=crop_min)
        assert (ours["top"] >= 0).all() and (ours["left"] >= 0).all()
        assert (ours["height"] >= 1).all() and (ours["width"] >= 1).all()
        assert (ours["top"] + ours["height"] <= height).all() and (ours["left"] + ours["width"] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (7, 500), (300, 1)])
def test_the_central_crop_when_no_attempt_fits(height: int, width: int) -> None:
    ours = draw(n=1, height=height, width=width)
    box = T.RandomResizedCrop.get_params(torch.empty(3, height, width), [0.2, 1.0], [3 / 4, 4 / 3])
    assert tuple(int(ours[c][0]) for c in ("top", "left", "height", "width")) == box


def test_errors_and_descriptions() -> None:
    with pytest.raises(ValueError, match="v1, v2, cifar"):
        draw("v3")
    with pytest.raises(ValueError, match="224"):
        views.center_crops([300], [300], 224, 200)
    ones = {"seed": 0, "epochs": [0], "sample_ids": [0], "view": 0, "heights": [9], "widths": [9], "image_size": 8}
    plain = views.sample_crops(**ones, crop_min=0.08)[0]  # type: ignore[arg-type]
    assert views.describe(plain).startswith("crop ") and "\n" not in views.describe(plain)
    assert any("blur" in views.describe(row) for row in np.array(list(draw(n=20).values())).T)
