"""Every command ends alike: one line on standard error, and an exit code that says who has to do something."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent


pytestmark = pytest.mark.process


def end(body: str, *, shell: str = "{}", **more: object) -> subprocess.CompletedProcess[str]:
    """Runs a command whose main has this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script = f"import errno, os, sys\nfrom pipeline.command import command\ndef main():\n{lines}\n"
    script += f"command(main{''.join(f', {name}={value}' for name, value in more.items())})\n"
    line = shell.format(f'{sys.executable} -c "$SCRIPT"')
    environment = {**os.environ, "SCRIPT": script, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("print(os.fsdecode(b'caf\\xe9'))", 0, ""),
        ("raise ValueError('lr 0:\\n  it must be above 0')", 2, "error: lr 0:   it must be above 0\n"),
        ("open('/nowhere/x')", 2, "error: [Errno 2] No such file or directory: '/nowhere/x'\n"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/full/x')",
            2,
            "error: [Errno 28] No space left on device: '/full/x': make room, then run the same command again\n",
        ),
        ("raise MemoryError", 2, "error: out of memory: MemoryError\n"),
        (
            "class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('tried 2 GiB')",
            2,
            "error: out of memory: tried 2 GiB\n",
        ),
        ("os.kill(os.getpid(), 2)\nimport time\ntime.sleep(60)", 130, "interrupted\n"),
    ],
)
def test_one_line_and_a_code(body: str, code: int, said: str) -> None:
    result = end(body)
    assert (result.returncode, result.stderr) == (code, said)


def test_a_command_that_resumes_says_so() -> None:
    goes_on = "the same command goes on where this one stopped"
    assert end("raise KeyboardInterrupt", resumes=True).stderr == f"interrupted: {goes_on}\n"
    assert f"/x': make room, then {goes_on}\n" in end("raise OSError(errno.EDQUOT, 'y', '/x')", resumes=True).stderr


def test_our_own_mistake_shows_where_it_is() -> None:
    result = end("{}['missing']")
    assert result.returncode == 1 and "Traceback" in result.stderr and "KeyError: 'missing'" in result.stderr


def test_control_c_does_not_wait_for_threads() -> None:
    began = time.monotonic()
    body = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nos.kill(os.getpid(), 2)"
    result = end(f"print('so far')\n{body}\ntime.sleep(60)")
    assert (result.returncode, result.stdout) == (130, "so far\n") and time.monotonic() - began < 20


def test_a_reader_that_has_seen_enough() -> None:
    result = end("for i in range(100_000): print(i)", shell="{} | head -1; echo ${{PIPESTATUS[0]}}")
    assert result.stdout == f"0\n{128 + signal.SIGPIPE}\n" and result.stderr == ""


def test_another_broken_pipe_is_an_error() -> None:
    result = end("raise BrokenPipeError(errno.EPIPE, 'Broken pipe')")
    assert (result.returncode, result.stderr) == (2, "error: [Errno 32] Broken pipe\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_to_a_full_disk() -> None:
    result = end("print('result')", shell="{} > /dev/full")
    assert result.returncode == 2 and re.fullmatch(r"error: \[Errno 28\] .*make room.*\n", result.stderr), result.stderr
