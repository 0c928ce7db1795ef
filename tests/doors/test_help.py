"""--help comes within a second: arguments are parsed before anything heavy is imported."""

import re
import resource
import subprocess
import sys

import pytest
from conftest import REPOSITORY, commands, cpu_environment

HEAVY = {"torch", "torchvision", "nvidia", "accelerate", "matplotlib", "tensorboard", "scipy", "sklearn", "timm"}
COMMANDS = ["train.py", "pipeline/make_shards.py", *commands()]


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_commands_are_looked_at() -> None:
    assert {"pipeline.loader", "pipeline.preview", "transfer.knn", "transfer.curves"} <= set(COMMANDS)
    assert "transfer.load" not in COMMANDS


# Both in one process, as `python -m` and `python FILE` run them: that starts half as many.
BOTH = """
import runpy, sys
name = sys.argv[1]
for flag in ("--help", "--no_such_flag"):
    sys.argv = [name, flag]
    try:
        runpy.run_path(name, run_name="__main__") if name.endswith(".py") else runpy.run_module(
            name, run_name="__main__", alter_sys=True
        )
    except SystemExit as end:
        print("code", end.code or 0, flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_looked_at_before_heavy_imports(name: str) -> None:
    before = processor_seconds()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", BOTH, name],
        cwd=REPOSITORY,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = processor_seconds() - before  # a busy machine lengthens these less than those of the clock
    imported = set(re.findall(r"^import time:.*\| +(\w+)", result.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert imported & HEAVY == set()
    assert re.findall("^code (.*)", result.stdout, re.MULTILINE) == ["0", "2"]
    assert "usage: " in result.stdout
    assert "usage: " in result.stderr
    assert seconds < 1.0
