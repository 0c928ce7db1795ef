"""Which signals a run hears."""

import os
import signal
from collections.abc import Iterator

import pytest

from trainer.signals import Stop


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
