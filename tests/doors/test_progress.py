"""Progress: a bar on a terminal, a line every ten seconds elsewhere, nothing without a label."""

import io
import sys
import time

import pytest

from pipeline import progress
from pipeline.progress import Progress, duration, saying, track


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """After three seconds, then ten seconds apart, with the speed of this run alone, a note, and a last line."""
    with Progress("packing", 5_000, done=2_000) as shown:
        for _ in range(25):
            clock.now += 1
            shown.note = "3.0 MB/s"
            shown.advance(100)
        shown.advance(500)
    assert capsys.readouterr().err.splitlines() == [
        "packing: 2,300 of 5,000 images, 100 a second, 0:27 min left, 3.0 MB/s",
        "packing: 3,300 of 5,000 images, 100 a second, 0:17 min left, 3.0 MB/s",
        "packing: 4,300 of 5,000 images, 100 a second, 0:07 min left, 3.0 MB/s",
        "packing: 5,000 of 5,000 images, 120 a second, 3.0 MB/s",
    ]


def test_nothing_of_what_is_quick_fails_or_has_no_label(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for label, seconds in (("quick", 0.5), ("", 100.0)):
        for _ in track(range(5), label, 5):
            clock.now += seconds
    with pytest.raises(ValueError), Progress("failed") as shown:
        shown.advance()
        clock.now += 60
        raise ValueError
    assert capsys.readouterr().err == ""


def test_an_unknown_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(iter("abc"), "listing", unit="names"):
        clock.now += 8
    assert capsys.readouterr().err.splitlines() == [
        "listing: 1 names, 0.1 a second",
        "listing: 3 names, 0.1 a second",
    ]


def test_own_lines_are_due_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", lines=False) as shown:
        due = []
        for _ in range(30):
            clock.now += 1
            shown.advance()
            due.append(shown.is_due())
        shown.say("a line")
    assert [i for i, is_due in enumerate(due) if is_due] == [2, 12, 22]
    assert capsys.readouterr().err == "a line\n"


def test_a_long_first_part_is_no_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "FEW_SECONDS", 0.05)
    said = ""
    with Progress("packing", 5_000), saying("compiling"), saying(""), saying("quick") as _:
        for _ in range(200):
            time.sleep(0.02)
            if (said := said + capsys.readouterr().err).count("\n") == 3:
                break
    assert sorted(said.splitlines()) == ["compiling ...", "packing: 0 of 5,000 images", "quick ..."]
    monkeypatch.setattr(progress, "FEW_SECONDS", 0.5)  # more than a busy machine takes for nothing
    with Progress("packing", 5_000), saying("compiling"):
        pass
    time.sleep(0.7)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("packing", 50, done=10) as shown:
        shown.note = "3.0 MB/s"
        shown.advance(40)
        shown.say("a line above")
    shown_text = terminal.getvalue()
    assert "packing: 100%" in shown_text and "50/50" in shown_text and "3.0 MB/s" in shown_text
    assert "a line above\n" in shown_text
    with Progress("") as silent:
        silent.advance()
    assert silent.bar is None and terminal.getvalue() == shown_text


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with Progress("packing", 10) as shown:
        clock.now += 20
        shown.advance(10)
        shown.say("unheard")


def test_durations() -> None:
    assert [duration(s) for s in (5, 185, 7500, 100_000)] == ["0:05 min", "3:05 min", "2 h 05 min", "1 d 3 h"]
