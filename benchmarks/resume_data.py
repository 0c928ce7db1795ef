"""The samples of `resume.py`: small JPEGs from any folder of images, packed for each system, and served over HTTP."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageChops

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 64


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def last_line(text: str) -> str:
    """An error's own words in what a process said."""
    return (text.strip().splitlines() or ["no word of it"])[-1][:300]


def small_images(folder: Path, count: int) -> list[Image.Image]:
    """The first `count` files of the folder that Pillow opens, in the order of their names, SIDE x SIDE pixels."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                found.append(image.convert("RGB").resize((SIDE, SIDE)))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if len(found) == count:
            break
    return found


def write_images(images: list[Image.Image], folder: Path, start: int, count: int) -> None:
    """`count` JPEGs that are all different: the images over and over, each time moved a little."""
    folder.mkdir(parents=True)
    for i in range(start, start + count):
        turn = i // len(images)
        image = ImageChops.offset(images[i % len(images)], 7 * turn % SIDE, 3 * turn % SIDE) if turn else images[i]
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        (folder / f"{i - start:06d}.jpg").write_bytes(encoded.getvalue())


def pack(images: Path, shards: Path, a_shard: int = 250) -> None:
    command = [sys.executable, "pipeline/make_shards.py", str(images), str(shards), "--samples_per_shard", str(a_shard)]
    subprocess.run([*command, "--workers", "1"], cwd=REPOSITORY, check=True, capture_output=True)


def make_data(images: list[Image.Image], work: Path, systems: list[str]) -> None:
    for samples in (3000, 3001):
        write_images(images, work / f"images{samples}", 0, samples)
        if "ours" in systems:
            pack(work / f"images{samples}", work / "served" / f"shards{samples}")
    if "ours" in systems:
        write_images(images, work / "images1000", 5000, 1000)
        pack(work / "images1000", work / "served" / "shards1000")
        (work / "served" / "mixture.yaml").write_text(
            "sources:\n  - {data: shards3000, weight: 1, name: a}\n  - {data: shards1000, weight: 2, name: b}\n"
        )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server of `folder` on loopback that goes wrong at times; its address."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "servers.py"), "http", str(folder), "0"]
    command += ["--latency", "0.002", "--busy_every", "7", "--reset_every", "11", "--short_every", "13"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.terminate()
        server.wait()


def write_for(system: str, python: Path, work: Path) -> str:
    """Has a peer write the samples in its own format; its error where it could not, "" when all went well."""
    for samples in (3000, 3001):
        images, data = work / f"images{samples}", work / f"{system}{samples}"
        command = [str(python), str(REPOSITORY / "benchmarks" / "resume_peers.py"), system, str(images), str(data)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        if done.returncode:
            return last_line(done.stderr)
    return ""
