"""Does a change keep training what it was? Two versions of this repository train the same, compared bit by bit.

    python benchmarks/same_training.py --before COMMIT [--after COMMIT] [--steps 40] [--only NAME ...]

COMMIT is put into a worktree in a temporary folder; without --after the other side is this working tree as it is. Both
train this working tree's recipes/letters.yaml on shards of benchmarks/letters.py: with one and two ranks, symmetric,
killed by SIGKILL in between and continued, and with the two other mechanisms. The losses of every step, the parameters
and statistics of both encoders, the queue, the optimiser and the loader's place must be equal to the last bit. Exit
code 1 if one is not.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("encoder", "moco", "optimizer", "loader", "rng")  # of a checkpoint; of rng torch's, which alone is seeded
FLAGS = ["--config", str(ROOT / "recipes/letters.yaml"), "--num_threads", "1", "--log_every", "1", "--trackers", "[]"]
FLAGS += ["--keep_checkpoints", "1"]


class Case(NamedTuple):
    ranks: int
    flags: list[str]
    kill: bool = False


CASES = {
    "one rank": Case(1, []),
    "two ranks": Case(2, []),
    "one rank, killed": Case(1, [], kill=True),
    "two ranks, killed": Case(2, [], kill=True),
    "symmetric": Case(1, ["--symmetric", "true"]),
    "symmetric, two ranks, killed": Case(2, ["--symmetric", "true"], kill=True),
    "end_to_end": Case(2, ["--mechanism", "end_to_end"]),
    "memory_bank": Case(2, ["--mechanism", "memory_bank"]),
}


@contextmanager
def checked_out(commit: str | None, folder: Path) -> Iterator[Path]:
    """A worktree of the commit in `folder`; the working tree that this file lies in for None."""
    if commit is None:
        yield ROOT
        return
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def train(tree: Path, shards: Path, out: Path, case: Case, steps: int) -> None:
    """Trains `case` with the code in `tree`; when it is to be killed, after its first checkpoint, and continued."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}", "--max_restarts=0"]
    command = [sys.executable, *(launcher if case.ranks > 1 else []), "train.py", *FLAGS, *case.flags]
    command += ["--data", str(shards), "--out", str(out), "--max_steps", str(steps), "--save_every", str(steps // 4)]
    environment = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(tree))
    log = out.with_suffix(".log")

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                command, cwd=tree, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    if case.kill:
        first = start()
        while first.poll() is None and not list(out.glob("checkpoints/step_*.pt")):
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        if first.wait() == 0:
            raise SystemExit(f"{out.name} ended before it could be killed: give more --steps")
    if code := start().wait():
        raise SystemExit(f"{out.name} ended with {code}:\n{log.read_text()[-3000:]}")


def read(out: Path) -> dict[str, Any]:
    """The parts of a run that are compared: the losses by step, and the parts of its last checkpoint."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    newest = sorted(out.glob("checkpoints/step_*.pt"))[-1]
    state = torch.load(newest, map_location="cpu", weights_only=True)
    state["rng"] = [rank["torch"] for rank in state["rng"]]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return {"losses": losses, **{part: state[part] for part in PARTS}}


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """name.of.each -> tensor or plain value."""
    if isinstance(value, dict):
        return {n: leaf for key, below in value.items() for n, leaf in leaves(below, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {n: leaf for i, below in enumerate(value) for n, leaf in leaves(below, f"{name}.{i}").items()}
    return {name: value}


def differing(one: Any, other: Any) -> list[str]:
    """Names of what is not equal to the last bit, or is only on one side."""
    a, b = leaves(one), leaves(other)
    return [name for name in a | b if name not in a or name not in b or bits(a[name]) != bits(b[name])]


def bits(leaf: Any) -> tuple[object, ...]:
    """A NaN equals itself here, and 0.0 is not -0.0."""
    if isinstance(leaf, torch.Tensor):
        flat = leaf.detach().contiguous().view(-1)
        return str(leaf.dtype), tuple(leaf.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return type(leaf).__name__, repr(leaf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--after", help="commit that is compared; this working tree when left out")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of each training")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the trainings")
    o = parser.parse_args()
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="same_training-") as name:
        folder = Path(name)
        images, shards = folder / "images", folder / "shards"
        for command in (["benchmarks/letters.py", images], ["pipeline/make_shards.py", images / "train", shards]):
            subprocess.run(
                [sys.executable, *map(str, command)], cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), check=True
            )
        with checked_out(o.before, folder / "before") as before, checked_out(o.after, folder / "after") as after:
            shas = [
                subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True).stdout
                for tree in (before, after)
            ]
            print(f"\n{'training':<30}{'ranks':>6}{'losses':>8}" + "".join(f"{part:>11}" for part in PARTS))
            for title in o.only:
                case, runs = CASES[title], []
                for side, tree in (("before", before), ("after", after)):
                    out = folder / f"{side} {title}".replace(", ", "_").replace(" ", "_")
                    train(tree, shards, out, case, o.steps)
                    runs.append(read(out))
                found = {part: differing(runs[0][part], runs[1][part]) for part in ("losses", *PARTS)}
                equal = sum(runs[0]["losses"].get(s) == loss for s, loss in runs[1]["losses"].items())
                shown = "".join(f"{'DIFFERS' if found[part] else 'equal':>11}" for part in PARTS)
                print(f"{title:<30}{case.ranks:>6}{f'{equal}/{o.steps}':>8}{shown}", flush=True)
                for part, names in found.items():
                    if names:
                        print(f"    {part}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
                same = not any(found.values()) and equal == o.steps
                results.append({"training": title, "ranks": case.ranks, "losses_equal": equal, "same": same})
    report = {
        "before": shas[0].strip(), "after": shas[1].strip() + ("" if o.after else " and the working tree"),
        "steps": o.steps, "same": all(r["same"] for r in results), "trainings": results,
        "seconds": round(time.monotonic() - began), "torch": torch.__version__, "cpu": platform.machine(),
        "cores": os.cpu_count(),
    }  # fmt: skip
    print(json.dumps(report))
    sys.exit(0 if report["same"] else 1)


if __name__ == "__main__":
    main()
