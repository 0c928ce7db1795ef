"""Warnings that explain: silent about a healthy or young run, each trouble named with its cause."""

import math

import pytest

from trainer.diagnosis import warnings_before, warnings_during

CHANCE = math.log(65537)
HEALTHY = {"step": 5000, "loss": 6.9, "accuracy": 0.6, "lr": 0.03}


def during(usual_wait: float = 0.02, **changes: float) -> dict[str, str]:
    return warnings_during(HEALTHY | changes, 65536, 256, usual_wait, "read", {"read": 4.0, "graph": 1.0})


def test_a_healthy_run_is_not_warned_about() -> None:
    assert during() == {}  # 6.9 against a floor of 6.2 and a chance of 11.09 is how MoCo v2 looks
    assert warnings_before("moco", 1_281_167, 256, 65536, 0.03, 0) == {}


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"loss": CHANCE}, "chance", "ln(queue_size + 1) = 11.09"),
        ({"accuracy": 0.999}, "shortcut", "shuffle_bn false"),
        (
            {"usual_wait": 0.25},
            "data",
            "25% of the time is spent waiting for data; the slowest stage is read (read 4000 ms",
        ),
    ],
)
def test_each_trouble_is_explained(changes: dict[str, float], kind: str, says: str) -> None:
    found = during(**changes)
    assert list(found) == [kind]
    assert says in found[kind]


def test_a_young_queue_may_look_like_that() -> None:
    assert during(step=500, loss=CHANCE, accuracy=1.0) == {}
    assert during(step=20, usual_wait=0.9) == {}


def test_numbers_that_are_known_to_fail_are_said_before() -> None:
    assert (
        "queue_size 65536 is 512% of the 12800 images" in warnings_before("moco", 12800, 256, 65536, 0.03, 0)["queue"]
    )
    assert "warmup_epochs 10" in warnings_before("moco", 10**7, 4096, 65536, 0.48, 0)["batch"]
    assert warnings_before("moco", 10**7, 4096, 65536, 0.48, 10) == {}
    for mechanism in ("memory_bank", "end_to_end"):  # no image's own entry is among its negatives there
        assert warnings_before(mechanism, 12800, 256, 65536, 0.03, 0) == {}
