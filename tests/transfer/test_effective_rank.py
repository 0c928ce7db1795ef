"""RankMe and LiDAR against their papers' formulas, and on cases whose answer is known."""

import numpy as np
import pytest
import torch

from transfer import effective_rank
from transfer.effective_rank import SecondMoment, lidar, rankme


def rankme_by_svd(z: np.ndarray) -> float:
    """Garrido et al. 2023, equations 1 and 2, word by word."""
    sigma = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def lidar_by_roots(views: np.ndarray) -> float:
    """Thilak et al. 2024, word by word, with matrix roots and loops."""
    n, q, d = views.shape
    overall = views.reshape(-1, d).mean(axis=0)
    between, within = np.zeros((d, d)), np.zeros((d, d))
    for image in views:
        mean = image.mean(axis=0)
        between += np.outer(mean - overall, mean - overall) / n
        for view in image:
            within += np.outer(view - mean, view - mean) / (n * q)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.abs(np.linalg.eigvalsh(root @ between @ root))
    p = spectrum / spectrum.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(("n", "d"), [(300, 40), (25, 40), (1, 6)])
def test_rankme_is_the_papers(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effective_rank, "CHUNK_FLOATS", 500)
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(n, d)) * np.geomspace(1, 1e-4, d) + 3).astype(np.float32)
    assert rankme(z) == pytest.approx(rankme_by_svd(z), rel=1e-5)
    moment = SecondMoment()
    with torch.autocast("cpu", torch.bfloat16):
        for batch in torch.from_numpy(z).split(7):
            moment.add(batch)
    assert moment.rankme() == pytest.approx(rankme_by_svd(z), rel=1e-5)
    moment.add(torch.full((1, d), torch.inf))
    assert np.isnan(moment.rankme())


def test_rankme_of_known_cases() -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(32, 32)))[0]
    for rank in (1, 5, 32):
        z = (np.eye(32)[np.arange(640) % rank] @ rotation).astype(np.float32)  # `rank` directions, equally often
        assert rankme(z) == pytest.approx(rank, rel=1e-3)
    unequal = np.diag([3.0, 1.0]).astype(np.float32)
    assert rankme(unequal) == pytest.approx(4 / 27**0.25, rel=1e-5)  # exp(H(3/4, 1/4))
    assert rankme(np.zeros((5, 3), np.float32)) == 0


def test_lidar_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effective_rank, "CHUNK_FLOATS", 500)
    rng = np.random.default_rng(2)
    scale = np.geomspace(1, 0.01, 12)
    views = (5 + scale * rng.normal(size=(50, 1, 12)) + 0.3 * rng.normal(size=(50, 6, 12))).astype(np.float32)
    assert lidar(views) == pytest.approx(lidar_by_roots(views), rel=1e-4)


def test_lidar_of_known_cases() -> None:
    d, tells_apart = 10, 4
    means = np.concatenate([np.eye(d)[:tells_apart], -np.eye(d)[:tells_apart]])  # images differ in four directions
    noise = 0.5 * np.concatenate([np.eye(d), -np.eye(d)])  # augmentation moves them in all ten alike
    views = (means[:, None] + noise).astype(np.float32)
    assert lidar(views) == pytest.approx(tells_apart, rel=1e-3)
    # RankMe counts the six others too: second moments 1/4 + 1/40 and 1/40.
    p = np.sqrt([0.275] * 4 + [0.025] * 6) / np.sqrt([0.275] * 4 + [0.025] * 6).sum()
    assert rankme(views.reshape(-1, d)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    with pytest.raises(ValueError, match="two images with two views each at least, these are 8 with 1"):
        lidar(views[:, :1])
