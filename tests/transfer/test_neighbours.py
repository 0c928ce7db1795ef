"""Neighbours, near-duplicates and the plane against brute force; the command on images with a known duplicate."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_folders import clusters, make_embedding
from PIL import Image
from sklearn.decomposition import PCA

from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options
from pipeline.sources.opening import open_source
from transfer import arguments, map_picture, neighbours, similar
from transfer.embedding import open_embedding
from transfer.features import embed_source
from transfer.load import ALONE, load_encoder


def unit(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)


def test_neighbours_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "CHUNK", 70)
    monkeypatch.setitem(sys.modules, "faiss", None)
    x, q = clusters(300, 0)[0], clusters(9, 1)[0]
    similarities, rows = similar.search(x, torch.from_numpy(q), 12)
    products = unit(q) @ unit(x).T
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1)[:, :12])
    np.testing.assert_allclose(similarities, -np.sort(-products, axis=1)[:, :12], atol=1e-6)
    assert similar.search(x[:5], torch.from_numpy(q), 12)[1].shape == (9, 5)


def test_faiss_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    x, q = clusters(300, 0)[0], torch.from_numpy(clusters(9, 1)[0])
    by_faiss = similar.search(x, q, 12)
    monkeypatch.setitem(sys.modules, "faiss", None)
    ours = similar.search(x, q, 12)
    np.testing.assert_array_equal(by_faiss[1], ours[1])
    torch.testing.assert_close(by_faiss[0], ours[0])


@pytest.mark.parametrize("above", [0.4, -0.02])
def test_near_duplicates_are_all_pairs(above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "CHUNK", 37)
    x, y = clusters(150, 0)[0], clusters(90, 1)[0]
    within, between = unit(x) @ unit(x).T, unit(x) @ unit(y).T
    found = similar.near_duplicates(x, None, above)
    expected = {(i, j) for i, j in np.argwhere(within >= above).tolist() if i < j}
    assert set(zip(found.first.tolist(), found.second.tolist())) == expected
    assert found.found == len(expected) == len(found.first) > 50
    np.testing.assert_allclose(found.similarities, within[found.first, found.second], atol=1e-6)
    assert (np.diff(found.similarities) <= 0).all()
    found = similar.near_duplicates(x, y, above)
    assert set(zip(found.first.tolist(), found.second.tolist())) == set(map(tuple, np.argwhere(between >= above)))


def test_of_many_pairs_the_most_similar_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters(150, 0)[0]
    everything = similar.near_duplicates(x, None, 0.2)
    monkeypatch.setattr(similar, "CHUNK", 20)
    monkeypatch.setattr(similar, "MOST_PAIRS", 30)
    few = similar.near_duplicates(x, None, 0.2)
    assert few.found == everything.found > 500
    np.testing.assert_array_equal(few.first, everything.first[:30])
    np.testing.assert_array_equal(few.second, everything.second[:30])


def test_the_plane_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "CHUNK", 70)
    x = clusters(300, 0)[0]
    positions, shares = similar.principal_plane(x)
    pca = PCA(2).fit(unit(x))
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_allclose(np.abs(positions), np.abs(pca.transform(unit(x))), atol=1e-5)


def test_the_map_has_the_point_nearest_to_each_centre() -> None:
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0.999, 0.999]], np.float32)
    cells = map_picture.one_of_each_cell(corners)
    right, bottom = map_picture.CELLS_X - 1, map_picture.CELLS_Y - 1
    assert {cell: i for cell, i in cells.items() if i < 3} == {(0, bottom): 0, (0, 0): 1, (right, bottom): 2}
    assert cells[right, 0] in (3, 4)
    assert len(cells) == 4
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    page = map_picture.draw_map(
        corners[:3], lambda i: Image.new("RGB", (60, 60), colours[i]), np.array([0, 1, -1]), str, "title"
    )
    middle = map_picture.CELL // 2
    seen = [
        page.getpixel((8 + column * map_picture.CELL + middle, map_picture.TOP + line * map_picture.CELL + middle))
        for column, line in ((0, bottom), (0, 0), (right, bottom))
    ]
    assert seen == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["neighbours", *map(str, given)])
    neighbours.main(arguments.neighbours())
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.slow
def test_a_training_image_in_val_is_found(
    run_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = sorted(image_folder.rglob("*.jpg"))
    trained, held_out = files[:30], [*files[30:40], files[7]]
    for name, chosen in (("train", trained), ("val", held_out)):
        for i, file in enumerate(chosen):
            (tmp_path / name / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / name / file.parent.name / f"{i}.jpg")
        make_shards(str(tmp_path / name), str(tmp_path / f"{name}_shards"), options=Options())
        place = str(tmp_path / f"{name}_shards")
        notes = {"run": str(run_folder), "step": 7, "data": place, "untrained": False}
        embed_source(
            load_encoder(run_folder),
            open_source(place),
            tmp_path / f"{name}_f",
            notes=notes,
            num_threads=1,
            ranks=ALONE,
        )
    train = tmp_path / "train_f"
    query = tmp_path / "query.png"  # a format of its own, the pixels of a training image
    Image.open(trained[7]).save(query)
    result = run(
        monkeypatch, capsys, "--features", train, "--val", tmp_path / "val_f", "--duplicates_above", 0.99999,
        "--images", query, held_out[0], "--rows", 3, "--neighbours", 4,
    )  # fmt: skip
    assert result["duplicates"] == 1
    with (train / "neighbours" / "duplicates.csv").open(newline="") as lines:
        pair = next(csv.DictReader(lines))
    assert (pair["key"].partition("-")[2], pair["other_key"].partition("-")[2]) == ("7", "10")
    assert pair["label"] == trained[7].parent.name
    near = result["neighbours"]
    assert near == json.loads((train / "neighbours" / "neighbours.json").read_text())
    first = near[str(query)][0]
    assert first["key"].partition("-")[2] == "7"
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert [len(each) for each in near.values()] == [4, 4, 4]
    row_3 = next(each for name, each in near.items() if name.startswith("row 3"))
    assert 3 not in [each["row"] for each in row_3]
    for name in ("neighbours.png", "duplicates.png", "map.png"):
        with Image.open(train / "neighbours" / name) as page:
            assert page.size[0] > 200, name

    with pytest.raises(ValueError, match=r"--rows 30: .*train_f has the rows 0 to 29"):
        run(monkeypatch, capsys, "--features", train, "--rows", 30)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be decoded"):
        run(monkeypatch, capsys, "--features", train, "--images", tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="is not the encoder of these features, which was"):
        about = json.loads((train / "embedding.json").read_text())
        (train / "embedding.json").write_text(json.dumps(about | {"untrained": True}))
        run(monkeypatch, capsys, "--features", train, "--images", query)
    shutil.rmtree(tmp_path / "train_shards")
    assert not run(monkeypatch, capsys, "--features", train, "--output", tmp_path / "o", "--rows", 3)["pictures"]
    assert not (tmp_path / "o" / "map.png").exists()


def test_folders_of_different_encoders_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, encoder in (("a", "e"), ("b", "other")):
        make_embedding(tmp_path / name, clusters(30, 0)[0], encoder=encoder, data=str(tmp_path / "gone"), classes=[])
    assert len(open_embedding(tmp_path / "a").features) == 30
    pair = ["--features", tmp_path / "a", "--val", tmp_path / "b"]
    with pytest.raises(ValueError, match="differ in encoder: embed both alike"):
        run(monkeypatch, capsys, *pair, "--duplicates_above", 0.9)
