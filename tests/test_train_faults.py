"""Ranks that die or hang, restarts, launchers, several machines: real processes, real signals."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cpu_environment, free_port
from training import TINY, Runs, flags, log_of, losses, wait_for_step

import checkpoint


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    assert runs.train(out, shards_dir, ranks=2) == [0, 0], log_of(out).read_text()
    return out


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_rank_that_dies_ends_the_others_who_name_it(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "dies"
    pids = runs.start(out, shards_dir, ranks=2, epochs=400)
    wait_for_step(out, 3)
    killed = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert runs.wait(pids, 60) == [1, -signal.SIGKILL], log_of(out).read_text()
    assert time.monotonic() - killed < 60
    said = errors(log_of(out).read_text())
    known = (
        rf"rank 1 \(.* process {pids[1]}\), last heard of \d+ s ago at step (\d+) in .*; this rank is at step (\d+) in"
    )
    (found,) = (match for line in said if "rank 0" in line and (match := re.search(known, line)))
    assert int(found[1]) <= int(found[2])


def test_a_rank_that_hangs_ends_with_the_others_who_name_it(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "hangs"
    pids = runs.start(out, shards_dir, ranks=2, epochs=400, hang_seconds=8)
    wait_for_step(out, 5)
    stopped = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    assert runs.wait(pids, 60) == [1, -signal.SIGKILL], log_of(out).read_text()
    assert time.monotonic() - stopped < 60
    said = errors(log_of(out).read_text())
    assert len(said) == 1
    assert re.search(
        rf"rank 0 ends the run: rank 1 \(.* process {pids[1]}\), last heard of \d+ s ago at step \d+ in .*: no sign of",
        said[0],
    )


def test_a_rank_that_waits_for_ever_says_where(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "stuck"
    patch = """
import time
from pipeline.loader import Loader
take = Loader.__next__
def stuck_somewhere(self):
    while rank == 1 and self._consumed == 6:
        time.sleep(1)
    return take(self)
Loader.__next__ = stuck_somewhere
"""
    pids = runs.start(out, shards_dir, ranks=2, patch=patch, hang_seconds=8)
    codes = runs.wait(pids, 90)
    assert all(codes), log_of(out).read_text()  # 1, or killed by the other
    text = log_of(out).read_text()
    assert any(re.search(r"rank 1 \(.*\) at step 6 in 'data': no progress for", line) for line in errors(text))
    assert "stuck_somewhere" in text  # the stack of the rank that hangs


@pytest.mark.slow
def test_a_slow_disk_is_no_rank_that_hangs(runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Rank 0 waits for its last write before the next one and at the end; the others wait for rank 0."""
    out = tmp_path / "slow"
    patch = """
import time, checkpoint
save = checkpoint.save
def slow(*arguments, step, **options):
    time.sleep(9 if step in (4, 20) else 0)
    return save(*arguments, step=step, **options)
checkpoint.save = slow
"""
    options = {"patch": patch, "save_every": 4, "hang_seconds": 5}
    assert runs.train(out, shards_dir, ranks=2, **options) == [0, 0], log_of(out).read_text()
    assert losses(out) == losses(undisturbed)


def test_an_error_on_one_rank_is_told_by_the_others(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "error"
    patch = """
from pipeline.loader import Loader
take = Loader.__next__
def full(self):
    if rank == 1 and self._consumed == 4:
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return take(self)
Loader.__next__ = full
"""
    assert runs.train(out, shards_dir, ranks=2, patch=patch) == [1, 1], log_of(out).read_text()
    said = errors(log_of(out).read_text())
    assert any("rank 1, step 4, data: CUDA out of memory" in line and "precision bf16" in line for line in said)
    assert any("rank 0" in line and "rank 1" in line for line in said)


def launch(command: list[str], out: Path, data: Path, **options: Any) -> subprocess.Popen[bytes]:
    with log_of(out).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "train.py", *flags(TINY | {"data": data, "out": out} | options)],
            cwd=REPOSITORY,
            env=cpu_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(launcher: subprocess.Popen[bytes]) -> None:
    """With all of its processes: each launcher is a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait(20)


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_the_run_is_the_same(
    shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "elastic"
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=5"]
    launcher = launch(command, out, shards_dir, save_every=2)
    try:
        wait_for_step(out, 5)
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        assert launcher.wait(240) == 0, log_of(out).read_text()[-4000:]
    finally:
        end(launcher)
    assert losses(out) == losses(undisturbed)
    assert log_of(out).read_text().count("images, 5 steps an epoch") == 2


@pytest.mark.slow
def test_two_launchers_are_one_run_and_stop_together(shards_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Two `torchrun --nnodes 2` as on two machines; one rank is told to stop, all of them save and end with 0."""
    out, port = tmp_path / "nodes", free_port()
    common = [
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    launchers = [launch([*common, f"--node_rank={n}"], out, shards_dir) for n in range(2)]
    try:
        wait_for_step(out, 4)
        os.kill(ranks_of(launchers[1])[0], signal.SIGUSR1)
        assert [launcher.wait(60) for launcher in launchers] == [0, 0], log_of(out).read_text()[-4000:]
    finally:
        for launcher in launchers:
            end(launcher)
    assert "saved at step" in log_of(out).read_text()
    steps = checkpoint.list_steps(out)[-1]
    assert losses(out) == losses(undisturbed)[:steps]


@pytest.mark.slow
def test_accelerate_launch_on_two_machines(shards_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, port = tmp_path / "machines", free_port()
    # --cpu would need mpirun here; ACCELERATE_USE_CPU in the environment keeps the ranks off any GPU
    common = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"]
    common += [
        "--main_process_ip=127.0.0.1",
        f"--main_process_port={port}",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    launchers = [launch([*common, f"--machine_rank={n}"], out, shards_dir, max_steps=4) for n in range(2)]
    try:
        assert [launcher.wait(150) for launcher in launchers] == [0, 0], log_of(out).read_text()[-4000:]
    finally:
        for launcher in launchers:
            end(launcher)
    assert losses(out) == losses(undisturbed)[:4]


@pytest.mark.slow
@pytest.mark.process
def test_a_told_launcher_leaves_no_rank_behind(shards_dir: Path, tmp_path: Path) -> None:
    """`accelerate launch` dies of a SIGTERM without telling its child, which must save and end all the same."""
    out = tmp_path / "left"
    common = ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_machines=1", "--num_processes=1"]
    launcher = launch([*common, "--mixed_precision=no", "--dynamo_backend=no"], out, shards_dir, epochs=400)
    try:
        wait_for_step(out, 3)
        child = ranks_of(launcher)[0]
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(20) == -signal.SIGTERM  # 143 to a shell, while the child still saves
        deadline = time.monotonic() + 30
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "SIGTERM: saved at step" in log_of(out).read_text()
    finally:
        end(launcher)


@pytest.mark.slow
@pytest.mark.process
def test_the_torchrun_script_forwards_signals_and_ends_with_0(shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "script"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log_of(out).open("ab") as log:
        script = subprocess.Popen(
            ["bash", "launch/torchrun.sh", *flags(TINY | {"data": shards_dir, "out": out, "epochs": 400})],
            cwd=REPOSITORY,
            env=cpu_environment(PATH=path, GPUS="2", PORT=str(free_port())),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_step(out, 3)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0, log_of(out).read_text()[-4000:]
    finally:
        end(script)
    assert "saved at step" in log_of(out).read_text()
