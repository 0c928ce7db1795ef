"""launch/slurm.sbatch with stand-ins for SLURM's commands: when the job is put back into the queue. launch/torchrun.sh
with a stand-in for torchrun: what it is started with; and with the real one.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.process


def write(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("begun", "training", "code", "requeued"),
    [
        (True, "touch run/checkpoints/step_00000200.pt", 0, True),  # preempted
        (True, "touch run/checkpoints/step_00000200.pt; exit 1", 1, True),  # a rank died: as torchrun's restarts
        (True, "touch run/checkpoints/step_00000050.pt", 0, True),  # the one of step 100 was damaged
        (True, "touch run/checkpoints/step_00000200.pt run/finished", 0, False),
        (True, "exit 1", 1, False),  # no step further: it would not end
        (True, "true", 0, False),  # --profile
        (False, "mkdir -p run/checkpoints; touch run/checkpoints/step_00000200.pt", 0, True),
        (False, "exit 2", 2, False),
    ],
)
def test_a_job_is_queued_again_as_long_as_it_gets_on(
    begun: bool, training: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    write(tmp_path / "bin/srun", f"#!/bin/sh\n{training}\n")
    write(tmp_path / "bin/scontrol", '#!/bin/sh\nif [ "$1" = show ]; then echo node1; else echo "$@" > requeued; fi\n')
    write(tmp_path / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "recipe.py").symlink_to(REPOSITORY / "recipe.py")
    if begun:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "step_00000100.pt").touch()
    env = dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(tmp_path))
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    command = ["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), "--data", "d", "--out=run"]
    result = subprocess.run(command, env=env, cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "requeued").is_file() == requeued


def test_a_run_at_a_url_is_looked_for_where_it_lives(tmp_path: Path) -> None:
    write(tmp_path / "bin/srun", "#!/bin/sh\nmkdir -p work/checkpoints; touch work/checkpoints/step_00000200.pt\n")
    write(tmp_path / "bin/scontrol", '#!/bin/sh\nif [ "$1" = show ]; then echo node1; else echo "$@" > requeued; fi\n')
    write(tmp_path / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    env = dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(tmp_path))
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), "--data", "d"]
    command += ["--out", "s3://bucket/run", "--work_dir", "work"]
    result = subprocess.run(command, env=env, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "requeued").is_file()


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A clone with launch/torchrun.sh, and the commands that it uses, but neither a GPU nor torchrun."""
    (tmp_path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch" / "torchrun.sh", tmp_path / "launch")
    write(tmp_path / "bin" / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("bash", "dirname", "wc", "cksum", "cut", "pkill", "sh"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


SHOW = '#!/bin/sh\necho "$0 $@"\necho "cpu=$ACCELERATE_USE_CPU"\n'


def start(machine: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/torchrun.sh", "--out", "run"]
    env = {"PATH": str(machine / "bin"), **env}
    return subprocess.run(command, cwd=machine, env=env, capture_output=True, text=True, timeout=60)


def test_without_torchrun_the_script_says_so(machine: Path) -> None:
    result = start(machine)
    assert result.returncode == 2
    assert result.stderr == f"error: no torchrun in .venv/bin or PATH: run 'make install' in {machine} first\n"


def test_the_script_prefers_the_virtual_environment(machine: Path) -> None:
    write(machine / "bin" / "torchrun", SHOW)
    assert start(machine).stdout.startswith(f"{machine}/bin/torchrun ")
    write(machine / ".venv" / "bin" / "torchrun", SHOW)
    assert start(machine).stdout.startswith(f"{machine}/.venv/bin/torchrun ")


def test_processes_of_a_machine(machine: Path) -> None:
    write(machine / "bin" / "torchrun", SHOW)
    result = start(machine)  # no nvidia-smi
    assert result.returncode == 0, result.stderr
    assert "--nproc_per_node=1 " in result.stdout and "cpu=true" in result.stdout
    assert result.stdout.splitlines()[0].endswith(" train.py --out run")
    write(machine / "bin" / "nvidia-smi", "#!/bin/sh\necho GPU 0\necho GPU 1\n")
    result = start(machine)
    assert "--nproc_per_node=2 " in result.stdout and "cpu=\n" in result.stdout
    assert "--nproc_per_node=5 " in start(machine, GPUS="5").stdout


def test_ports(machine: Path) -> None:
    write(machine / "bin" / "torchrun", SHOW)
    ports = {start(machine).stdout.split("--master_port=")[1].split(" ")[0] for _ in range(2)}
    assert len(ports) == 2 and "29500" not in ports  # two runs on one machine
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = start(machine, PORT=port)
        assert result.returncode == 2
        assert result.stderr == f"error: PORT={port} is in use on this machine, or no port: leave PORT out\n"
        result = start(machine, PORT=port, NODES="2", HEAD="10.0.0.1")
        assert result.returncode == 2
        assert result.stderr == f"error: port {port} is in use here: start all machines with another PORT=...\n"
        assert start(machine, PORT=port, NODES="2", NODE="1", HEAD="10.0.0.1").returncode == 0


def test_several_machines(machine: Path) -> None:
    write(machine / "bin" / "torchrun", SHOW)
    said = start(machine, NODES="2", NODE="1", HEAD="10.0.0.1").stdout
    assert " --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 " in said
    said = start(machine, NODES="1:2", HEAD="10.0.0.1").stdout
    assert " --nnodes=1:2 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500 --rdzv_id=" in said
    result = start(machine, NODES="1:2")
    assert (
        result.returncode == 2 and result.stderr == "error: NODES=1:2: set HEAD to the address of the first machine\n"
    )


def test_the_exit_code_is_that_of_torchrun(machine: Path) -> None:
    write(machine / "bin" / "torchrun", "#!/bin/sh\nexit 3\n")
    assert start(machine).returncode == 3
