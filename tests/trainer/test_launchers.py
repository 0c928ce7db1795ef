"""Processes that a launcher started and that do not find each other: as many trainings, each by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer import joining
from trainer.joining import check_all_came


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by no launcher."""
    for name in (*joining.SIZES, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_that_find_each_other_are_no_error(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all_came(1)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # of the cluster's profile
    check_all_came(1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # launch/slurm.sbatch, or torchrun inside srun
    monkeypatch.setenv("WORLD_SIZE", "16")
    check_all_came(16)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},  # torchrun on a CPU
            r"WORLD_SIZE says that 2 processes were started, but each found itself alone .*"
            r"with: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 ",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            r"SLURM_STEP_NUM_TASKS says that 4 .* with: sbatch launch/slurm.sbatch",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, r"OMPI_COMM_WORLD_SIZE says that 3 .* with: GPUS=3 launch/torchrun.sh"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"WORLD_SIZE says that 2 .* with: GPUS=2 launch/torchrun.sh"),
    ],
)
def test_processes_that_would_train_each_by_itself_are_an_error(
    environment: dict[str, str], said: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said) as caught:
        check_all_came(1)
    assert "\n" not in str(caught.value)


MULTI_CPU = """compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from trainer.joining import check_all_came
try:
    check_all_came(1)
    print("alone")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--cpu", "--num_processes", "2"], {}, "asked for 2 processes and started one"),
        (["--num-processes=2"], {"ACCELERATE_USE_CPU": "true"}, "asked for 2 processes and started one"),
        (["--config_file", "{folder}/cpu.yaml"], {}, "asked for several processes and started one"),
        (["--cpu", "--num_processes", "1"], {"MASTER_ADDR": "10.0.0.1"}, "alone"),
    ],
)
def test_accelerate_launch_on_a_cpu(
    arguments: list[str], environment: dict[str, str], said: str, alone: None, tmp_path: Path
) -> None:
    """It starts one process whatever it is asked for, and said nothing."""
    (tmp_path / "cpu.yaml").write_text(MULTI_CPU)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--dynamo_backend=no"]
    command += [part.format(folder=tmp_path) for part in arguments]
    result = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(REPOSITORY)],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES="", HF_HOME=str(tmp_path), OMP_NUM_THREADS="1") | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert said in result.stdout, result.stdout
    if "asked" in said:
        count = "2" if "2" in said else "N"
        assert f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {count} script.py" in result.stdout
