"""The report card against scikit-learn used directly."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_folders import clusters, make_embedding
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from transfer import arguments as arguments_of
from transfer import probe, probing
from transfer.embedding import open_embedding
from transfer.subsets import share_of_each_class, shots


def test_knn_is_that_of_scikit_learn(tmp_path: Path) -> None:
    train = make_embedding(tmp_path / "train", *clusters(300, 0))
    val = make_embedding(tmp_path / "val", *clusters(200, 1))
    rows = probing.knn_rows(train, val, [1, 20, 1000], [0.07, 0.5])
    assert [(each["k"], each["temperature"]) for each in rows] == [(k, t) for k in (1, 20, 300) for t in (0.07, 0.5)]
    for each in rows:
        t = each["temperature"]
        # Cosine distance is 1 - similarity.
        theirs = KNeighborsClassifier(each["k"], metric="cosine", weights=lambda d, t=t: np.exp((1 - d) / t))
        theirs.fit(train.features, train.labels)
        assert each["mean"] == theirs.score(val.features, val.labels)
    assert 0.4 < rows[2]["mean"] < 0.99


def test_few_labels_are_the_same_for_everybody() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 2)[np.random.default_rng(0).permutation(82)]
    ten = share_of_each_class(labels, 0.1, seed=3)
    assert np.bincount(labels[ten]).tolist() == [5, 3, 1]
    assert np.bincount(labels[shots(labels, 4, seed=3)]).tolist() == [4, 4, 2]
    assert set(ten) <= set(share_of_each_class(labels, 0.5, seed=3))
    assert set(shots(labels, 1, seed=3)) <= set(shots(labels, 4, seed=3)) <= set(range(82))
    np.testing.assert_array_equal(ten, share_of_each_class(labels, 0.1, seed=3))
    assert not np.array_equal(ten, share_of_each_class(labels, 0.1, seed=4))
    np.testing.assert_array_equal(share_of_each_class(labels, 1, seed=3), np.arange(82))
    # A class's draw depends on nothing but its own images.
    others = np.where(labels == 2, 9, labels)
    assert set(ten[labels[ten] == 0]) == set(share_of_each_class(others, 0.1, seed=3)) & set(
        np.flatnonzero(labels == 0)
    )


def test_logistic_regression_is_that_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "CHUNK", 70)
    train = make_embedding(tmp_path / "train", *clusters(300, 0))
    val = make_embedding(tmp_path / "val", *clusters(200, 1))
    rows = probing.logistic_rows(train, val, shares=[1, 0.1], shots_of_class=[5], seeds=3)
    found = {each["setting"]: each for each in rows}
    assert list(found) == ["all labels", "10 % of the labels", "5-shot"]
    scaler = StandardScaler().fit(train.features)

    def score(chosen: np.ndarray) -> float:
        model = LogisticRegression(max_iter=1000).fit(scaler.transform(train.features[chosen]), train.labels[chosen])
        return float(model.score(scaler.transform(val.features), val.labels))

    assert found["all labels"]["mean"] == score(np.arange(300))
    assert (found["all labels"]["spread"], found["all labels"]["seeds"]) == (None, 1)
    scores = [score(shots(train.labels, 5, seed)) for seed in range(3)]
    assert found["5-shot"]["mean"] == pytest.approx(np.mean(scores))
    assert found["5-shot"]["spread"] == pytest.approx(np.std(scores, ddof=1))
    assert found["5-shot"]["images"] == 25
    assert found["5-shot"]["mean"] < found["all labels"]["mean"]


def test_a_fit_that_does_not_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "MOST_STEPS", 1)
    train = make_embedding(tmp_path / "train", *clusters(300, 0))
    probing.logistic_rows(train, train, shares=[1], shots_of_class=[])
    assert "1 fits stopped after 1 steps of the solver: all labels" in capsys.readouterr().err


def objects(n: int, seed: int, classes: int = 4, d: int = 16) -> tuple[np.ndarray, list[list[int]]]:
    """Each image has each of the classes with probability 0.3; its features are the sum of theirs and noise."""
    rng = np.random.default_rng(seed)
    has = rng.random((n, classes)) < 0.3
    centres = 2 * np.random.default_rng(99).normal(size=(classes, d))
    return has @ centres + rng.normal(size=(n, d)), [np.flatnonzero(each).tolist() for each in has]


def test_svm_on_lists_of_labels(tmp_path: Path) -> None:
    (x, lists), (x_val, lists_val) = objects(300, 0), objects(150, 1)
    train = make_embedding(tmp_path / "train", x, label_lists=lists)
    val = make_embedding(tmp_path / "val", x_val, label_lists=lists_val)
    found = {each["setting"]: each for each in probing.svm_rows(train, val, shots_of_class=[1, 10], seeds=3)}
    assert list(found) == ["all labels", "1-shot", "10-shot"]
    assert 0.3 < found["1-shot"]["mean"] < found["10-shot"]["mean"] < found["all labels"]["mean"] < 1
    assert found["1-shot"]["seeds"] == 3
    assert found["1-shot"]["spread"] > 0
    random = make_embedding(tmp_path / "random", np.random.default_rng(5).normal(size=(300, 16)), label_lists=lists)
    chance = np.mean([label in each for each in lists_val for label in range(4)])
    assert probing.svm_rows(random, val, shots_of_class=[], seeds=1)[0]["mean"] < chance + 0.2


def run_probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["probe", *map(str, arguments)])
    probe.main(arguments_of.probe())
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.slow
def test_table_picture_and_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, labels = clusters(300, 0)
    views = x[:, None] + 0.1 * np.random.default_rng(0).normal(size=(300, 4, 24))
    make_embedding(tmp_path / "train", x, labels, views=views)
    make_embedding(tmp_path / "val", *clusters(200, 1))
    pair = ["--train", tmp_path / "train", "--val", tmp_path / "val"]
    result = run_probe(monkeypatch, capsys, *pair, "--output", tmp_path / "out", "--shares", "[0.1]", "--shots", "[1]")
    assert result["knn_best"] > 0.4
    assert result["RankMe, train"] == pytest.approx(probe_rank(x), rel=1e-4)
    assert result["LiDAR, train"] > 1
    assert "LiDAR, val" not in result
    rows = json.loads((tmp_path / "out" / "probe.json").read_text())["rows"]
    assert {each["protocol"] for each in rows} == {"kNN", "logistic regression", "RankMe", "LiDAR"}
    with (tmp_path / "out" / "probe.csv").open(newline="") as lines:
        read = list(csv.DictReader(lines))
    assert [float(each["mean"]) for each in read] == [each["mean"] for each in rows]
    lines_of_table = (tmp_path / "out" / "probe.md").read_text().splitlines()[4:]
    assert len(lines_of_table) == len(rows)
    few = next(each for each in rows if each["setting"] == "1-shot")
    assert any(f"| {100 * few['mean']:.1f} ± {100 * few['spread']:.1f} % | 5 |" in line for line in lines_of_table)
    with Image.open(tmp_path / "out" / "probe.png") as picture:
        assert picture.size[0] > 1000


def probe_rank(x: np.ndarray) -> float:
    p = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = p / p.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def test_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val"):
        make_embedding(tmp_path / name, clusters(50, 0)[0])
    result = run_probe(monkeypatch, capsys, "--train", tmp_path / "train", "--val", tmp_path / "val")
    assert "knn_best" not in result
    assert result["RankMe, train"] == result["RankMe, val"]
    assert (tmp_path / "val" / "probe" / "probe.png").is_file()


def test_folders_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, labels = clusters(60, 0)
    train, other = make_embedding(tmp_path / "train", x, labels), make_embedding(tmp_path / "o", x, labels, encoder="x")
    with pytest.raises(ValueError, match="do not belong together, their encoder differ"):
        probe.check_pair(train, other)
    half = make_embedding(tmp_path / "half", x, np.where(np.arange(60) < 3, -1, labels))
    with pytest.raises(ValueError, match=r"3 of 60 images of the val folder .*half have no label"):
        probe.check_pair(train, half)
    unlabelled = make_embedding(tmp_path / "none", x)
    with pytest.raises(ValueError, match=r"60 of 60 images of the train folder .*none have no label"):
        probe.check_pair(unlabelled, train)
    capsys.readouterr()
    probe.check_pair(train, train)
    assert "train and val are the same images" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"nothing, given as a folder of features, is none; `python -m"):
        open_embedding(tmp_path / "nothing")
