"""Is a run of train.py the reference's training? Both are run on the same numbers, step by step.

    python benchmarks/against_reference.py --moco CHECKOUT [--steps 8] [--only NAME ...] [--output FILE]

CHECKOUT is a work tree of facebookresearch/moco at 7397dfe (its main branch was emptied later). train.py trains a
ResNet-18 and notes its initial weights and queue, its batches and the permutations of its shuffle BN. The reference's
own code then trains on these: `train` and `adjust_learning_rate` of its main_moco.py, and its moco/builder.py, under
DDP with gloo. On a CPU its `.cuda()` stands in as identity, and its `torch.randperm` gives our permutations; where
today's torch refuses `view` (in its `accuracy`, a figure that is only shown) it copies. No file of the checkout is
changed.

Shown is the largest difference over all steps, in float32 and in float64. In float64 rounding alone is left of it
(train.py has no float64: for this its `Tensor.float()` stands in as `double()`). In float32 rounding grows from step to
step, for so small a batch quickly: "its rounding" is how far the reference's own losses in float32 are from its losses
in float64.

Parts: v1 (linear head, T 0.07, steps of lr) and v2 (MLP head, T 0.2, cosine); "2:2", both on two ranks; "1:1", both in
one process, where nothing can be shuffled; "1:2", two batch-norm groups in one process of ours against two ranks of
theirs. Statistics are those of rank 0, which are saved; in "1:2" ours are the mean over the groups, and not compared.
The reference moves its key encoder at the start of the next forward pass, so its keys are compared one step later.

The way back: its main_lincls.py, whole, for one epoch on our `transfer.export --format moco`, with its checks of
missing keys and of unchanged weights; the logits of its every forward pass beside those of our encoder.

The last line is one JSON object. Exit code 1 when a difference in float64 is above 1e-9, or the way back fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.hardware import hardware  # noqa: E402
from benchmarks.reference_ranks import (  # noqa: E402
    BATCH,
    CASES,
    QUANTITIES,
    Case,
    difference,
    in_ranks,
    linear,
    record,
    replay,
)
from pipeline import files  # noqa: E402

LIMIT = 1e-9  # in float64


def losses_apart(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Rank by rank, [ranks][steps]; the means over ranks when there are not as many."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return difference(a, b) if len(a) == len(b) else difference(a.mean(dim=0), b.mean(dim=0))


def draw_images(folder: Path, count: int) -> None:
    """Smooth noise as PNG: any images do."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")


def git(checkout: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def run_case(
    case: Case, checkout: Path, shards: Path, folder: Path
) -> tuple[dict[str, float | None], list[list[float]]]:
    """The largest difference by quantity, None for what is not compared; and the reference's losses, [ranks][steps]."""
    in_ranks(record, case.ours, folder / "ours.log", case, shards, folder)
    in_ranks(replay, case.theirs, folder / "theirs.log", case, checkout, folder)
    ours = [torch.load(folder / f"rank{i}.pt")["losses"] for i in range(case.ours)]
    theirs = [json.loads((folder / f"losses{i}.json").read_text()) for i in range(case.theirs)]
    found = {"loss": losses_apart(ours, theirs), **json.loads((folder / "differences.json").read_text())}
    return (found if case.ours == case.theirs else found | {"statistics": None}), theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moco", type=Path, required=True, help="work tree of the reference code, at 7397dfe")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of each training, an even number")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the trainings")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    o = parser.parse_args()
    checkout = o.moco.resolve()
    for name in ("moco/builder.py", "main_moco.py", "main_lincls.py"):
        if not (checkout / name).is_file():
            parser.error(f"{o.moco} has no {name}: give a work tree of facebookresearch/moco at 7397dfe")
    if o.steps < 2 or o.steps % 2:
        parser.error(f"--steps is {o.steps}; two epochs of equal length need an even number")
    began, results, back = time.monotonic(), dict[str, dict[str, float | None]](), dict[str, Any]()
    facts = hardware("cpu")
    reference = {"commit": git(checkout, "rev-parse", "--short", "HEAD")}
    print(
        f"ResNet-18, 32 pixels, batch {BATCH}, {o.steps} steps; reference {reference['commit']}; "
        f"torch {facts['torch']}, gloo, {facts['cpu_cores']} cores"
    )
    print(f"{'':<18}" + "".join(f"{name:>18}" for name in QUANTITIES), flush=True)
    losses = dict[str, list[list[float]]]()
    with tempfile.TemporaryDirectory(prefix="against_reference-") as name:
        work = Path(name)
        images, shards = work / "images", work / "shards"
        draw_images(images / "train", BATCH * o.steps // 2)
        make = [sys.executable, "pipeline/make_shards.py", str(images / "train"), str(shards)]
        subprocess.run(make, cwd=REPOSITORY, check=True, capture_output=True)
        for split in ("train", "val"):
            draw_images(work / "classes" / split / "one", 8)
        for case in map(CASES.__getitem__, o.only):
            folder = work / case.name.replace(" ", "_").replace(":", "_")
            folder.mkdir()
            results[case.name], losses[case.name] = run_case(case, checkout, shards, folder)
            cells = ("-" if d is None else f"{d:.1e}" for d in results[case.name].values())
            print(f"{case.name:<18}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
            if case.dtype == "float32" and case.version not in back:
                log = folder / "linear.log"
                in_ranks(linear, 1, log, checkout, work / "classes", folder)
                back[case.version] = json.loads((folder / "linear.json").read_text())
                back[case.version]["sanity_check"] = "sanity check passed" in log.read_text()
            shutil.rmtree(folder)
    rounding = {
        name: losses_apart(losses[name], losses[f"{name[:-2]}64"])
        for name in losses
        if name.endswith("32") and f"{name[:-2]}64" in losses
    }
    for name, apart in rounding.items():
        print(f"its rounding, {name}: loss {apart:.1e}")
    for version, found in back.items():
        passed = "passed" if found["sanity_check"] else "FAILED"
        print(f"main_lincls.py on our export, {version}: missing {found['missing']}, unexpected {found['unexpected']};")
        print(f"    sanity check {passed}; logits of {found['passes']} batches at most {found['logits']:.1e} from ours")
    largest = {
        dtype: {
            kind: max((d[kind] or 0.0 for name, d in results.items() if name.endswith(dtype)), default=None)
            for kind in QUANTITIES
        }
        for dtype in ("float32", "float64")
    }
    exact = all((d or 0.0) <= LIMIT for d in largest["float64"].values())
    loads = all(
        found["missing"] == ["fc.bias", "fc.weight"]
        and not found["unexpected"]
        and found["sanity_check"]
        and found["passes"] > 0
        and found["logits"] < 1e-4
        for found in back.values()
    )
    reference["changed_files"] = git(checkout, "status", "--porcelain")
    report = {
        "same": exact and loads, "largest": largest, "cases": results, "loss_by_its_rounding": rounding,
        "main_lincls": back, "steps": o.steps, "batch_size": BATCH, "reference": reference,
        "seconds": round(time.monotonic() - began), "load_average": os.getloadavg(), **facts,
    }  # fmt: skip
    print(json.dumps(report))
    if o.output:
        files.write_atomically(o.output, (json.dumps(report, indent=1) + "\n").encode())
    sys.exit(0 if report["same"] else 1)


if __name__ == "__main__":
    main()
