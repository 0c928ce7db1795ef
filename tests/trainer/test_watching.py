"""The watchdog's arithmetic, and which signals are heard; its work among real ranks is in test_train_faults.py."""

import ctypes
import math
import os
import signal
from collections.abc import Iterator

import pytest

from trainer import watching
from trainer.watching import PATIENT, Stop, Watchdog, die_with_launcher


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


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.asked()


def test_the_end_of_a_shell_is_not_the_end_of_the_run() -> None:
    """Only `accelerate launch` takes its child with it; pytest and the shells before it are other parents."""
    die_with_launcher()
    number = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    assert number.value == 0
