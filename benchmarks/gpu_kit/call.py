"""Fifteen minutes on a GPU machine that reaches no package index, in five calls; README.md beside this says how.

    python benchmarks/gpu_kit/call.py 1 --parts DIR --output OUT      # then 2 to 5; `more`, `node` if time is left
    python benchmarks/gpu_kit/call.py 1 --parts DIR --output OUT --device cpu     # the rehearsal: the same commands

Each call collects the parts that came with it, and runs its steps, one after another and each with a time limit: one
that hangs or fails does not take the others along. After each step OUTPUT has gpu_CARD_callN.json (versions; for each
step its command, exit code, seconds and last line) and gpu_CARD_callN.txt (all output, as it comes), beside the files
that the steps themselves write. Between calls the state is kept in --state.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
CALLS = ("1", "2", "3", "4", "5", "more", "node")
# Seconds of a whole call, its start and transfers not counted.
SECONDS = {"1": 100.0, "2": 45.0, "3": 185.0, "4": 110.0, "5": 140.0, "more": 180.0, "node": 240.0}
EXTEND = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)  # NVIDIA's other packages lie elsewhere\n"


class Step(NamedTuple):
    name: str
    command: list[str]  # what comes after `python`
    limit: float  # seconds
    needed: bool = False  # the call ends when it fails


@dataclass(frozen=True)
class Size:
    """How large everything is: on a GPU as the claims have it, in the rehearsal as a CPU can do."""

    arch: str = "resnet50"
    image_size: int = 224
    batch_size: int = 256
    precision: str = "bf16"
    count: int = 4000  # images in the shards
    loader_steps: int = 15
    rounds: int = 4
    train_steps: int = 70
    smoke_steps: int = 20
    queue_size: int = 65536
    workers: int = 8  # of pytest


ON_A_CPU = Size("resnet18", 32, 16, "fp32", 100, 2, 2, 14, 2, 128, 1)


def steps(call: str, device: str, state: Path, output: Path, *, ranks: int = 8, patience: float = 1.0) -> list[Step]:
    """The steps of a call, those that decide first."""
    s = ON_A_CPU if device == "cpu" else Size()
    photos, work = state / "site/photos", state / "work"
    native, run = work / "native", work / "run"
    kind = device.partition(":")[0]
    sizes = ["--arch", s.arch, "--image_size", str(s.image_size)]
    gpu = ["benchmarks/gpu.py", "--images", str(photos), "--device", device]
    shards = [*gpu, "--work", str(work), "--count", str(s.count)]
    rows = [*shards, *sizes, "--batch_sizes", str(s.batch_size), "--rounds", str(s.rounds)]
    rows += ["--steps", str(s.loader_steps), "--train_steps", str(s.train_steps), "--output", str(output)]
    alone = ["-m", "pytest", "-q", "-rA", "-m", "gpu", "-p", "no:cacheprovider"]
    together = [*alone, "-n", str(s.workers)]
    train = ["train.py", "--config", "recipes/moco_v2_r50.yaml", "--data", str(native), *sizes, "--num_threads", "2"]
    train += ["--precision", s.precision, "--queue_size", str(s.queue_size), "--trackers", "[]"]
    moco = ["benchmarks/moco_step.py", "--device", kind, *sizes, "--batch_size", str(s.batch_size), "--rounds", "10"]
    moco += ["--queue_size", str(s.queue_size), "--ranks", "1", "--shuffle_ranks"]
    knn = [str(work / "knn/native"), str(work / "knn/short_256")]
    compared = ["--run", str(run), "--knn_train", knn[0], "--knn_val", knn[1]]
    batch = ["--batch_size", str(s.batch_size)]
    if call == "1":
        split = ["benchmarks/batchnorm_launches.py", "--device", kind, *sizes, "--precision", s.precision, *batch]
        split += ["--count_batch", "0", "--rounds", "5", "--output", str(output / f"gpu_{card(state)}_batchnorm.json")]
        return [
            Step("MoCo's own share", [*moco, "--output", str(output / f"gpu_{card(state)}_moco_step")], 80),
            Step("split batch norm", split, 20),
        ]
    if call == "2":
        return [Step("tests of the model", [*alone, "tests/model"], 42)]
    if call == "3":
        smoke = ["-m", "pipeline.loader", "--data", str(native), *batch, "--image_size", str(s.image_size)]
        smoke += ["--device", device, "--num_threads", "2", "--steps", str(s.smoke_steps)]
        judged = ["-m", "transfer.knn", "--run", str(run), "--untrained", "--k", "1"]
        return [
            Step("shards", [*shards, "--prepare"], 40, needed=True),
            Step("smoke", smoke, 60, needed=True),
            Step("tests of the pixels", [*alone, "tests/pixels"], 70),
            Step("tests of training", [*together, "tests/test_train_gpu.py", "-k", "not compiled"], 100),
            Step("the recipe", [*train, *batch, "--out", str(run), "--max_steps", "4"], 50),
            Step("shards for kNN", [*gpu, "--work", str(work / "knn"), "--count", "100", "--prepare"], 30),
            Step("kNN", [*judged, "--train", knn[0], "--val", knn[1]], 40),
            Step("features, roofline", [*rows, *compared, "--parts", "features", "roofline"], 60),
        ]
    if call == "4":
        only = "v2 native (2|16) threads$|v2 short_256 2 threads|hw_decoder_load|fancy|prefetch 4"
        return [Step("loader", [*rows, "--parts", "loader", "--only", only, "--seconds", str(105 * patience)], 109)]
    if call == "5":
        only = f"(constant|shards|torchvision) eager batch {s.batch_size} 2 cores"
        return [Step("training", [*rows, "--parts", "train", "--only", only, "--seconds", str(135 * patience)], 139)]
    if call == "more":
        more = ["--parts", "train", "--only", "cudnn|(constant|shards) compiled", "--turns", "1", "--name", "more"]
        return [
            Step("profile", [*train, *batch, "--out", str(work / "profiled"), "--profile", "10"], 50),
            Step("compiled, cudnn.benchmark", [*rows, *more, "--seconds", str(100 * patience)], 105),
            Step("test of compiling", [*alone, "tests/test_train_gpu.py", "-k", "compiled"], 90),
        ]
    node = ["benchmarks/gpu_kit/node.py", "--ranks", str(ranks), "--device", kind, "--data", str(native), *sizes]
    node += ["--images_per_rank", str(s.batch_size), "--steps", str(s.train_steps), "--output", str(output)]
    node += ["--queue_size", str(s.queue_size), "--seconds", str(100 * patience)]
    return [Step("shards", [*shards, "--prepare"], 40, needed=True), Step("node", node, 200)]


def card(state: Path) -> str:
    return str(json.loads((state / "versions.json").read_text())["card"])


def versions(device: str) -> dict[str, Any]:
    """Hardware and versions, and the modules that the product imports and that are missing."""
    sys.path.insert(0, str(REPOSITORY))

    from benchmarks.hardware import card, hardware, is_installed, processor

    modules = (
        "accelerate braceexpand fsspec hypothesis jsonargparse matplotlib numba numpy nvidia.dali PIL psutil pytest "
        "pytest_timeout safetensors simplejpeg sklearn tensorboard timm torch torchvision tqdm triton webdataset xdist "
        "xxhash yaml"
    )

    asked = "nvidia-smi --query-gpu=driver_version,clocks.max.sm --format=csv,noheader"
    driver = subprocess.run(asked, shell=True, capture_output=True, text=True)
    missing = [module for module in modules.split() if not is_installed(module)]
    facts = {"card": card(device), "cpu": processor(), "driver": driver.stdout.strip()}
    return facts | hardware(device) | {"missing": missing}


def collect(parts: Path | None, state: Path) -> str:
    """Keeps the parts that came, and once all of SHA256 are there, unpacks them into state/site. Says what it did."""
    kept, site = state / "parts", state / "site"
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(parts.iterdir()) if parts is not None and parts.is_dir() else []:
        if path.name == "SHA256" or path.name.startswith("part."):
            shutil.copy(path, kept)
    if site.exists() or not (kept / "SHA256").exists():
        return f"{site} is there" if site.exists() else "no parts yet"
    lines = [text.split() for text in (kept / "SHA256").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    absent = [name for name in sums if not (kept / name).exists()]
    if absent:
        return f"still to come: {', '.join(absent)}"
    for name, expected in sums.items():
        if hashlib.sha256((kept / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{kept / name} is damaged: bring it again")
    unpacked = state / "unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    # Without xz Python does it, with one core.
    unpack = "xz -dc -T0 | tar -x" if shutil.which("xz") else f"{sys.executable} -c '{UNPACK}'"
    subprocess.run(f"cat {kept}/part.* | {unpack}", shell=True, check=True, cwd=unpacked)
    init = unpacked / "nvidia/__init__.py"
    if init.exists():  # else this folder hides the machine's other packages of that name
        init.write_text(init.read_text() + EXTEND)
    unpacked.rename(site)
    return f"unpacked into {site}"


UNPACK = 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(".")'


def with_site(state: Path) -> dict[str, str]:
    """The environment of a step: the repository and what was unpacked importable, the photographs where tests look."""
    paths = [str(REPOSITORY), str(state / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "SHARED_DATA": str(state / "site"),
    }


def run_step(step: Step, log: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Runs it with its output going to the end of `log`; ends it, with all that it started, after `seconds`."""
    began, start = time.monotonic(), log.stat().st_size
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind, too
            process.wait()
    with log.open("rb") as printed:
        printed.seek(start)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    print("\n".join(lines[-25:]), flush=True)
    last: Any = lines[-1] if lines else ""
    with contextlib.suppress(ValueError):
        last = json.loads(last)
    taken = round(time.monotonic() - began, 1)
    return {"command": " ".join(step.command), "exit": code, "seconds": taken, "limit": seconds, "last_line": last}


def run_steps(
    wanted: list[Step], results: dict[str, Any], stem: Path, state: Path, *, seconds: float, patience: float = 1.0
) -> bool:
    """Runs the steps within `seconds`; writes `stem`.json after each. True when all ended with 0."""
    began, log = time.monotonic(), stem.with_suffix(".txt")
    for step in wanted:
        left = seconds - (time.monotonic() - began)
        title = f"\n== {step.name} ({seconds - left:.0f} s of {seconds:.0f}): python {' '.join(step.command)}\n"
        print(title, end="", flush=True)
        with log.open("a") as out:
            out.write(title)
        if left < 5:
            found: dict[str, Any] = {"exit": "not begun: the time is up"}
        else:
            found = run_step(step, log, with_site(state), min(patience * step.limit, left))
        results["steps"][step.name] = found
        print(f"-- {step.name}: exit {found['exit']}, {found.get('seconds', 0)} s", flush=True)
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        if step.needed and found["exit"] != 0:
            print(f"{step.name} failed: the rest of this call would fail too", flush=True)
            break
    return len(results["steps"]) == len(wanted) and all(s["exit"] == 0 for s in results["steps"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=(*CALLS, "versions"))
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the results, which comes back")
    parser.add_argument("--parts", type=Path, help="folder with the parts that came with this call")
    kept = Path(tempfile.gettempdir()) / "gpu_kit"
    parser.add_argument("--state", type=Path, default=kept, help="folder that is kept between calls")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu for the rehearsal")
    parser.add_argument("--ranks", type=int, default=8, help="of the call `node`")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies all time limits, for the rehearsal")
    o = parser.parse_args()
    if o.call == "versions":
        print(json.dumps(versions(o.device)))
        return
    state, output = o.state.resolve(), o.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    said = collect(o.parts, state)
    print(said, flush=True)
    known = state / "versions.json"
    if not known.exists() or said.startswith("unpacked"):  # now with DALI's version
        me = [sys.executable, __file__, "versions", "--device", o.device]
        asked = subprocess.run(me, env=with_site(state), stdout=subprocess.PIPE, text=True, check=True)
        known.write_text(asked.stdout.splitlines()[-1])
    results: dict[str, Any] = {"versions": json.loads(known.read_text()), "parts": said, "steps": {}}
    stem = output / f"gpu_{card(state)}_call{o.call}"
    header = f"{json.dumps(results['versions'])}\n{said}\n"
    stem.with_suffix(".txt").write_text(header)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(header, flush=True)
    seconds = o.patience * SECONDS[o.call] - (time.monotonic() - began)
    wanted = steps(o.call, o.device, state, output, ranks=o.ranks, patience=o.patience)
    whole = run_steps(wanted, results, stem, state, seconds=seconds, patience=o.patience)
    for path in sorted(output.glob("gpu_*.txt")):
        if path != stem.with_suffix(".txt"):
            print(f"\n{path.name}\n{path.read_text()}", flush=True)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
