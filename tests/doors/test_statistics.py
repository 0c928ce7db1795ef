"""Mean and standard deviation: those of the pixels, the same every time, in the form that the flags take."""

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from sample_shards import write_shards

import recipe
from pipeline.sources.opening import open_source
from pipeline.statistics import statistics


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Shards of 30 PNG, and their pixels [30, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    low, high = np.array([0, 60, 200]), np.array([80, 250, 256])
    pixels = rng.integers(low, high, (30, 32, 32, 3)).astype(np.uint8)
    samples = []
    for i, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        samples.append((f"{i:04d}.png", file.getvalue(), None))
    folder = tmp_path_factory.mktemp("noise") / "shards"
    write_shards(folder, samples, per_shard=10)
    return folder, pixels


def test_they_are_those_of_the_pixels(noise: tuple[Path, np.ndarray]) -> None:
    folder, pixels = noise
    found = statistics(open_source(str(folder)), image_size=32, num_threads=1)
    flat = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(found["mean"], flat.mean(0), atol=6e-5)
    np.testing.assert_allclose(found["std"], flat.std(0), atol=6e-5)
    assert found["images"] == 30


def test_a_sample_is_spread_and_always_the_same(noise: tuple[Path, np.ndarray]) -> None:
    folder, pixels = noise
    source = open_source(str(folder))
    found = statistics(source, images=3, image_size=32, num_threads=1)
    assert found == statistics(source, images=3, image_size=32, num_threads=2)
    flat = pixels[[0, 10, 20]].reshape(-1, 3) / 255
    np.testing.assert_allclose(found["mean"], flat.mean(0), atol=6e-5)


def test_the_last_line_has_the_flags(
    noise: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["statistics", "--data", str(noise[0]), "--image_size", "32", "--num_threads", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "pipeline/statistics.py"), run_name="__main__")
    assert ended.value.code in (0, None)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    r = recipe.parse(found["flags"].split())
    assert (list(r.mean or ()), list(r.std or ())) == (found["mean"], found["std"])
    assert recipe.from_dict({"mean": found["mean"], "std": found["std"]}, "here").mean == r.mean


def test_one_colour_is_no_data_to_normalise_by(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (10, 20, 30)).save(file, "PNG")
    write_shards(tmp_path / "one", [("0.png", file.getvalue(), None)], per_shard=1)
    with pytest.raises(ValueError, match="standard deviation of a channel is 0 over 1 images"):
        statistics(open_source(str(tmp_path / "one")), image_size=16, num_threads=1)
