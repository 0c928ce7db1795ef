"""Does a long training grow? Memory, files and threads of its processes over thousands of steps, saves and kNN passes.

    python benchmarks/soak.py [--steps 6000] [--ranks 1] [--output FILE]

A tiny network on pages of letters: what could leak is the loop, the loader, the checkpoints and the kNN monitor,
and they are those of any training. Looked at once a second, shown as a row for each tenth of the run: the least and the
most of the largest rank. Anonymous memory is what a process adds (shards are mapped files).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
FIELDS = "--arch timm:test_resnet --image_size 32 --batch_size 32 --bn_groups 4 --queue_size 256 --dim 16 --views cifar"
OPTIONS = (
    "--epochs 1000 --log_every 5 --save_every 25 --knn_every 4 --num_threads 1 --precision fp32 --lr 0.03 --trackers []"
)


def look(processes: list[psutil.Process]) -> dict[str, float]:
    """The most of any rank."""
    anonymous = [(m := p.memory_full_info()).rss - m.shared for p in processes]
    return {
        "anonymous_mb": max(anonymous) / 1e6,
        "files": max(p.num_fds() for p in processes),
        "threads": max(p.num_threads() for p in processes),
    }


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The launcher itself when it is the only rank."""
    below = [p for p in launcher.children(recursive=True) if "train.py" in p.cmdline()]
    return below or [launcher]


def train(command: list[str], out: Path) -> list[dict[str, float]]:
    """Runs a training; a row a second with its newest logged step."""
    samples = []
    environment = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    with (out.parent / "log").open("w") as log:
        launcher = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while launcher.poll() is None:
            time.sleep(1)
            try:
                lines = (out / "metrics.jsonl").read_text().splitlines()
                sample = {"step": json.loads(lines[-1])["step"], **look(ranks_of(launcher))}
                if sample["anonymous_mb"]:  # else it is ending
                    samples.append(sample)
            except (OSError, ValueError, IndexError, psutil.Error):
                continue  # before the first line, or after the end
    if launcher.returncode:
        raise SystemExit(f"the training ended with {launcher.returncode}: {(out.parent / 'log').read_text()[-2000:]}")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, shards, out = (Path(folder) / name for name in ("images", "shards", "run"))
        subprocess.run([sys.executable, "benchmarks/letters.py", images], cwd=ROOT, check=True)
        for split in ("train", "val"):
            make = [sys.executable, "pipeline/make_shards.py", str(images / split), str(shards / split)]
            subprocess.run(make, cwd=ROOT, check=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
        command = [sys.executable, *(launcher if arguments.ranks > 1 else []), "train.py", *FIELDS.split()]
        command += [*OPTIONS.split(), "--data", str(shards / "train"), "--knn_data", str(shards / "val")]
        began = time.monotonic()
        samples = train([*command, "--max_steps", str(arguments.steps), "--out", str(out)], out)
        left = [p.name for p in out.rglob("*") if p.suffix == ".tmp"]
    rows = []
    for tenth in range(10):
        part = [s for s in samples if tenth * arguments.steps < 10 * s["step"] <= (tenth + 1) * arguments.steps]
        names = ("anonymous_mb", "files", "threads") if part else ()
        spans = {name: [round(f(s[name] for s in part)) for f in (min, max)] for name in names}
        rows.append({"to_step": (tenth + 1) * arguments.steps // 10, "seconds": len(part), **spans})
        print(rows[-1])
    report = {
        "steps": arguments.steps, "ranks": arguments.ranks, "seconds": round(time.monotonic() - began),
        "cores": os.cpu_count(), "load_average": os.getloadavg(), "left_over": left, "rows": rows,
    }  # fmt: skip
    print(json.dumps(report))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
