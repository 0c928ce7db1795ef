"""What is installed: extras that exist, one build of DALI, the CUDA that `make install` chooses."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SMI = "| NVIDIA-SMI 550.54.15      Driver Version: 550.54.15      CUDA Version: {}     |"


def test_advice_to_install_names_extras_that_exist_and_no_package_of_an_index() -> None:
    files = [path for pattern in ("*.py", "*.md", "*.yaml", "*.toml") for path in REPOSITORY.glob(pattern)]
    for folder in ("pipeline", "model", "trainer", "transfer", "benchmarks", "docs", "launch", "recipes", "shards"):
        files += [p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml", ".sh", ".sbatch")]
    named = {extra for path in files for extra in re.findall(r"-e '\.\[([\w,]+)\]'", path.read_text())}
    assert {"s3", "timm", "heif"} <= named <= set(PROJECT["optional-dependencies"])
    assert [str(path) for path in files if re.search(r"install '?moco-pipeline", path.read_text())] == []


def test_dali_comes_by_an_extra_alone() -> None:
    assert not any("dali" in line for line in PROJECT["dependencies"])
    for cuda in ("12", "13"):
        assert [f"nvidia-dali-cuda{cuda}0"] == [
            x.split(">")[0] for x in PROJECT["optional-dependencies"][f"cuda{cuda}"]
        ]
        lines = (REPOSITORY / f"constraints-cuda{cuda}.txt").read_text().splitlines()
        assert "-c constraints.txt" in lines
        pinned = {line.split("==")[0] for line in lines if "==" in line}
        assert {"torch", "torchvision", f"nvidia-dali-cuda{cuda}0"} <= pinned
        assert not pinned & {x.split("==")[0] for x in (REPOSITORY / "constraints.txt").read_text().splitlines()}


@pytest.mark.process
@pytest.mark.parametrize(
    ("given", "driver", "installed", "chosen"),
    [
        ([], "", None, "13"),
        ([], "12.4", None, "12"),
        ([], "13.0", None, "13"),
        ([], "14.1", None, "13"),
        (["CUDA=12"], "13.0", None, "12"),
        ([], "", "12", "12"),  # a log-in node without a GPU
        ([], "12.4", "", "13"),  # .venv of before there was a choice
        (["CUDA=13"], "12.4", "12", "13"),
    ],
)
def test_make_install_chooses(
    given: list[str], driver: str, installed: str | None, chosen: str, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml", *(f"constraints{x}.txt" for x in ("", "-cuda12", "-cuda13"))):
        shutil.copy(REPOSITORY / name, tmp_path)
    if installed is not None:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "installed").write_text(installed)
        os.utime(tmp_path / ".venv" / "installed", (0, 0))
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\necho '{SMI.format(driver)}'\n" if driver else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "MAKE", "MFLAGS"))}
    env["PATH"] = f"{smi.parent}:{env['PATH']}"
    command = ["make", "-n", "install", *given]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert f"--constraint constraints-cuda{chosen}.txt" in result.stdout
    assert f'--editable ".[dev,cuda{chosen}]"' in result.stdout
    assert ("download.pytorch.org/whl/cu12" in result.stdout) == (chosen == "12")
    assert ("rm -rf .venv" in result.stdout) == (installed is not None and (installed or "13") != chosen)


@pytest.mark.process
def test_another_cuda_is_refused() -> None:
    command = ["make", "-n", "install", "CUDA=11"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "CUDA=11: there is CUDA=12 and CUDA=13" in result.stderr
