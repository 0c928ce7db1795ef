"""Common to all commands: how each one ends, and the flags of the cache for remote shards.

A command ends with 0 after success alone, otherwise with one line on standard error that says what to do:

if __name__ == "__main__":
    command(main)
"""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypedDict

from pipeline.files import DISK_FULL

LARGEST_CACHE_GB = 1 << 30
SAME_COMMAND = "the same command goes on where this one stopped"


def command(main: Callable[[], int | None], *, resumes: bool = False) -> NoReturn:
    """Runs `main` and ends the process with the code that it returns (None: 0).

    Exit code 2 and one line for what the user can change: ValueError, OSError, no memory. 130 and one line for Ctrl-C,
    without waiting for threads and workers. 141, silently, when the reader of standard output has gone (`| head`). Any
    other exception is a mistake of this program: traceback, exit code 1. `resumes`: the same command goes on where an
    earlier one stopped, which the line then says.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = main() or 0
        sys.stdout.flush()  # here, where a full disk behind `> file` can still be reported
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say(f"interrupted: {SAME_COMMAND}" if resumes else "interrupted")
        _flush_or_drop()
        os._exit(130)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            code = 128 + signal.SIGPIPE
        else:
            code = 2
            _say(f"error: {explain(error, resumes=resumes)}")
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        code = 2
        _say(f"error: out of memory: {explain(error)}")
    _flush_or_drop()
    sys.exit(code)


class CacheArguments(TypedDict, total=False):
    """Those of `open_source`, which hands them on with the source."""

    cache_dir: str
    cache_bytes: int


def add_cache_flags(parser: Any) -> None:
    """`--cache_dir` and `--cache_gb`, for every command that reads a source; argparse's parser or jsonargparse's."""
    place = "folder of the disk cache for remote shards (default: ~/.cache/moco-pipeline)"
    parser.add_argument("--cache_dir", type=str, default=None, help=place)
    parser.add_argument(
        "--cache_gb", type=float, default=None, help="size of the disk cache for remote shards, in GiB (default: 50)"
    )


def cache_arguments(options: Any) -> CacheArguments:
    """The values of these two flags, or of the recipe's fields with their names; those left open are left out.
    ValueError for an impossible size."""
    given = CacheArguments()
    if options.cache_dir:
        given["cache_dir"] = options.cache_dir
    if options.cache_gb is not None:
        if not 0 <= options.cache_gb < LARGEST_CACHE_GB:
            raise ValueError(f"--cache_gb {options.cache_gb} must be a number of GiB from 0 to {LARGEST_CACHE_GB:,}")
        given["cache_bytes"] = int(options.cache_gb * 2**30)
    return given


def explain(error: BaseException, *, resumes: bool = False) -> str:
    """The error on one line, with the remedy when a disk is full."""
    text = " ".join(str(error).splitlines()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        text += f": make room, then {SAME_COMMAND if resumes else 'run the same command again'}"
    return text


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(line, file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush_or_drop() -> None:
    """Python flushes standard output once more when it ends, and a second failure there would change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
