"""--help comes within a second: arguments are parsed before anything heavy is imported."""

import re
import resource
import subprocess
import sys

import pytest
from conftest import REPOSITORY, commands, cpu_environment

HEAVY = {"torch", "torchvision", "nvidia", "accelerate", "matplotlib", "tensorboard", "scipy", "sklearn", "timm"}
COMMANDS = [
    ["train.py"],
    ["pipeline/make_shards.py"],
    *(["-m", module] for module in commands()),
]


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_commands_are_looked_at() -> None:
    names = {command[-1] for command in COMMANDS}
    assert {"pipeline.loader", "pipeline.preview", "transfer.knn", "transfer.curves"} <= names
    assert "transfer.load" not in names


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
@pytest.mark.parametrize("flag", ["--help", "--no_such_flag"])
def test_arguments_are_looked_at_before_heavy_imports(command: list[str], flag: str) -> None:
    before = processor_seconds()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, flag],
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
    assert result.returncode == (0 if flag == "--help" else 2)
    assert "usage: " in (result.stdout if flag == "--help" else result.stderr)
    assert seconds < 1.0
