"""Ranks that load batches are killed (SIGKILL) at random moments and continue, on as many ranks or on others, from what
the system itself saved: what is lost, what repeated, what changed?

    python benchmarks/resume.py --images DIR --systems ours,webdataset --kills 20 [--peers FOLDER] [--output FILE]
    python benchmarks/resume.py --install_peers [--systems ...] [--peers FOLDER]

DIR is any folder of images; few are taken over and over, moved a little each time. 3,000 samples, and 3,001, whose last
one fills no batch, of 64 pixels; global batch 24; two whole epochs a run, so that the one after a kill counts too. Each
run is compared with one that was never killed. Every system decodes each sample and makes two views of it, 32 pixels.
`resume_systems.py` says how each system is configured, with the line of its documentation that it follows;
`resume_ranks.py` how ranks are started and killed. State is saved every 1 to 9 batches, so that the rest of the epoch
divides by ranks and workers after some kills and not after others.

Ours: kills are dealt to five cases: 3,000 and 3,001 samples, a mixture of two sources, HTTP (a server on loopback that
is busy, breaks off, or sends too little; the cache is kept by every other run and lost by the others), and steps of
four batches. A run is killed up to ten times, on 1, 2 or 4 ranks, every fourth time near an epoch's end. One kill in
eight also tears the newest checkpoint. Peers: one kill a run, from 2 ranks, every other time to 2 again, else to 4
or 1; local data alone.

A peer runs under the Python of FOLDER/NAME, an environment that --install_peers makes from benchmarks/peers/NAME.txt,
or under this one where there is none. The last line is one JSON object, with a key a system.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.resume_data import environment, last_line, make_data, serving, small_images, write_for  # noqa: E402

PEERS = REPOSITORY / "benchmarks" / "peers"
SYSTEMS = ("ours", "webdataset", "torchdata", "litdata", "streaming", "energon", "lancedb")
BATCH, EPOCHS, A_RUN = 24, 2, 10
SUMS = ("lost", "repeated", "batches", "order_changed", "members_changed", "samples", "views_changed", "uneven")


# --- plans ------------------------------------------------------------------------------------------------------------


def draw_kill(rng: random.Random, world: int, low: int, high: int) -> dict[str, Any]:
    return {
        "step": rng.randrange(low, max(low + 1, high)),
        "rank": rng.randrange(world),
        "who": rng.choices(["all", "one", "time"], [60, 25, 15])[0],
        "delay": rng.uniform(0, 0.02),
        "after": rng.uniform(0.02, 1.5),  # seconds after the start, for "time"
        "tear": False,
        "wipe": False,
    }


def draw_chain(rng: random.Random, count: int, steps: int, worlds: list[int], *, number: int) -> dict[str, Any]:
    """A run of `steps` steps an epoch with `count` kills, in both epochs, every fourth near the end of the first."""
    kills = [draw_kill(rng, worlds[i], 2, EPOCHS * steps - 1) for i in range(count)]
    for i, kill in enumerate(kills):
        if (number + i) % 4 == 3:
            kill["step"] = steps + rng.randrange(-4, 5)
    spread = sorted(kill["step"] for kill in kills)
    for kill, step in zip(kills, spread):
        kill["step"] = step
    return {
        "worlds": worlds, "kills": kills, "save_every": rng.randrange(1, 10), "accumulate": 1, "seed": number,
    }  # fmt: skip


def our_plans(work: Path, url: str, count: int, rng: random.Random) -> list[dict[str, Any]]:
    served = work / "served"
    plans = [
        plan_for("ours", str(served / "shards3000"), 3000, [1, 2, 4]),
        plan_for("ours", str(served / "shards3001"), 3001, [1]),
        plan_for("ours", str(served / "mixture.yaml"), 4000, [1], mixture=True),
        plan_for("ours", f"{url}/shards3000", 3000, [1]),
    ]
    cases = [
        ("3,000 samples", 0),
        ("3,001 samples", 1),
        ("mixture", 2),
        ("HTTP with faults", 3),
        ("steps of 4 batches", 0),
    ]
    for number, (name, place) in enumerate(cases):
        plan = plans[place]
        left, runs = count // len(cases) + (number < count % len(cases)), 0
        while left:
            kills = min(A_RUN, left)
            worlds = [rng.choice([1, 2, 4]) for _ in range(kills + 1)]
            chain = draw_chain(rng, kills, plan["samples"] // BATCH, worlds, number=runs)
            chain |= {"case": name, "accumulate": 4 if name == "steps of 4 batches" else 1}
            for kill in chain["kills"]:
                kill |= {"tear": rng.random() < 1 / 8, "wipe": plan["data"].startswith("http") and runs % 2 == 1}
            plan["chains"].append(chain)
            left, runs = left - kills, runs + 1
    return [plan for plan in plans if plan["chains"]]


def peer_plans(system: str, work: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Same and other number of ranks, 3,000 and 3,001 samples, in turn; each uninterrupted run is made twice."""
    plans = []
    for samples in (3000, 3001):
        plan = plan_for(system, str(work / f"{system}{samples}"), samples, [2, 2])
        for number in range(count):
            if (number // 2) % 2 == (samples == 3001):
                worlds = [2, 2 if number % 2 == 0 else (4, 1)[number // 4 % 2]]
                chain = draw_chain(rng, 1, samples // BATCH, worlds, number=number)
                chain["case"] = f"{samples:,} samples, {'same' if worlds == [2, 2] else 'other'} ranks"
                plan["chains"].append(chain)
        plans.append(plan)
    return [plan for plan in plans if plan["chains"]]


def plan_for(
    system: str, data: str, samples: int, uninterrupted: list[int], *, mixture: bool = False
) -> dict[str, Any]:
    return {
        "system": system, "data": data, "samples": samples, "batch": BATCH, "epochs": EPOCHS, "chains": [],
        "workers": 0 if system == "ours" else 2, "uninterrupted": uninterrupted, "mixture": mixture, "whole_run": False,
    }  # fmt: skip


# --- running and summing up -------------------------------------------------------------------------------------------


def python_of(system: str, peers: Path) -> Path:
    own = peers / system / "bin" / "python"
    return own if system != "ours" and own.is_file() else Path(sys.executable)


def run_plan(plan: dict[str, Any], python: Path, work: Path) -> list[dict[str, Any]]:
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({**plan, "work": str(folder)}))
    command = [str(python), str(REPOSITORY / "benchmarks" / "resume_ranks.py"), str(folder / "plan.json")]
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        ) as child,
    ):
        assert child.stdout is not None
        said = []
        for line in child.stdout:
            said.append(json.loads(line))
            if "chain" in said[-1]:
                print(".", end="", flush=True, file=sys.stderr)
    if child.returncode:
        said.append({"failed": last_line((folder / "errors").read_text())})
    return said


def sum_up(chains: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a cell, from what `resume_ranks.py` said of each run."""
    kills = [kill for chain in chains for kill in chain["kills"]]
    ended = [chain for chain in chains if not chain["refused"]]
    seconds = [kill["seconds"] for kill in kills if "seconds" in kill]
    found: dict[str, Any] = {"kills": len(kills), "refused": len(chains) - len(ended)}
    found |= {name: sum(chain[name] for chain in ended) for name in SUMS}
    if seconds:
        found |= {"first_batch_s": round(statistics.median(seconds), 3), "first_batch_s_max": round(max(seconds), 3)}
    read = [kill["bytes"] for kill in kills if "bytes" in kill]
    fresh = [sum(start[1] for start in chain["starts"]) for chain in chains if chain["starts"]]
    if read and fresh:
        found |= {"bytes_to_first_batch": int(statistics.median(read)), "bytes_at_start": int(statistics.median(fresh))}
        found["bytes_read_again"] = max(0, found["bytes_to_first_batch"] - found["bytes_at_start"])
    found["torn"] = sum(kill.get("torn", False) for kill in kills)
    found["errors"] = dict(Counter(chain["refused"] for chain in chains if chain["refused"]).most_common(3))
    return found


def run_system(system: str, plans: list[dict[str, Any]], python: Path, work: Path, cold: int) -> dict[str, Any]:
    cases, facts = dict[str, list[dict[str, Any]]](), dict[str, Any]()
    rest = {"divides": [0, 0], "does_not_divide": [0, 0]}  # runs, refused
    for plan in plans:
        for said in run_plan(plan, python, work):
            if "failed" in said:
                return {"error": said["failed"]}
            if "uninterrupted" in said:
                if said["uninterrupted"] == 0:
                    facts |= {"left_out_when_uninterrupted": said["leaves_out"], "twice": said["twice"]}
                beside = said["beside"]
                same = not (beside["order_changed"] or beside["views_changed"])
                key = "same_on_any_ranks" if system == "ours" else "deterministic"
                facts[key] = facts.get(key, True) and same
                facts["same_order"] = facts.get("same_order", True) and not beside["order_changed"]
            if "chain" in said:
                chain = plan["chains"][said["chain"]]
                if sent := said.get("sent"):
                    cache = "cache_lost" if chain["kills"][0]["wipe"] else "cache_kept"
                    fetched = facts.setdefault("http", {}).setdefault(cache, {"kills": 0, "fetched": 0, "data": 0})
                    fetched["kills"] += len(said["kills"])
                    fetched["fetched"] += sum(sent.values())
                    fetched["data"] += sum(p.stat().st_size for p in (work / "served" / "shards3000").glob("*.tar"))
                cases.setdefault(chain["case"], []).append(said)
                if system != "ours" and said["first_resumed"] is not None:
                    left = plan["samples"] - said["first_resumed"] % (plan["samples"] // BATCH) * BATCH
                    kind = rest["divides" if left % (BATCH * plan["workers"]) == 0 else "does_not_divide"]
                    kind[0] += 1
                    kind[1] += bool(said["refused"])
            facts |= {key: said[key] for key in ("import_s", "python", "versions") if key in said}
        if system == "ours" and cold and "cold_s" not in facts:
            facts["cold_s"] = cold_starts(plan, python, work, cold)
    total = sum_up([said for case in cases.values() for said in case])
    if system != "ours":
        facts["rest"] = rest
    return {**total, **facts, "cases": {name: sum_up(case) for name, case in cases.items()}}


def cold_starts(plan: dict[str, Any], python: Path, work: Path, count: int) -> dict[str, float]:
    """Seconds from the start of a new interpreter, one rank, to the first batch of a run that continues; and those of
    the processor, which a busy machine does not change."""
    found = []
    for _ in range(count):
        (work / "run" / "cold.json").write_text(json.dumps({**plan, "work": str(work / "run"), "cold": time.time()}))
        command = [str(python), str(REPOSITORY / "benchmarks" / "resume_ranks.py"), str(work / "run" / "cold.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, cpu = ([each[name] for each in found] for name in ("seconds", "cpu_s"))
    return {
        "median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2), "n": count,
        "cpu_median": round(statistics.median(cpu), 2), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def show(system: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{system}: {found['error']}")
        return
    for name, row in [*found["cases"].items(), ("all", found)]:
        print(
            f"{system:<17}{name:<27}{row['kills']:>6}{row['refused']:>8}{row['lost']:>7}{row['repeated']:>9}"
            f"{row['order_changed']:>8}{row['members_changed']:>8}{row['batches']:>8}{row['views_changed']:>9}"
            f"{row.get('first_batch_s', float('nan')):>8.2f}{row.get('first_batch_s_max', float('nan')):>7.2f}"
            f"{row.get('bytes_read_again', 0) / 1e3:>9.0f}"
        )
    told = ("kills", "refused", "first_batch_s", "first_batch_s_max", "cases", *SUMS)
    print(f"    {json.dumps({key: value for key, value in found.items() if key not in told})}", flush=True)


def show_head() -> None:
    print("order: batches whose samples stand in another order; others: that have other samples; both of the batches")
    print("after a run's first kill. Views: samples with other pixels. First: seconds to the first batch after a kill,")
    print("median and largest. Again: kB read to the first batch, beyond those of a start.")
    print(
        f"{'system':<17}{'case':<27}{'kills':>6}{'refused':>8}{'lost':>7}{'repeated':>9}{'order':>8}{'others':>8}"
        f"{'batches':>8}{'views':>9}{'first s':>8}{'max':>7}{'again kB':>9}"
    )


def install_peers(systems: list[str], peers: Path) -> None:
    for requirements in sorted(PEERS.glob("*.txt")):
        if requirements.stem in systems:
            print(f"{peers / requirements.stem}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(peers / requirements.stem)], check=True)
            pip = [str(peers / requirements.stem / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            if subprocess.run([*pip, "--requirement", str(requirements)]).returncode:
                print(f"{requirements.stem} did not install", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images, at any depth")
    parser.add_argument("--systems", default="ours", help=f"some of {','.join(SYSTEMS)}")
    parser.add_argument("--kills", type=int, default=20, help="of each system; a peer's go half to the same ranks")
    parser.add_argument("--cold", type=int, default=0, help="starts of ours from a new interpreter, to be timed")
    parser.add_argument("--peers", type=Path, default=REPOSITORY / ".peers", help="folder of the peers' environments")
    parser.add_argument("--install_peers", action="store_true", help="make these environments and end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, ranks and numbers of ranks")
    parser.add_argument("--output", type=Path, help="file for the results; those of other systems in it are kept")
    parser.add_argument("--show", type=Path, help="print the table of such a file, and end")
    o = parser.parse_args()
    systems = o.systems.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems has {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    if o.show:
        show_head()
        for system, found in json.loads(o.show.read_text()).items():
            if system in SYSTEMS:
                show(system, found)
        return
    if o.install_peers:
        install_peers(systems, o.peers)
        return
    if o.images is None or not o.images.is_dir():
        parser.error(f"--images is {o.images}; give a folder of images")
    if o.kills < 1:
        parser.error(f"--kills is {o.kills}; give at least 1")
    images = small_images(o.images, 3001)
    if not images:
        parser.error(f"--images {o.images} holds no file that Pillow opens as an image")
    from benchmarks.hardware import hardware

    facts = hardware("cpu")
    results = dict[str, Any]()
    print(f"{len(images)} images; {facts['cpu_cores']} cores, load {os.getloadavg()[0]:.1f}, torch {facts['torch']}")
    show_head()
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        work = Path(name)
        make_data(images, work, systems)
        with serving(work / "served") as url:
            for system in systems:
                began, load = time.monotonic(), os.getloadavg()[0]
                rng, python = random.Random(o.seed), python_of(system, o.peers)
                if system != "ours" and (problem := write_for(system, python, work)):
                    results[system] = {"error": problem}
                else:
                    plans = (
                        our_plans(work, url, o.kills, rng)
                        if system == "ours"
                        else peer_plans(system, work, o.kills, rng)
                    )
                    results[system] = run_system(system, plans, python, work, o.cold)
                results[system] |= {"seconds": round(time.monotonic() - began), "load": [load, os.getloadavg()[0]]}
                show(system, results[system])
    text = json.dumps(results)
    if o.output:
        earlier = json.loads(o.output.read_text()) if o.output.exists() else {}
        o.output.write_text(json.dumps({**earlier, **results, "hardware": facts}) + "\n")
    print(text)


if __name__ == "__main__":
    main()
