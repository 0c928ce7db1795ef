"""A folder of awkward files among good ones, through ours and what people use instead: who crashes, hangs, shows other
pixels than a viewer does, loses samples, or asks for gigabytes.

    python benchmarks/bad_data.py DIR [--images DIR] [--peers FOLDER] [--output benchmarks/results/bad_data]

1. Truth: each file as Pillow shows it: decoded, upright as its EXIF says, RGB, whole, at 64 x 64 pixels.
2. Singly: each awkward file among eleven good ones, in three batches of four, in a process of its own, so that what
   happens there is that file's doing. The process may take `--seconds` of the processor and `--memory_gb`.
3. Together: all awkward files shuffled among `--good` good ones, in batches of 16.

Each system decodes whole images and resizes them to 64 x 64 in its own way; what comes out is compared with the truth.
A sample is wrong when its pixels are more than 2 levels of 255 from it in the mean. Files are renamed (f00000.jpg and
so on, with their own extension), so names are no trouble here. The good images are drawn, or taken from `--images`.
LitData runs under the Python of FOLDER/litdata, where there is one: an environment after benchmarks/peers/litdata.txt.
Ours without verification has max_bad_fraction 1, since the default would end a run with so many bad images, by design.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from benchmarks.bad_data_judge import OUTCOMES, TOLERANCE, Truth, Verdict, judge, row  # noqa: E402 - as a script
from benchmarks.bad_data_systems import NUMBER, RECORD  # noqa: E402
from benchmarks.bad_data_watch import Ended, Limits, NotInstalled, Server  # noqa: E402
from benchmarks.hardware import hardware, processor  # noqa: E402
from pipeline.sources.index import format_index, index_tar  # noqa: E402

NAMES = {
    "ours": "ours: make_shards, loader",
    "ours_unchecked": "ours: make_shards --no_verify, loader",
    "dali_file": "DALI readers.file + decoders.image",
    "dali_webdataset": "DALI readers.webdataset + decoders",
    "webdataset": "webdataset + PIL",
    "webdataset_continue": "webdataset + PIL, warn_and_continue",
    "torchvision": "torchvision ImageFolder + DataLoader",
    "litdata": "LitData optimize, StreamingDataLoader",
}
MARKS = dict(zip(OUTCOMES, "..TWBlLXSHM"))
PACKAGES = ("pillow", "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset", "litdata")
BESIDE, BATCH = 11, 4  # good files beside an awkward one
TOGETHER_BATCH, PER_SHARD = 16, 64
LEGEND = (
    f"ends the epoch: by an exception or a signal. wrong pixels: more than {TOLERANCE:g} levels of 255 from Pillow's,",
    "in the mean of a whole image. lost: did not come out though Pillow opens them (silent: nothing named them).",
    f"bad ones delivered: Pillow refuses them. good lost beside one: at most, of {BESIDE}. MB: PSS of all processes.",
)
PATH = re.compile(r" \S*/\S+")  # in messages: files have other names in the run
LONGER = 10  # times as long as a single file all of them together may take


class Case(NamedTuple):
    """Files that are loaded together, in the order of their numbers."""

    name: str
    files: list[Path]
    awkward: list[int]


def awkward_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files in and below `folder` that are images by their names, and the names of the others."""
    Image.init()
    known = set(Image.registered_extensions()) | {".heic", ".heif", ".jpg"}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in known]
    return images, [str(path.relative_to(folder)) for path in files if path not in set(images)]


def drawn(folder: Path, count: int, rng: np.random.Generator) -> list[Path]:
    """`count` JPEG files of smooth colours, 300 to 500 pixels a side."""
    paths = []
    for number in range(count):
        width, height = rng.integers(300, 500, 2).tolist()
        image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        path = folder / f"good{number:05d}.jpg"
        image.save(path, quality=90)
        paths.append(path)
    return paths


def jpegs(folder: Path, count: int) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]


def version_in(python: str, package: str) -> str:
    """The version of a package in another environment, "" when it is not there."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def make_cases(
    awkward: Sequence[Path], folder: Path, good: Sequence[Path], singly: int, rng: np.random.Generator
) -> list[Case]:
    """All together; good ones alone; each awkward file in the second of three batches, `singly` of them at most."""
    everything = [*awkward, *good]
    order = rng.permutation(len(everything)).tolist()
    cases = [
        Case("together", [everything[i] for i in order], [n for n, i in enumerate(order) if i < len(awkward)]),
        Case("good alone", list(good[: BESIDE + 1]), []),
    ]
    for i in sorted(rng.permutation(len(awkward))[:singly].tolist()):
        files = [good[j] for j in rng.permutation(len(good))[:BESIDE].tolist()]
        place = BATCH + int(rng.integers(BATCH))
        files.insert(place, awkward[i])
        cases.append(Case(str(awkward[i].relative_to(folder)), files, [place]))
    return cases


def prepared(case: Case, folder: Path, batch: int, together: bool) -> dict[str, Any]:
    """The job of a case: its files in a class folder and, the same, in WebDataset shards with their indexes."""
    images = folder / "images" / "photos"
    images.mkdir(parents=True)
    tars, indexes, paths = [], [], []
    for number, path in enumerate(case.files):
        copy = images / f"f{number:05d}{path.suffix}"
        shutil.copyfile(path, copy)
        paths.append(str(copy))
    extensions = sorted({path.suffix[1:].lower() for path in case.files})
    for begin in range(0, len(paths), PER_SHARD):
        tar_path = folder / f"{begin // PER_SHARD:06d}.tar"
        with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in map(Path, paths[begin : begin + PER_SHARD]):
                member = tarfile.TarInfo(path.stem + path.suffix.lower())
                content = path.read_bytes()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        index = tar_path.with_suffix(".idx")
        index.write_bytes(format_index(index_tar(tar_path)))
        tars.append(str(tar_path))
        indexes.append(str(index))
    return {
        "folder": str(images.parent), "paths": paths, "tars": tars, "indexes": indexes,
        "extensions": ";".join(extensions), "batch": batch, "together": together,
    }  # fmt: skip


def run(server: Server, job: dict[str, Any], limits: Limits) -> tuple[Ended, dict[int, list[np.ndarray]], set[int]]:
    """How the job ended, what came out of it by the number of its file, and the files that were named in its output."""
    with tempfile.TemporaryDirectory(dir=server.folder) as name:
        scratch = Path(name)
        places = {place: str(scratch / place) for place in ("output", "log", "error")}
        (scratch / "work").mkdir()
        ended = server.run({**job, **places, "scratch": str(scratch / "work")}, limits)
        output, log = scratch / "output", scratch / "log"
        content = output.read_bytes() if output.exists() else b""
        records: Any = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)
        delivered: dict[int, list[np.ndarray]] = defaultdict(list)
        for number, pixels in zip(records["number"].tolist(), records["pixels"]):
            delivered[number].append(pixels)
        said = {int(found) for found in NUMBER.findall(log.read_text(errors="replace") if log.exists() else "")}
        return ended, delivered, said


def truth_of(case: Case, job: dict[str, Any], server: Server, limits: Limits) -> dict[Path, np.ndarray | str]:
    """Pillow's pixels of each file of a case, or why it refuses it."""
    truth: dict[Path, np.ndarray | str] = {}
    for number, path in enumerate(case.files):
        ended, delivered, _ = run(server, {**job, "paths": [job["paths"][number]]}, limits)
        truth[path] = delivered[number][0] if delivered else PATH.sub("", ended.message) or ended.how
    return truth


def through(
    system: str, python: str, cases: Sequence[tuple[Case, dict[str, Any], Truth]], scratch: Path, limits: Limits
) -> dict[str, Any]:
    """All cases through a system: the counts of `row`, what became of each file, all together, memory."""
    folder = scratch / system
    folder.mkdir()
    try:
        server = Server(system, python, folder)
    except NotInstalled as missing:
        return {"not_installed": str(missing)}
    singly: dict[str, Verdict] = {}
    files: dict[str, Any] = {}
    found: dict[str, Any] = {}
    began = time.monotonic()
    try:
        for case, job, truth in cases:
            longer = LONGER if job["together"] else 1
            within = limits._replace(processor=longer * limits.processor, clock=longer * limits.clock)
            ended, delivered, said = run(server, job, within)
            verdict = judge(case.awkward, truth, delivered, sorted(said), ended.how)
            of_good = {"good_delivered": verdict.good_delivered, "good_wrong": verdict.good_wrong}
            of_good["good"] = len(case.files) - len(case.awkward)
            how = {"ended": ended.how, "message": PATH.sub("", ended.message)[:200], "megabytes": ended.megabytes}
            if case.awkward and not job["together"]:
                singly[case.name] = verdict
                files[case.name] = {"outcome": verdict.outcomes[case.awkward[0]], **of_good, **how}
            else:
                outcomes = {case.files[number].name: outcome for number, outcome in verdict.outcomes.items()}
                odd = {name: outcome for name, outcome in outcomes.items() if MARKS[outcome] != "." and not ended.how}
                of_awkward = {"awkward": dict(Counter(outcomes.values())), "odd": odd} if case.awkward else {}
                found["together" if case.awkward else "good_alone"] = {**of_good, **how, **of_awkward}
    finally:
        server.close()
    worst = max(files, key=lambda name: files[name]["megabytes"], default="")
    found |= {"megabytes_at_most": files[worst]["megabytes"] if worst else 0, "megabytes_for": worst}
    return {**row(singly, BESIDE), **found, "seconds": round(time.monotonic() - began), "files": files}


def table(found: dict[str, Any], about: dict[str, Any]) -> str:
    readable = about["pillow_opens"]
    lines = [
        f"{about['awkward']} awkward files ({readable} that Pillow opens, the others it refuses), "
        f"each among {BESIDE} good ones; together among {about['good']}",
        f"{about['cpu']}, {about['cpu_cores']} cores, load {about['load']}; Python {about['python']}, "
        + ", ".join(f"{name} {about[name]}" for name in PACKAGES if about.get(name))
        + f"; {about['date']}",
        "",
        f"{'':36s} {'ends the':>8s} {'':>5s} {'over':>5s} {'wrong pixels':>14s} {'lost':>9s} {'bad ones':>9s} "
        f"{'good lost':>10s} {'good, of all':>13s} {'MB: good':>8s} {'at':>6s}",
        f"{'':36s} {'epoch':>8s} {'hangs':>5s} {about['memory_gb']:>2g} GB {'(only turned)':>14s} {'(silent)':>9s} "
        f"{'delivered':>9s} {'beside one':>10s} {'together':>13s} {'alone':>8s} {'most':>6s}",
    ]
    for system, values in found.items():
        name = NAMES[system]
        if "not_installed" in values:
            lines.append(f"{name:36s} not installed: {values['not_installed']}")
            continue
        together = values["together"]
        wrong = f"{values['wrong_pixels']} ({values['turned']})"
        lost = f"{values['lost']} ({values['lost_silently']})"
        good = f"{together['good_delivered']} of {together['good']}"
        lines.append(
            f"{name:36s} {values['crashes']:8d} {values['hangs']:5d} {values['over_memory']:5d} {wrong:>14s} "
            f"{lost:>9s} {values['bad_delivered']:9d} {values['good_lost_at_most']:10d} {good:>13s} "
            f"{values['good_alone']['megabytes']:8d} {values['megabytes_at_most']:6d}"
        )
    return "\n".join([*lines, "", *LEGEND])


def each_file(found: dict[str, Any], truth: dict[str, str]) -> str:
    """A line for each awkward file that is not as it should be in some system."""
    systems = [system for system in found if "not_installed" not in found[system]]
    lines = [
        "each awkward file among good ones: . as it should be, T turned, W wrong pixels, l lost and said,",
        "L lost in silence, B delivered though Pillow refuses it, X ended the epoch by an exception,",
        "S died of a signal, H hung, M took too much memory",
        *(f"{'|' * i}{' ' * (i > 0)}{NAMES[system]}" for i, system in enumerate(systems)),
        "",
    ]
    for name in found[systems[0]]["files"] if systems else ():
        marks = "".join(MARKS[found[system]["files"][name]["outcome"]] for system in systems)
        if set(marks) != {"."}:
            lines.append(f"{marks}  {name}" + (f"  (Pillow: {truth[name][:60]})" if truth[name] else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("dir", type=Path, help="the awkward files; folders in it are looked into")
    parser.add_argument("--images", type=Path, help="JPEG files that serve as good ones; when left out they are drawn")
    parser.add_argument("--good", type=int, default=240, help="good files among which all awkward ones are shuffled")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES), help="those to run")
    parser.add_argument("--peers", type=Path, default=REPOSITORY / ".peers", help="folder of the peers' environments")
    parser.add_argument("--singly", type=int, default=150, help="of more awkward files only so many run singly too")
    parser.add_argument(
        "--seconds", type=float, default=30, help="of the processor for a file; twice that on the clock"
    )
    parser.add_argument("--memory_gb", type=float, default=4, help="for a system's processes, PSS")
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="systems at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the good images and the order")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.txt and OUTPUT.json")
    args = parser.parse_args()
    own = args.peers / "litdata" / "bin" / "python"
    litdata = str(own) if own.exists() else sys.executable
    rng = np.random.default_rng(args.seed)
    awkward, others = awkward_files(args.dir)
    if not awkward:
        parser.error(f"no image files in {args.dir}")
    if others:
        print(f"left out, no images by their names: {len(others)} ({', '.join(others[:5])} ...)", file=sys.stderr)
    limits = Limits(args.seconds, 2 * args.seconds, int(args.memory_gb * 1e9))
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="bad_data-") as name:
        scratch = Path(name)
        (scratch / "good").mkdir()
        good = jpegs(args.images, args.good) if args.images else drawn(scratch / "good", args.good, rng)
        if len(good) <= BESIDE:
            parser.error(f"{len(good)} good images, at least {BESIDE + 1} are needed")
        cases = make_cases(awkward, args.dir, good, args.singly, rng)
        jobs = []
        for i, case in enumerate(cases):
            batch = TOGETHER_BATCH if case.name == "together" else BATCH
            jobs.append(prepared(case, scratch / f"case{i}", batch, case.name == "together"))
        (scratch / "pillow").mkdir()
        server = Server("pillow", sys.executable, scratch / "pillow")
        known = truth_of(cases[0], jobs[0], server, limits)
        server.close()
        if broken := [path.name for path in good if isinstance(known[path], str)]:
            parser.error(f"{broken[0]} and {len(broken) - 1} more of the good images do not decode")
        truths = [dict(enumerate(known[path] for path in case.files)) for case in cases]

        def one(system: str) -> dict[str, Any]:
            python = litdata if system == "litdata" else sys.executable
            result = through(system, python, list(zip(cases, jobs, truths)), scratch, limits)
            print(f"{NAMES[system]}: {result.get('seconds', 0)} s", file=sys.stderr, flush=True)
            return result

        with ThreadPoolExecutor(args.jobs) as pool:
            found = dict(zip(args.systems, pool.map(one, args.systems)))
    about = {
        "cpu": processor(), **hardware("cpu"), "litdata": version_in(litdata, "litdata"), "load": load,
        "date": time.strftime("%Y-%m-%d"), "awkward": len(awkward), "good": len(good), "folder": args.dir.name,
        "pillow_opens": sum(not isinstance(known[path], str) for path in awkward), "memory_gb": args.memory_gb,
        "seconds": args.seconds, "images": "drawn" if args.images is None else args.images.name, "seed": args.seed,
    }  # fmt: skip
    report = table(found, about)
    print(report)
    print(json.dumps({system: {k: v for k, v in row.items() if k != "files"} for system, row in found.items()}))
    if args.output:
        refused = {str(p.relative_to(args.dir)): t if isinstance(t := known[p], str) else "" for p in awkward}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".txt").write_text(f"{report}\n\n{each_file(found, refused)}\n")
        for values in found.values():  # the others are as they should be
            files = values.get("files", {}).items()
            values["files"] = {name: file for name, file in files if MARKS[file["outcome"]] != "."}
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "systems": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
