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


def test_what_is_known_of_a_killed_rank_has_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said last where it was up to a second before its end; the others were 24 steps on when they found out."""
    clock = [1000.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    dog = Watchdog(0, 1, 30.0)
    dog.ranks, dog.step, dog.name_of_phase = 2, 63, "queue"
    dog._seen = {0: (b"", 1000.0), 1: (b"", 1000.0)}
    others = {0: (900, 63, "queue", "here 7"), 1: (500, 39, "save", "there 8")}
    clock[0] += 1
    assert dog._describe(others, [1], "it hangs") == "rank 1 (there process 8) at step 39 in 'save': it hangs"
    clock[0] += 30
    assert dog._describe(others, [1], "no sign of life for 30 s") == (
        "rank 1 (there process 8), last heard of 31 s ago at step 39 in 'save': no sign of life for 30 s; "
        "this rank is at step 63 in 'queue'"
    )
