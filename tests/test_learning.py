"""benchmarks/learning.py's own pieces: its plain loop is the same training as ours on the same numbers, its transforms
are our recipe, and its statistics are SciPy's."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from scipy import stats

pytest.importorskip("timm")
sys.path.insert(0, str(REPOSITORY))
from benchmarks import learning, plain_moco, seeds
from model.batchnorm import draw_permutation, split_batchnorm
from model.encoders import build_encoder
from model.moco import MoCo
from pipeline.pixels.view_recipe import CIFAR, view_recipe
from trainer.schedule import learning_rate


@pytest.mark.slow
def test_the_plain_loop_makes_our_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, queue, batches and shuffles: the losses of five steps, and the statistics after them."""
    steps, size, K, lr = 5, 16, 24, 0.06  # 24: the queue wraps in the midst of a batch
    torch.manual_seed(0)
    theirs = plain_moco.Encoder("test_resnet", 4)
    torch.manual_seed(0)
    ours = build_encoder("timm:test_resnet", image_size=32)
    same = [torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters())]
    assert all(same)  # runs of one seed begin alike, so that they are pairs
    split_batchnorm(ours, 4)
    batches = [(torch.randn(size, 3, 32, 32), torch.randn(size, 3, 32, 32)) for _ in range(steps)]

    moco = MoCo(ours, dim=plain_moco.DIM, queue_size=K, temperature=0.1, bn_groups=4, seed=3)
    torch.manual_seed(1)
    moco.queue.copy_(F.normalize(torch.randn(plain_moco.DIM, K), dim=0))
    sgd = torch.optim.SGD(ours.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    expected = []
    for step, (query, key) in enumerate(batches):
        schedule: dict[str, Any] = {"schedule": "cosine_from_1", "steps_per_epoch": 1, "epochs": steps}
        sgd.param_groups[0]["lr"] = learning_rate(step, lr=lr, **schedule)
        keys = moco.encode_keys(moco.shuffle(key))
        loss, _ = moco.loss(ours(query), keys)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        moco.momentum_update(ours, 0.99)
        moco.enqueue(keys)
        expected.append(loss.item())

    count = itertools.count(1)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(draw_permutation(n, 3, next(count))))
    found: list[float] = []
    torch.manual_seed(1)
    plain_moco.train(
        theirs, lambda epoch: [batches[epoch]], epochs=steps, lr=lr, K=K, after=lambda n, loss, net: found.append(loss)
    )
    assert found == pytest.approx(expected, rel=2e-4)
    for name, tensor in ours.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(theirs.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_plain_transforms_are_the_recipe_of_ours() -> None:
    ours = view_recipe("cifar", crop_min=0.08)
    crop, flip, jitter, grey, _, normalise = plain_moco.transform().transforms  # type: ignore[attr-defined]
    assert (tuple(crop.scale), tuple(crop.ratio), crop.size) == (ours.crop_scale, ours.crop_ratio, (32, 32))
    assert (flip.p, jitter.p, grey.p) == (ours.flip, ours.jitter, ours.grey)
    colours = jitter.transforms[0]
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(ours, name)
        assert getattr(colours, name) == pytest.approx((1 - strength, 1 + strength))
    assert colours.hue == pytest.approx((-ours.hue, ours.hue))
    assert (normalise.mean, normalise.std) == ours.mean_std == CIFAR
    assert (ours.blur, ours.solarise, ours.grey_first) == (0, 0, False)


def test_welch_and_permutations_against_scipy() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(6.2, 0.05, 5), draw.normal(6.25, 0.1, 6)
    found = seeds.welch(a, b)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert (found["difference"] - found["half_width"], found["difference"] + found["half_width"]) == pytest.approx(
        (low, high)
    )
    exact = stats.permutation_test(
        (a, b),
        lambda x, y, axis: abs(stats.ttest_ind(x, y, equal_var=False, axis=axis).statistic),
        alternative="greater",
        vectorized=True,
    )
    assert seeds.permutation_p(a[:, None], b[:, None]) == pytest.approx(exact.pvalue)


def test_pairs_against_scipy() -> None:
    a = np.array([6.70, 6.79, 6.59, 6.66])
    b = a - [0.06, 0.03, -0.02, 0.05]
    found = seeds.paired(a, b)
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert (found["difference"] - found["half_width"], found["difference"] + found["half_width"]) == pytest.approx(
        (interval.low, interval.high)
    )
    assert found["flips_p"] == pytest.approx(4 / 16)  # none flipped, the third flipped, and both the other way round
    with pytest.raises(ValueError, match="equally far apart"):
        seeds.paired(np.array([1.0, 2.0]), np.array([0.0, 1.0]))


def test_the_permutations_of_curves() -> None:
    low, high = np.array([[1.0, 5], [2, 6], [3, 4]]), np.array([[11.0, 5], [12, 4], [13, 6]])
    assert seeds.permutation_p(low, high) == pytest.approx(2 / 20)  # the true deal and its mirror image
    assert seeds.permutation_p(low[:, 1:], high[:, 1:]) == 1.0
    many = np.random.default_rng(1).normal(size=(40, 3))
    assert 0.01 < seeds.permutation_p(many[:20], many[20:]) <= 1  # drawn deals: there are 10^11
    with pytest.raises(ValueError, match="all alike"):
        seeds.welch(np.ones(3), np.ones(3))


def test_how_often_chance_makes_a_difference() -> None:
    """By the spread of many runs, half of the pairs of threes lie further apart than two thirds of a standard error."""
    runs = np.random.default_rng(2).normal(0, 0.05, 2000)
    assert seeds.by_chance(runs[:1000], runs[1000:], runs=3, apart=0.6745 * 0.05 * (2 / 3) ** 0.5) == pytest.approx(
        0.5, abs=0.03
    )


def test_equally_many_pictures_of_each_class(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "all" / name / f"{i}.png").write_bytes(b"")
    learning.pick(tmp_path / "all", tmp_path / "some", 8)
    assert sorted(path.name for path in (tmp_path / "some" / "a").iterdir()) == ["0.png", "2.png", "5.png", "7.png"]
    assert len(list((tmp_path / "some" / "b").iterdir())) == 4
    with pytest.raises(ValueError, match="has 10: change --images"):
        learning.pick(tmp_path / "all", tmp_path / "more", 22)


def test_a_finished_run_is_kept_and_a_stopped_one_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def train(*command: Any, log: Path) -> None:
        folder = Path(next(word for word in command if str(word).startswith("--out="))[len("--out=") :])
        folder.mkdir(parents=True, exist_ok=True)
        rows = ['{"step": 10, "loss": 6.5}\n', '{"step": 20, "loss": 6.25, "knn": 0.5}\n']
        (folder / "metrics.jsonl").write_text("".join(rows))
        calls.append(str(command[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "run", train)
    flags = {"images": 100, "batch_size": 10, "epochs": 2, "knn_every": 2, "seeds": 2, "sides": ["ours", "plain"]}
    args = argparse.Namespace(**flags, work=tmp_path, arch="test_resnet", bn_groups=4, queue_size=8, lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        learning.trainings(args)
    done = learning.trainings(args)
    assert calls == [
        "train.py", "benchmarks/plain_moco.py", "benchmarks/plain_moco.py", "benchmarks/plain_moco.py", "train.py",
    ]  # fmt: skip
    assert [(one["side"], one["seed"]) for one in done] == [("ours", 0), ("plain", 0), ("plain", 1), ("ours", 1)]
    assert (done[0]["loss"], done[0]["knn"]) == ([6.5, 6.25], {"2": 0.5})


def test_the_report_of_some_runs(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    runs = [
        {"side": side, "seed": seed, "loss": list(draw.normal(6, 0.1, 3)), "knn": {"3": 0.3 + 0.01 * draw.random()},
         "cpu_seconds": 80.0, "seconds": 90.0, "load": 2.0}
        for side in ("ours", "plain", "plain on ours") for seed in range(3)
    ]  # fmt: skip
    there = [one for one in runs if (one["side"], one["seed"]) != ("plain on ours", 1)]  # that run is yet to come
    result = {"about": {"command": "python", "where": "here", "what": "this"}, **learning.summary(there)}
    assert [pair["sides"] for pair in result["comparisons"]] == [
        ["ours", "plain"], ["ours", "plain on ours"], ["plain on ours", "plain"],
    ]  # fmt: skip
    knn = {(str(one["side"]), one["seed"]): 100 * one["knn"]["3"] for one in there}  # type: ignore[index]
    apart = [knn["ours", seed] - knn["plain on ours", seed] for seed in (0, 2)]
    found = result["comparisons"][1]["knn"]["paired"]
    assert (found["pairs"], found["difference"]) == (2, pytest.approx(np.mean(apart)))  # runs of one seed
    text = learning.table(result)
    assert "ours less plain on ours" in text and "by chance" in text
    learning.draw(runs, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
