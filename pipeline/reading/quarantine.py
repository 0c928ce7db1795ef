"""The file that remembers bad samples."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path


class Quarantine:
    """`quarantine.jsonl`: a line for each bad sample, once, however many ranks, epochs and restarts meet it.

    Each line is {"source", "shard", "key", "sample_id", "reason"}. Writers hold a lock on the file and first read what
    others have added; `reasons` maps the known sample ids to why. With `path` None it is kept in memory only.
    ValueError for a file that is not of this program, which is left as it is.
    """

    def __init__(self, path: str | Path | None, is_ours: Callable[[dict[str, object]], bool]) -> None:
        self.path = Path(path) if path is not None else None
        self.reasons: dict[int, str] = {}
        self._is_ours = is_ours
        self._read_to = 0
        if self.path is not None and self.path.exists():
            with self.path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file.fileno())

    def add(self, line: dict[str, object]) -> None:
        sample_id = int(str(line["sample_id"]))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._catch_up(descriptor)
                if sample_id not in self.reasons:
                    os.pwrite(descriptor, (json.dumps(line) + "\n").encode(), self._read_to)
                    self._catch_up(descriptor)
            finally:
                os.close(descriptor)
        self.reasons.setdefault(sample_id, str(line["reason"]))

    def _catch_up(self, descriptor: int) -> None:
        """Reads the lines that were added since; cuts off half a line that a killed writer left."""
        size = os.fstat(descriptor).st_size
        content = os.pread(descriptor, size - self._read_to, self._read_to) if size > self._read_to else b""
        whole = content.rfind(b"\n") + 1
        half = content[whole:]
        if not half.startswith(b'{"'[: len(half)]) or _is_json(half):  # a whole line without its end is not ours
            raise ValueError(self._foreign())
        for text in content[:whole].splitlines():
            try:
                line = json.loads(text)
                if self._is_ours(line):
                    self.reasons.setdefault(int(line["sample_id"]), str(line["reason"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(self._foreign()) from None
        if half:
            os.ftruncate(descriptor, self._read_to + whole)
        self._read_to += whole

    def _foreign(self) -> str:
        return f"{self.path} is not a list of bad samples as this program writes them: move it away, or name another"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
