"""How far a long job is, on standard error: a bar on a terminal, plain lines elsewhere.

The first line comes after a few seconds, the others ten seconds apart. `saying` is for work that has no parts to count.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

T = TypeVar("T")
FEW_SECONDS = 3.0  # that a person may see nothing for
LINE_EVERY = 10.0  # seconds
IGNORE_LOG_ERRORS = contextlib.suppress(OSError)  # a log on a full disk, a terminal that is gone: no reason to stop


class Progress:
    """Counts `unit`s up to `total` (None: unknown), beginning at `done`. Without a label it shows nothing.

    `note` is a short text that stands behind the figures; the caller sets it. `lines=False` leaves the plain lines to
    the caller, who asks `is_due()`. `bar_format` is tqdm's.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "images",
        done: int = 0,
        lines: bool = True,
        bar_format: str | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.done, self.note = label, total, unit, done, ""
        self.bar: Any = None
        self._first, self._lines = done, lines and bool(label)
        self._began = time.monotonic()
        self._said = self._began + FEW_SECONDS - LINE_EVERY
        self._last_line = ""
        # The first part may take long by itself.
        self._first_line = threading.Timer(FEW_SECONDS, self._print_first_line)
        self._first_line.daemon = True
        if label and sys.stderr.isatty():
            from tqdm import tqdm  # a terminal alone needs it

            shape: dict[str, Any] = {"bar_format": bar_format} if bar_format else {}
            self.bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True, **shape)
        elif self._lines:
            self._first_line.start()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            with IGNORE_LOG_ERRORS:
                if self.note:
                    self.bar.set_postfix_str(self.note, refresh=False)
                self.bar.update(count)
        elif self._lines and self.is_due():
            self._print_line()

    def is_due(self) -> bool:
        """True a few seconds after the beginning, and when ten seconds have passed since it last was."""
        now = time.monotonic()
        if now - self._said < LINE_EVERY:
            return False
        self._said = now
        return True

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        with IGNORE_LOG_ERRORS:
            if self.bar is not None:
                self.bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar; the plain lines get a last one when the job took long enough for any."""
        self._first_line.cancel()
        if self.bar is not None:
            with IGNORE_LOG_ERRORS:
                self.bar.close()
        elif self._lines and time.monotonic() - self._began >= FEW_SECONDS:
            self._print_line()

    def _print_first_line(self) -> None:
        self._said = time.monotonic()
        self._print_line()

    def _print_line(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = (self.done - self._first) / seconds
        of_total = "" if self.total is None else f" of {self.total:,}"
        line = f"{self.label}: {self.done:,}{of_total} {self.unit}"
        if speed:
            line += f", {speed:,.{0 if speed > 10 else 1}f} a second"
        if self.total is not None and speed and self.done < self.total:
            line += f", {duration((self.total - self.done) / speed)} left"
        line += f", {self.note}" if self.note else ""
        if line != self._last_line:
            self._last_line = line
            self.say(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._lines = self._lines and kind is None  # no last line for a job that failed
        self.close()


def track(things: Iterable[T], label: str, total: int | None = None, *, unit: str = "images") -> Iterator[T]:
    """Yields the things and counts those that the caller is done with."""
    with Progress(label, total, unit=unit) as progress:
        for thing in things:
            yield thing
            progress.advance()


def say_if_slow(what: str) -> threading.Timer:
    """Prints `what` in a few seconds, above any bar, unless the timer that it returns is cancelled before. Nothing when
    it is empty."""

    def say() -> None:
        with IGNORE_LOG_ERRORS:
            if sys.stderr.isatty() and "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(f"{what} ...", file=sys.stderr)
            else:
                print(f"{what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(FEW_SECONDS, say)
    timer.daemon = True
    if what:
        timer.start()
    return timer


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Prints `what` when the block takes more than a few seconds; nothing when it is empty."""
    timer = say_if_slow(what)
    try:
        yield
    finally:
        timer.cancel()


def duration(seconds: float) -> str:
    """3:05 min, 2 h 05 min, 1 d 4 h."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{s:02d} min"
