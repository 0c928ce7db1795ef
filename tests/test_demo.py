"""`make demo`: its pages, and its commands. The demo itself is run by continuous integration (.ci/run)."""

import importlib.util
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

specification = importlib.util.spec_from_file_location("letters", REPOSITORY / "benchmarks" / "letters.py")
assert specification is not None and specification.loader is not None
letters: Any = importlib.util.module_from_spec(specification)
specification.loader.exec_module(letters)


def test_a_glyph_is_whole_and_in_the_middle_of_its_square() -> None:
    for letter in string.ascii_uppercase:
        for font in letters.FONTS:
            rows, columns = np.nonzero(np.asarray(letters.draw_glyph(letter, font)))
            side = letters.GLYPH_SIDE
            for places in (rows, columns):
                assert places.min() > 0 and places.max() < side - 1, f"{letter} in {font} reaches the border"
                assert abs(places.min() + places.max() - (side - 1)) <= 4, f"{letter} in {font} is out of the middle"


def test_every_page_is_full_and_another_one() -> None:
    glyph, rng = letters.draw_glyph("A", "DejaVuSans"), np.random.default_rng(0)
    pages = np.stack([letters.draw_page(glyph, rng) for _ in range(50)]).astype(float)
    half = letters.SIDE // 2
    for quarter in (pages[:, :half, :half], pages[:, :half, half:], pages[:, half:, :half], pages[:, half:, half:]):
        assert (quarter.max(axis=(1, 2)) > 200).all(), "a quarter of a page shows no letter"
    centred = pages.reshape(50, -1) - pages.mean()
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    alike = centred @ centred.T - np.eye(50)
    assert alike.max() < 0.75  # of the same page, 1
    assert abs(alike[~np.eye(50, dtype=bool)].mean()) < 0.1  # pages of one letter are hardly more alike than noise


@pytest.mark.slow
def test_the_folder_holds_the_same_pages_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "FONTS", letters.FONTS[:1])
    for name in ("one", "other"):
        letters.main(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    for split, pages in (("train", 9), ("val", 3)):
        assert {p.parts[1] for p in files if p.parts[0] == split} == set(string.ascii_uppercase)
        assert sum(p.parts[0] == split for p in files) == 26 * pages
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    with Image.open(tmp_path / "one" / files[0]) as image:
        assert (image.mode, image.size) == ("L", (letters.SIDE, letters.SIDE))
