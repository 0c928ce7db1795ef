"""How a rank belongs to its launcher; what ranks say to each other is in test_train_ranks.py."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from trainer import joining
from trainer.joining import check_driver, exit_with_launcher, joined


def test_the_end_of_a_shell_is_not_the_end_of_the_run() -> None:
    """Only `accelerate launch` takes its child with it; pytest and the shells before it are other parents."""
    exit_with_launcher()
    number = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    assert number.value == 0


@pytest.fixture
def built_for_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [((12, 4), "`make install CUDA=12`, or update the driver"), ((11, 8), "13.2: update the driver")],
)
def test_a_driver_that_is_too_old_is_an_error_with_its_remedy(
    driver: tuple[int, int], remedy: str, built_for_13: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself warns, and trains on the CPU."""
    monkeypatch.setattr(joining, "cuda_of_driver", lambda: driver)
    with pytest.raises(ValueError, match=rf"CUDA {driver[0]}\.{driver[1]} at most") as caught, joined():
        pass
    assert remedy in str(caught.value)


@pytest.mark.parametrize("driver", [(13, 0), (14, 1), None])
def test_a_driver_that_is_new_enough_or_not_there(
    driver: tuple[int, int] | None, built_for_13: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "cuda_of_driver", lambda: driver)
    check_driver()


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("ACCELERATE_USE_CPU", "true")])
def test_an_old_driver_does_not_matter_on_the_cpu(
    name: str, value: str, built_for_13: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "cuda_of_driver", lambda: (12, 4))
    monkeypatch.setenv(name, value)
    check_driver()


@pytest.mark.process
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stub of a driver")
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_train_ends_with_one_line_where_the_driver_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *v) { *v = 12040; return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"], cwd=tmp_path, check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")}
    env["LD_LIBRARY_PATH"] = f"{tmp_path}:{env.get('LD_LIBRARY_PATH', '')}"
    env["PYTHONPATH"] = f"{REPOSITORY}:{env.get('PYTHONPATH', '')}"
    command = [sys.executable, "train.py", "--data", "nothing", "--out", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the NVIDIA driver runs CUDA 12.4 at most, and torch ")
    assert "`make install CUDA=12`" in result.stderr
    assert "Traceback" not in result.stderr
