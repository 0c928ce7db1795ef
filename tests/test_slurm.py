"""launch/slurm.sbatch with stand-ins for SLURM's commands: when the job is put back into the queue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.process


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
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    write("bin/srun", f"#!/bin/sh\n{training}\n")
    write("bin/scontrol", '#!/bin/sh\nif [ "$1" = show ]; then echo node1; else echo "$@" > requeued; fi\n')
    write(".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
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
