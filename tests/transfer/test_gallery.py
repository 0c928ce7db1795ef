"""Galleries: the right pictures, in the right order, with the right frames."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import checkpoint
import recipe as recipes
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from pipeline.sources.storage import Storage
from transfer import arguments, gallery
from transfer.load import load_encoder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only checkpoint is its start."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    folder.mkdir()
    r = recipes.Recipe(data="unused", out="unused", arch="resnet18", dim=16, views="v1", image_size=32)
    recipes.save(r, folder / "recipe.yaml")
    encoder = load_encoder(folder, untrained=True).encoder
    checkpoint.save(folder, {"encoder": encoder.state_dict(), "step": 0}, step=0, keep=1)
    return folder


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_originals_are_those_of_the_folder(image_folder: Path, shards_dir: Path) -> None:
    """Every id gives a picture of the folder, each of them once, with the class that its label says."""
    source = open_source(str(shards_dir))
    known = {pixels_of(p).tobytes(): p for p in image_folder.rglob("*.*")}
    storage = Storage()
    found = [known[np.asarray(gallery.original(source, storage, i)).tobytes()] for i in range(source.samples)]
    assert len(set(found)) == 60


def test_queries_come_from_different_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 5)
    chosen = gallery.choose_queries(labels, 5, seed=1)
    assert sorted(labels[chosen].tolist()) in ([0, 0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2])
    assert len(set(chosen)) == 5
    assert chosen == gallery.choose_queries(labels, 5, seed=1)
    assert chosen != gallery.choose_queries(labels, 5, seed=2)
    assert len(set(gallery.choose_queries(torch.full((20,), -1), 8, seed=0))) == 8


def test_page(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (300, 200), "blue")
    page = gallery.draw([[(red, "cat", ""), (blue, "0.91 a name that is far too long", gallery.SAME)]] * 2, "title")
    pixels = np.asarray(page)
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 2 * gallery.CELL**2
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == 2 * gallery.CELL**2
    green = tuple(bytes.fromhex(gallery.SAME[1:]))
    assert (pixels == green).all(axis=2).sum() == 2 * 4 * 2 * (gallery.CELL + 2)


@pytest.mark.parametrize("name", ["two\nlines", "tab\there", "bell\a", "odd \udc80 name", "\r\n"])
def test_a_class_name_with_a_line_break(name: str) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    page = gallery.draw([[(picture, name, ""), (picture, f"{name * 30} (0.91)", gallery.SAME)]], f"title {name}")
    assert (np.asarray(page) == (255, 0, 0)).all(axis=2).sum() == 2 * gallery.CELL**2


def test_nearest_first(run_folder: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(shards_dir))
    rows: list[list[tuple[Image.Image, str, str]]] = []
    real = gallery.draw

    def spy(given: list[list[tuple[Image.Image, str, str]]], title: str) -> Image.Image:
        rows.extend(given)
        return real(given, title)

    monkeypatch.setattr(gallery, "draw", spy)
    loaded = load_encoder(run_folder)
    path = gallery.make_gallery(
        loaded, source, tmp_path / "new" / "g.png", queries=4, neighbours=5, batch_size=20, progress=False
    )
    assert path.is_file()
    assert [len(row) for row in rows] == [6] * 4
    for row in rows:
        scores = [float(text.split()[1].strip("()")) for _, text, _ in row[1:]]
        assert scores == sorted(scores, reverse=True)
        own = row[0][0].tobytes()
        assert all(image.tobytes() != own for image, _, _ in row[1:]), "a query is not its own neighbour"
        for _, text, frame in row[1:]:
            assert frame == (gallery.SAME if text.split()[0] == row[0][1] else gallery.OTHER)


def unlabelled(image_folder: Path, tmp_path: Path) -> Source:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(image_folder.rglob("*.jpg"))[:12]):
        (flat / f"{i}.jpg").write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pipeline.make_shards", str(flat), str(tmp_path / "shards"), "--workers", "1"]
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=120, capture_output=True)
    return open_source(str(tmp_path / "shards"))


@pytest.mark.process
def test_without_labels_and_with_few_images(run_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    source = unlabelled(image_folder, tmp_path)
    path = gallery.make_gallery(
        load_encoder(run_folder), source, tmp_path / "g.png", queries=3, neighbours=50, images=7, progress=False
    )
    pixels = pixels_of(path)
    for frame in (gallery.SAME, gallery.OTHER):
        assert not (pixels == tuple(bytes.fromhex(frame[1:]))).all(axis=2).any()


def test_command(
    run_folder: Path,
    shards_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--run", run_folder, "--data", shards_dir, "--output", tmp_path / "g.png", "--queries", "2"]
    monkeypatch.setattr(sys, "argv", ["gallery", *map(str, flags)])
    gallery.main(arguments.gallery())
    assert capsys.readouterr().out.strip() == str(tmp_path / "g.png")
    assert pixels_of(tmp_path / "g.png").shape[1] > 300
    monkeypatch.setattr(sys, "argv", ["gallery", "--run", str(run_folder), "--data", str(tmp_path / "no")])
    with pytest.raises(FileNotFoundError, match="no"):
        gallery.main(arguments.gallery())
