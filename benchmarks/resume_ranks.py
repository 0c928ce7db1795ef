"""The runs of `resume.py` for one system, under that system's own Python: `python resume_ranks.py PLAN.json`.

Each rank is a real process, forked from this one, which has imported the system, in lockstep with the others by an
all-reduce (gloo) each step, as DDP keeps them. It notes every batch in a file before it goes on. All ranks are in one
process group, which is killed with SIGKILL: all at once when a rank has reached a step, or that rank alone and the
others when it is seen to be gone, or all at any time after the start. Prints one JSON object a line.
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import resume_peers  # noqa: E402
from benchmarks.bad_data_watch import processes_below  # noqa: E402
from benchmarks.resume_counting import Row, compare, joined, missing_and_extra  # noqa: E402
from benchmarks.resume_systems import Opened, Place, import_ours, open_ours  # noqa: E402

KEEP = 2  # checkpoints
LIMIT = 180  # seconds in which no rank notes a batch: then they hang


# --- a rank -----------------------------------------------------------------------------------------------------------


def bytes_read() -> dict[int, int]:
    """By this process and its children, through read() and the like, page cache included."""
    found = {}
    for process in processes_below(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended
            found[process] = int(Path(f"/proc/{process}/io").read_text().split()[1])
    return found


class Saved:
    """The newest state in a run's folder. Ours goes the way of train.py, through checkpoint.py. The peers' state is a
    dict that the user keeps: here a whole file that takes the place of the one before."""

    def __init__(self, system: str, folder: Path) -> None:
        self.folder, self.writer = folder, None
        if system == "ours":
            import checkpoint

            self.checkpoint = checkpoint
            self.writer = checkpoint.Writer(folder, keep=KEEP)

    def newest(self) -> tuple[int, Any]:
        if self.writer is not None:
            state = self.checkpoint.load_newest(self.folder)
            return (0, None) if state is None else (state["step"], [state["loader"]])
        path = self.folder / "state"
        return pickle.loads(path.read_bytes()) if path.exists() else (0, None)

    def save(self, step: int, states: list[Any]) -> None:
        if self.writer is not None:
            self.writer.submit({"step": step, "loader": states[0]}, step)
            return
        (self.folder / "state.tmp").write_bytes(pickle.dumps((step, states)))
        (self.folder / "state.tmp").rename(self.folder / "state")

    def join(self) -> None:
        if self.writer is not None:
            self.writer.join()


def open_system(system: str, place: Place, saved: Any) -> Opened:
    return open_ours(place, saved) if system == "ours" else resume_peers.OPEN[system](place, saved)


def rank_main(plan: dict[str, Any], chain: dict[str, Any], folder: Path, phase: int, rank: int, began: float) -> None:
    world, system = chain["worlds"][phase], plan["system"]
    kill = chain["kills"][phase] if phase < len(chain["kills"]) else None
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "NNODES": "1",
        "NODE_RANK": "0",
    }
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{phase}", rank=rank, world_size=world)
    saved = Saved(system, folder)
    step, states = saved.newest()
    place = Place(
        plan["data"], plan["samples"], plan["batch"], plan["epochs"], rank, world, plan["workers"], chain["worlds"][0],
        folder,
    )  # fmt: skip
    before = bytes_read()
    log = (folder / f"rows{phase}.{rank}").open("w")
    log.write(json.dumps(step) + "\n")
    log.flush()
    opened = open_system(system, place, states)
    first, killing = None, None
    while True:
        got = next(opened.batches, None)
        if first is None and got is not None:
            first = time.time() - began, sum(bytes_read().values()) - sum(before.values())
            log.write(json.dumps(first) + "\n")
        if got is not None:
            log.write(json.dumps(Row(step, rank, world, *got)) + "\n")
            log.flush()  # before the others hear of it: with them it is in the weights
        have = torch.tensor([int(got is not None)])
        dist.all_reduce(have)
        if not have.item():
            break
        if kill is not None and kill["step"] <= step and kill["rank"] == rank:
            end, whom = (os.kill, os.getpid()) if kill["who"] == "one" else (os.killpg, 0)
            killing = threading.Timer(kill["delay"], end, (whom, signal.SIGKILL))
            killing.start()
            kill = None
        step += 1
        if step % (chain["save_every"] * chain["accumulate"]) == 0:
            every: list[Any] = [None] * world
            if system == "ours":  # it is the same for all ranks
                every = [opened.state()]
            else:
                dist.all_gather_object(every, opened.state())
            if rank == 0:
                saved.save(step, every)
    saved.join()
    if killing is not None:
        killing.join()  # what is left of the run takes less than the delay
    opened.close()
    log.close()
    dist.barrier()


# --- their parent -----------------------------------------------------------------------------------------------------


def run_phase(plan: dict[str, Any], chain: dict[str, Any], folder: Path, phase: int) -> str:
    """ "killed", "ended", "hung", or the last line of a rank's error."""
    world = chain["worlds"][phase]
    kill = chain["kills"][phase] if phase < len(chain["kills"]) else None
    began, pids, group = time.time(), list[int](), 0
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, group)
                errors = os.open(folder / f"errors{phase}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                rank_main(plan, chain, folder, phase, rank, began)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        group = group or pid
        with contextlib.suppress(OSError):  # it did so itself, and has started another program since
            os.setpgid(pid, group)
        pids.append(pid)
    at = began + kill["after"] if kill is not None and kill["who"] == "time" else math.inf
    codes: dict[int, int] = {}
    outcome = ""
    while len(codes) < world:
        time.sleep(0.005)
        reap(pids, codes)
        gone = any(code != 0 for code in codes.values())
        hung = time.time() - began > LIMIT and time.time() - last_noted(folder, phase, began) > LIMIT
        if not outcome and (gone or hung or time.time() > at):
            reap(pids, codes)  # a rank that was killed, whose death another one noticed first
            outcome = "killed" if -signal.SIGKILL in codes.values() or time.time() > at else "failed"
            if hung and not gone:
                outcome = "hung"
            elif gone and kill is not None:
                time.sleep(kill["delay"])
            kill_group(group)
    kill_group(group)  # workers that outlive their rank
    if outcome == "failed" or (outcome == "killed" and kill is None):
        texts = [(folder / f"errors{phase}.{rank}").read_text().strip() for rank in range(world)]
        lines = [text.splitlines()[-1] for text in texts if text] or ["no word of it"]
        return next((line for line in lines if "gloo" not in line and "Connection" not in line), lines[0])[:300]
    return outcome or "ended"


def last_noted(folder: Path, phase: int, began: float) -> float:
    return max([began, *(path.stat().st_mtime for path in folder.glob(f"rows{phase}.*"))])


def reap(pids: list[int], codes: dict[int, int]) -> None:
    for pid in pids:
        if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
            codes[pid] = os.waitstatus_to_exitcode(found[1])


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def read_phase(folder: Path, phase: int, world: int) -> tuple[int | None, list[Row], list[list[float]]]:
    """First step (None when it was killed before it had one), rows, and each rank's (seconds, bytes) to its first."""
    first, rows, starts = None, list[Row](), list[list[float]]()
    for rank in range(world):
        path = folder / f"rows{phase}.{rank}"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                content = json.loads(line)
            except ValueError:  # killed while it wrote
                continue
            if isinstance(content, int):
                first = content
            elif len(content) == 2:
                starts.append(content)
            else:
                rows.append(Row(*content))
    return first, rows, starts


def tear_newest(folder: Path, rng: random.Random) -> bool:
    """Cuts the newest checkpoint short, as a machine that lost its power may leave it. Ours alone: the peers leave the
    file to the user."""
    newest = max((folder / "checkpoints").glob("step_*.pt"), default=None)
    if newest is None or len(list((folder / "checkpoints").glob("step_*.pt"))) < 2:
        return False
    os.truncate(newest, rng.randrange(newest.stat().st_size))
    return True


def fetched(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes that the server has sent of each shard."""
    if not plan["data"].startswith("http"):
        return {}
    with urllib.request.urlopen(plan["data"].rsplit("/", 1)[0] + "/__counts__") as answer:
        counts = json.load(answer)
    return {name: count for name, count in counts.items() if re.fullmatch(r"bytes .*\.tar", name)}


def run_chain(plan: dict[str, Any], chain: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Tells what happened at each kill, and gives the rows that count (of no use when it did not come to its end)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(chain["seed"])
    phases, kills, refused, first_resumed = list[tuple[int, list[Row]]](), list[dict[str, Any]](), "", None
    for phase, world in enumerate(chain["worlds"]):
        outcome = run_phase(plan, chain, folder, phase)
        first, rows, starts = read_phase(folder, phase, world)
        if first is not None:
            phases.append((first, rows))
        if phase and len(starts) == world and kills:
            kills[-1] |= {"seconds": max(s[0] for s in starts), "bytes": sum(s[1] for s in starts)}
        if phase and first is not None:
            kills[-1]["from"] = first
            first_resumed = first if first_resumed is None else min(first, first_resumed)
        last = phase == len(chain["kills"]) or (outcome == "ended" and not rows)  # the end itself had been saved
        if outcome != ("ended" if last else "killed"):
            refused = outcome if outcome not in ("ended", "killed") else f"{outcome} too early"
            break
        if last:
            break
        reached = max((row.step for row in rows), default=None)
        kills.append({"world": world, "to": chain["worlds"][phase + 1], "reached": reached})
        if chain["kills"][phase]["tear"]:
            kills[-1]["torn"] = tear_newest(folder, rng)
        if chain["kills"][phase]["wipe"]:
            shutil.rmtree(folder / "cache", ignore_errors=True)
    starts = read_phase(folder, 0, chain["worlds"][0])[2]
    starts = starts if len(starts) == chain["worlds"][0] else []
    found = {"kills": kills, "refused": refused, "first_resumed": first_resumed, "starts": starts}
    return found, joined(phases)


def cold_start(plan: dict[str, Any]) -> dict[str, float]:
    """From the start of this process to the first batch behind what the uninterrupted run saved last."""
    folder = Path(plan["work"]) / "uninterrupted"
    _, states = Saved(plan["system"], folder).newest()
    place = Place(plan["data"], plan["samples"], plan["batch"], plan["epochs"], 0, 1, plan["workers"], 1, folder)
    opened = open_system(plan["system"], place, states)
    next(opened.batches)
    found = {"seconds": time.time() - plan["cold"], "cpu_s": time.process_time()}
    opened.close()
    return found


def versions(system: str) -> dict[str, str]:
    """Those of the packages that the system's requirements name."""
    requirements = REPOSITORY / "benchmarks" / "peers" / f"{system}.txt"
    lines = requirements.read_text().splitlines() if requirements.exists() else ["torch"]
    return {name: metadata.version(name) for line in lines if (name := line.partition("==")[0]) and name[0] != "#"}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if "cold" in plan:
        say(cold_start(plan))
        return
    began = time.perf_counter()
    if plan["system"] == "ours":
        import_ours()
    elif plan["system"] in resume_peers.IMPORT_FIRST:
        importlib.import_module(resume_peers.IMPORT_FIRST[plan["system"]])
    imported = round(time.perf_counter() - began, 2)
    say({"import_s": imported, "python": sys.version.split()[0], "versions": versions(plan["system"])})
    work = Path(plan["work"])
    uninterrupted: list[Row] = []
    counted = {name: plan[name] for name in ("samples", "epochs", "mixture", "whole_run")}
    quiet = {"kills": [], "save_every": 7, "accumulate": 1, "seed": 0}
    for i, world in enumerate(plan["uninterrupted"]):
        found, rows = run_chain(plan, {**quiet, "worlds": [world]}, work / "uninterrupted")
        if found["refused"]:
            say({"failed": found["refused"]})
            return
        uninterrupted = uninterrupted or rows
        usual = missing_and_extra(rows, plan["samples"], plan["epochs"], plan["whole_run"])
        beside = compare(uninterrupted, rows, 0, **counted)
        found |= {"leaves_out": sum(u[0] for u in usual), "twice": sum(u[1] for u in usual), "beside": beside}
        say({"uninterrupted": i, "world": world, **found})
    for i, chain in enumerate(plan["chains"]):
        sent = fetched(plan)
        found, rows = run_chain(plan, chain, work / f"chain{i}")
        if not found["refused"]:
            first = found["first_resumed"] if found["first_resumed"] is not None else 0
            found |= compare(uninterrupted, rows, first, **counted)
        if sent:
            found["sent"] = {name: count - sent.get(name, 0) for name, count in fetched(plan).items()}
        say({"chain": i, **found})
        shutil.rmtree(work / f"chain{i}", ignore_errors=True)


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
