"""The memory of make_shards on a million listed images: does it grow with the collection?

    python benchmarks/million.py PHOTOS [--images 1000000] [--work FOLDER] [--output FILE]

Hard links to the photographs, a thousand a class folder, are packed with `--short_side 64` (their bytes as they are
would be over 100 GB), with all of the real work: listing, decoding, shrinking, writing, the final checks. Every process
is looked at once a second. RSS counts pages that processes share once in each; `own` is what each adds (USS).
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pipeline.sources.manifest import load_manifest

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1e6


def link(photos: Path, src: Path, images: int, each: int = 1000) -> None:
    names = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    if not names:
        raise SystemExit(f"error: no .jpg in {photos}")
    for first in range(0, images, each):
        folder = src / f"class_{first // each:04d}"
        folder.mkdir(parents=True)
        for i in range(first, min(first + each, images)):
            os.link(names[i % len(names)], folder / f"{i:07d}.jpg")


def watch(command: list[str]) -> dict[str, object]:
    """Runs make_shards; peaks in MB of each kind of process, seconds."""
    peak: dict[str, float] = defaultdict(float)
    begin = time.monotonic()
    with psutil.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            total = 0.0
            for each in [process, *children(process)]:
                try:
                    memory = each.memory_full_info()
                except psutil.Error:  # it has ended
                    continue
                kind = "parent" if each.pid == process.pid else "worker or fork server"
                peak[f"{kind}, RSS"] = max(peak[f"{kind}, RSS"], memory.rss / MEGABYTE)
                peak[f"{kind}, own"] = max(peak[f"{kind}, own"], memory.uss / MEGABYTE)
                total += memory.pss / MEGABYTE
            peak["all together (PSS)"] = max(peak["all together (PSS)"], total)
            time.sleep(1)
        if process.returncode:
            raise SystemExit(f"make_shards ended with {process.returncode}")
    return {"peak_megabytes": {k: round(v) for k, v in peak.items()}, "seconds": round(time.monotonic() - begin)}


def children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)  # type: ignore[no-any-return]
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="on a file system with 8 GB and 1.1 million inodes free")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = []
    for images in (arguments.images // 50, arguments.images):
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            # Once copied, so that links work: the photographs may lie on another file system.
            photos = Path(shutil.copytree(arguments.photos, Path(folder) / "photos"))
            src, dest = Path(folder) / "src", Path(folder) / "dest"
            link(photos, src, images)
            command = [sys.executable, "pipeline/make_shards.py", str(src), str(dest), "--short_side", "64"]
            row = watch([*command, "--workers", str(arguments.workers)])
            manifest = load_manifest(str(dest / "manifest.json"))
            row = {"images": images, "packed": manifest.samples, "shards": len(manifest.shards), **row}
            print(json.dumps(row), flush=True)
            runs.append(row)
    report = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "workers": arguments.workers,
        "load_average": os.getloadavg(),
        "runs": runs,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
