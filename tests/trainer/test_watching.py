"""The watchdog's arithmetic; its work among real ranks is in test_train_faults.py."""

import math

import pytest

from trainer import watching
from trainer.watching import PATIENT, Watchdog


def steps(dog: Watchdog, clock: list[float], count: int, seconds: float) -> None:
    for _ in range(count):
        dog.next_step(dog.step + 1)
        dog.phase("data")
        clock[0] += seconds


def test_knn_and_saving_do_not_count_as_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times the slowest step is waited for; after a kNN of ten minutes that must not be fifty."""
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    dog = Watchdog(0, 1, 30.0)
    assert dog.allowance() == PATIENT
    dog.phase("index")
    assert dog.allowance() == math.inf
    steps(dog, clock, 3, 2.0)
    for phase in ("save", "knn"):
        dog.phase(phase)
        assert dog.allowance() == PATIENT
        clock[0] += 600.0
    steps(dog, clock, 2, 2.0)
    assert dog.allowance() == 30.0
    steps(dog, clock, 2, 8.0)
    assert dog.allowance() == 40.0
