"""Several processes as one run: how they find each other, and agree before the first step.

The launchers' environment names the group: torchrun, `accelerate launch`, or launch/slurm.sbatch.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Where launchers say how many processes they started: torchrun, three kinds of mpirun, srun.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class Ranks(NamedTuple):
    rank: int
    world_size: int
    device: torch.device


def kept_off_gpus() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def check_driver() -> None:
    """Raises ValueError, with the command that helps, when the NVIDIA driver is older than the CUDA that torch was
    built for. torch itself only warns, and trains on the CPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    built_for = torch.version.cuda
    if built_for is None or hidden or kept_off_gpus():
        return
    version = cuda_of_driver()
    if version is None or version[0] >= int(built_for.partition(".")[0]):
        return
    remedy = "update the driver" if version[0] < 12 else "`make install CUDA=12`, or update the driver"
    raise ValueError(
        f"the NVIDIA driver runs CUDA {version[0]}.{version[1]} at most, and torch {torch.__version__} is built for "
        f"CUDA {built_for}: {remedy}; ACCELERATE_USE_CPU=true keeps off the GPUs"
    )


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver runs, (12, 4) for instance; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the process group named by the launcher's environment and leaves it at the end. ACCELERATE_USE_CPU=true
    keeps it off the GPUs. Raises ValueError for a driver that is too old."""
    check_driver()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    check_all_came(world_size)
    cpu = kept_off_gpus() or not torch.cuda.is_available()
    device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not cpu:
        torch.cuda.set_device(device)
    rejoin()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if cpu else "nccl", device_id=None if cpu else device)
    yield Ranks(rank, world_size, device)
    if world_size > 1:  # not after an error: NCCL would wait there for the other ranks, and hide it
        dist.destroy_process_group()


class CommonError(ValueError):
    """Raised alike on all ranks, so that one of them reports it."""


def rejoin() -> None:
    """Joins the ranks that torchrun restarted; to be called before the Accelerator or `joined`, which
    then find the group there.

    torchrun keeps one store over its restarts and torch puts no attempt into its keys, so that restarted ranks would
    look for each other at the addresses of the dead: "connectFullMesh failed, connection refused" (torch 2.15).
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    on_cpu = kept_off_gpus() or not torch.cuda.is_available()
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def control_group() -> dist.ProcessGroup | None:
    """A gloo group for messages between hosts that must not touch the GPU; None when there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # The ranks wait here while rank 0 builds an index; for one that hangs there is the watchdog.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    assert isinstance(group, dist.ProcessGroup)
    return group


def exit_with_launcher() -> None:
    """Asks Linux for a SIGTERM when `accelerate launch` ends, which leaves its child behind when it is told to stop.
    Not for other parents: a shell that somebody logs out of must not take a training with it.
    """
    with contextlib.suppress(OSError, AttributeError):
        if _arguments_of_accelerate():
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def check_all_came(ranks: int) -> None:
    """ValueError, with the command that works, when a launcher was asked for more processes than the `ranks` that found
    each other: they would be as many trainings, each by itself."""
    if ranks == 1 and (asked := _asked_of_accelerate()):
        raise ValueError(
            f"`accelerate launch` was asked for {asked} processes and started one: on a CPU it starts more only by "
            f"mpirun. Start them with: {_on_cpu(asked if asked.isdigit() else 'N')}"
        )
    name = next((name for name in SIZES if os.environ.get(name, "").isdigit()), "")
    started = int(os.environ[name]) if name else 1
    if started == ranks:
        return
    if name == "WORLD_SIZE" and "LOCAL_RANK" in os.environ:
        command = _on_cpu(os.environ.get("LOCAL_WORLD_SIZE", str(started)))
    else:
        script = "sbatch launch/slurm.sbatch" if name.startswith("SLURM") else f"GPUS={started} launch/torchrun.sh"
        command = f"{script} ... (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set there)"
    raise ValueError(
        f"{name} says that {started} processes were started, but each found itself alone and would train by itself. "
        f"Start them with: {command}"
    )


def _on_cpu(processes: str) -> str:
    return f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {processes} {Path(sys.argv[0]).name} ..."


def _arguments_of_accelerate() -> list[str]:
    """The command line of the parent process when that is `accelerate`; else empty."""
    program, *arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    return arguments if "python" in program and any("accelerate" in argument for argument in arguments) else []


def _asked_of_accelerate() -> str:
    """How many processes `accelerate launch` was asked for when it started this one alone; "" otherwise.

    It sets MASTER_ADDR for several processes, and RANK and WORLD_SIZE only where it starts them.
    """
    with contextlib.suppress(OSError):
        arguments = _arguments_of_accelerate()
        before = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        was_set = any(variable.startswith(b"MASTER_ADDR=") for variable in before)
        if not arguments or was_set or "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ:
            return ""
        said = re.search(r"\0--num[-_]processes[=\0](\d+)\0", "\0".join(arguments))
        return said[1] if said else "several"
    return ""


@contextmanager
def all_ranks_agree(group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """A part of the set-up that every rank goes through; facts that must be alike go into the dictionary.

    At its end the ranks compare. Raises CommonError on every rank when any of them raised ValueError or OSError inside,
    or when their facts differ: otherwise they would hang in the next collective, or train on different things.
    """
    facts: dict[str, Any] = {}
    problem = ""
    try:
        yield facts
    except (ValueError, OSError) as error:
        problem = str(error)
    check_ranks_agree(facts, problem, group)


def check_ranks_agree(facts: dict[str, Any], problem: str, group: dist.ProcessGroup | None) -> None:
    """Raises CommonError on every rank when any of them met a `problem` or when their `facts` differ, naming ranks and
    facts. All ranks call it.
    """
    if group is None:
        everyone: list[Any] = [(facts, problem)]
    else:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, (facts, problem), group=group)
    problems = [(rank, text) for rank, (_, text) in enumerate(everyone) if text]
    if problems:
        rank, text = problems[0]
        raise CommonError(text if len(problems) == len(everyone) else f"rank {rank}: {text}")
    first = everyone[0][0]
    lines = [
        f"rank {rank} has {name} {other[name]!r}, rank 0 has {first[name]!r}"
        for rank, (other, _) in enumerate(everyone)
        for name in first
        if other[name] != first[name]
    ]
    if lines:
        raise CommonError("the ranks were not started alike: " + "; ".join(lines[:8]))


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, by rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
