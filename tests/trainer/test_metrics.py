"""Means over a window of steps and over the ranks; the first loss that is not finite is found."""

import math

import pytest
import torch

from trainer.metrics import Window, norm


def test_a_window_averages_over_steps_and_ranks_and_finds_the_first_bad_loss() -> None:
    window = Window(torch.device("cpu"))
    for step in range(3):
        window.add(step, [torch.tensor([float(step), 0.5, 0.2, 0.1])], torch.arange(4) + 10 * step)
    other = torch.tensor([[2.0, 0.5, 0.2, 0.1], [4.0, 0.5, 0.2, 0.1], [6.0, 0.5, 0.2, 0.1]])
    assert window.settle(lambda mine: torch.cat([mine, other[None]])) is None
    means = window.means(256, temperature=0.1)
    assert means["loss"] == pytest.approx((0 + 1 + 2 + 2 + 4 + 6) / 6)
    assert means["positive_logit"] == pytest.approx(2.0)
    assert window.means(256, temperature=0.1) == {}

    window.settled = [[2.0, 0.5, 0.2, 0.1]]  # of a checkpoint; the one step since then was skipped
    with window.waiting():
        pass
    assert window.means(256, temperature=0.1)["images_per_second"] > 0

    for step, loss in ((7, 1.0), (8, math.nan)):
        window.add(step, [torch.tensor([loss, 0.0, 0.0, 0.0])], torch.arange(4) + 10 * step)
    other = torch.tensor([[math.inf, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert window.settle(lambda mine: torch.cat([mine, other[None]])) == (7, 1, math.inf)
    assert window.sample_ids(8) == [80, 81, 82, 83]


def test_one_slow_window_is_no_usual_wait() -> None:
    window = Window(torch.device("cpu"))
    window.waits_before.extend([0.9] * 2)
    assert window.usual_wait() == 0
    window.waits_before.extend([0.02] * 7 + [0.9])
    assert window.usual_wait() == 0.02


def test_norm_is_that_of_all_as_one_vector() -> None:
    assert norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)
