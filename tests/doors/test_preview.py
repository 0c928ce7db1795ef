"""The preview: one command, one picture of the right size, different for other epochs; errors that tell what to do."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from PIL import Image, ImageDraw, ImageFont

from pipeline.preview import CELL, FOOT, GAP, LEGEND, PRINT, fitted, preview


def test_sheet_shows_originals_and_views(shards_dir: Path, tmp_path: Path) -> None:
    sheets = []
    for epoch in (0, 0, 1):
        preview(str(shards_dir), tmp_path / "views.png", count=3, image_size=64, epoch=epoch)
        with Image.open(tmp_path / "views.png") as sheet:
            sheets.append(np.asarray(sheet))
    assert sheets[0].shape == (3 * (CELL + PRINT + GAP) + GAP + FOOT, 3 * CELL + 4 * GAP, 3)
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])
    # Every cell holds a picture, and print stands below it.
    for row in range(3):
        for column in range(3):
            top, left = GAP + row * (CELL + PRINT + GAP), GAP + column * (CELL + GAP)
            assert sheets[0][top : top + CELL, left : left + CELL].std() > 10
            assert sheets[0][top + CELL : top + CELL + PRINT, left : left + CELL].min() < 128


def test_legend_and_class(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every letter that stands below a view is explained, inside the sheet; every sample has its class."""
    drawn = []
    real = ImageDraw.ImageDraw.text

    def spy(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, *rest: Any, **more: Any) -> None:
        box = self.textbbox(xy, text, rest[1], spacing=more.get("spacing", 4))
        drawn.append((text, box))
        real(self, xy, text, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    preview(str(shards_dir), tmp_path / "views.png", count=2, image_size=32)
    with Image.open(tmp_path / "views.png") as sheet:
        width, height = sheet.size
    legend, box = drawn[-1]
    assert legend == "\n".join(LEGEND)
    assert box[0] >= 0 and box[1] >= 2 * (CELL + PRINT + GAP) and box[2] <= width and box[3] <= height
    for word in ("red", "blue", "crop", "flip", "b c s", "brightness", "contrast", "saturation", "h:", "hue", "sigma"):
        assert word in legend
    assert len([text for text, _ in drawn if re.search(r"^sample \d+\n\d+x\d+\nclass class_\d$", text)]) == 2


@pytest.mark.parametrize("text", ["two\nlines", "tab\there", "odd \udc80 name", "x" * 100_000, ""])
def test_any_class_name_fits(text: str) -> None:
    font = ImageFont.load_default(13)
    short = fitted(text, 100, font)
    assert font.getlength(short) <= 100
    assert short.isprintable() and short[:3] == text[:3].replace("\t", " ")


@pytest.mark.parametrize("views", ["v1", "cifar"])
def test_other_recipes(shards_dir: Path, tmp_path: Path, views: str) -> None:
    preview(str(shards_dir), tmp_path / "folder" / "views.png", views=views, count=2, image_size=32)
    with Image.open(tmp_path / "folder" / "views.png") as sheet:
        assert sheet.size[0] == 3 * CELL + 4 * GAP


def test_command_and_its_errors(shards_dir: Path, run_command: Command, tmp_path: Path) -> None:
    for data, code in ((shards_dir, 0), (tmp_path / "nowhere", 2)):
        result = run_command("pipeline.preview", "--output", tmp_path / "views.png", "--count", "2", "--data", data)
        assert result.returncode == code, result.stderr
    assert "error: " in result.stderr and len(result.stderr.splitlines()) <= 2
