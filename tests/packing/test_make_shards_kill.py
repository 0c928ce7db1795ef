"""make_shards survives kill -9 at any moment, lost workers, a full disk, files that vanish; then it goes on."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import make_shards as entry_point
from pipeline.command import command as end_by
from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COPIES = 10  # of the image folder in the list: enough work to be interrupted


@pytest.fixture(scope="module")
def source(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 600 images, one of them damaged, ten not there."""
    folder = tmp_path_factory.mktemp("list")
    (folder / "damaged.jpg").write_bytes(next(image_folder.rglob("*.jpg")).read_bytes()[:-300])
    images = sorted(map(str, image_folder.rglob("*.*"))) * COPIES
    names = [*images, "damaged.jpg", *(f"gone{i}.jpg" for i in range(10))]
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in names))
    return folder / "list.txt"


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes of it."""
    dest = tmp_path_factory.mktemp("reference") / "d"
    make_shards(str(source), str(dest), options=Options(), samples_per_shard=12, num_workers=1)
    return files(dest)


def files(dest: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in dest.iterdir() if p.is_file()}


def command(source: Path, dest: Path, *flags: str) -> list[str]:
    script = str(REPOSITORY / "pipeline/make_shards.py")
    return [sys.executable, script, str(source), str(dest), "--samples_per_shard", "12", "--workers", "2", *flags]


def finish(source: Path, dest: Path, *flags: str) -> str:
    result = subprocess.run(command(source, dest, *flags), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def records(dest: Path) -> int:
    return len(list(dest.glob(".make_shards/shard-*.json")))


def until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def group_is_gone(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return all(p.status() == psutil.STATUS_ZOMBIE for p in psutil.process_iter() if os.getpgid(p.pid) == group)
    return True


def only_whole_shards(dest: Path, reference: dict[str, bytes]) -> int:
    """Whatever is visible under a final name is what an undisturbed run writes there."""
    visible = list(dest.glob("shard-*.tar"))
    for tar in visible:
        assert tar.read_bytes() == reference[tar.name], tar.name
        assert tar.with_suffix(".idx").read_bytes() == reference[f"{tar.stem}.idx"]
    return len(visible)


def same_result(dest: Path, reference: dict[str, bytes]) -> None:
    assert files(dest) == reference
    assert not [p for p in dest.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_kill_at_any_moment(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    dest = tmp_path / "d"
    state = dest / ".make_shards"
    generator = random.Random(time.time_ns())  # other moments each time; the result may not depend on them
    moments: list[Callable[[], bool]] = [
        lambda: state.exists(),
        lambda: (state / "job.json").exists(),
        lambda: bool(list(dest.glob(".shard-*.tmp"))),
        *[lambda: records(dest) >= wanted] * 3,
        lambda: (dest / "rejected.jsonl").exists(),
    ]
    kills = 0
    for moment in moments:
        wanted = records(dest) + generator.randint(1, 12)
        process = subprocess.Popen(
            command(source, dest), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        until(moment, process)
        time.sleep(generator.uniform(0, 0.03))
        if generator.random() < 0.5:
            os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must not outlive it
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), output
        until(lambda pid=process.pid: group_is_gone(pid), timeout=30)  # type: ignore[misc]
        only_whole_shards(dest, reference)
        if (dest / "make_shards.json").exists():
            break
    assert kills >= 4
    output = finish(source, dest)
    assert "going on:" in output or "is complete" in output
    same_result(dest, reference)


def test_a_lost_worker_is_a_clear_error(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    dest = tmp_path / "d"
    process = subprocess.Popen(command(source, dest), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: records(dest) >= 3, process)
    family = [(parent, child) for parent in psutil.Process(process.pid).children() for child in parent.children()]
    assert family
    family[0][1].kill()  # a worker: a child of the fork server
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker process died" in error and "Traceback" not in error, error
    only_whole_shards(dest, reference)
    assert "going on:" in finish(source, dest)
    same_result(dest, reference)


def test_control_c(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    dest = tmp_path / "d"
    process = subprocess.Popen(
        command(source, dest),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    until(lambda: records(dest) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error, error
    only_whole_shards(dest, reference)
    finish(source, dest)
    same_result(dest, reference)


def test_no_room(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Files may grow to a limit that the listing fits in and a shard does not: as on a full disk."""
    dest = tmp_path / "d"
    limit = 50_000
    assert max(len(content) for name, content in reference.items() if name.endswith(".tar")) > limit
    resource.setrlimit  # noqa: B018 (not on every system: fail here, not in the child)
    result = subprocess.run(
        command(source, dest),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large")
    assert "make room, then the same command goes on" in result.stderr
    only_whole_shards(dest, reference)
    assert not list(dest.glob(".shard-*")) and not (dest / "manifest.json").exists()
    finish(source, dest)
    same_result(dest, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk(source: Path, reference: dict[str, bytes], small_disk: Path) -> None:
    dest = small_disk / "d"
    with pytest.raises(OSError, match="No space left"):
        make_shards(str(source), str(dest), options=Options(), samples_per_shard=12, num_workers=2)
    assert 0 < only_whole_shards(dest, reference) < len([name for name in reference if name.endswith(".tar")])
    assert not list(dest.glob(".shard-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    make_shards(str(source), str(dest), options=Options(), samples_per_shard=12, num_workers=2)
    same_result(dest, reference)


def test_unwritable(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    for dest in (tmp_path / "file/d", Path("/proc/nothing/d")):
        monkeypatch.setattr(sys, "argv", ["make_shards", str(image_folder), str(dest)])
        with pytest.raises(SystemExit, match="2"):
            end_by(entry_point.main, resumes=True)
        error = capsys.readouterr().err
        assert error.startswith("error: [Errno") and str(dest.parent) in error and "Traceback" not in error


def test_a_file_that_vanishes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "d"
    victim = source.parent / "damaged.jpg"
    content = victim.read_bytes()
    planned = entry_point.pack_tasks

    def gone(*arguments: Any) -> Any:
        victim.unlink()  # it was listed; it is packed next
        return planned(*arguments)

    monkeypatch.setattr(entry_point, "pack_tasks", gone)
    with pytest.raises(FileNotFoundError, match=r"damaged\.jpg has vanished since it was listed: put it back"):
        make_shards(str(source), str(dest), options=Options(), samples_per_shard=12, num_workers=1)
    monkeypatch.setattr(entry_point, "pack_tasks", planned)
    only_whole_shards(dest, reference)
    assert not list(dest.glob(".shard-*"))
    victim.write_bytes(content)
    make_shards(str(source), str(dest), options=Options(), samples_per_shard=12, num_workers=1)
    same_result(dest, reference)


@pytest.mark.slow
def test_dask_cluster_loses_a_worker(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """A real scheduler and two worker processes; one is killed in the middle, and the result is the same."""
    pytest.importorskip("distributed")
    dest = tmp_path / "d"
    contact = tmp_path / "scheduler.json"
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="10")
    start = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    processes = [subprocess.Popen([*start, "--scheduler-file", contact], env=environment, stderr=subprocess.DEVNULL)]
    try:
        until(lambda: contact.exists() and contact.read_text().endswith("}"), processes[0])
        address = json.loads(contact.read_text())["address"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
        worker += ["--no-dashboard", "--local-directory", str(tmp_path)]
        workers = [subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path) for _ in range(2)]
        processes += workers
        flags = ["--scheduler", address]
        run = subprocess.Popen(
            command(source, dest, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        processes.append(run)  # type: ignore[arg-type]
        until(lambda: records(dest) >= 5, run)
        workers[0].kill()
        output, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
        assert "packed               600" in output
        assert workers[1].poll() is None
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
    same_result(dest, reference)


def test_no_scheduler_is_a_clear_error(image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    result = subprocess.run(
        command(image_folder, tmp_path / "d", "--scheduler", "tcp://127.0.0.1:1"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "no Dask scheduler answers at tcp://127.0.0.1:1" in result.stderr, result.stderr


@pytest.mark.slow
def test_a_script_without_a_main_guard(image_folder: Path, tmp_path: Path) -> None:
    """Workers that imported the script would start its packing again, each in itself, and the pool would break."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from pipeline.make_shards import make_shards\n"
        "from pipeline.packing.prepare import Options\n"
        f"Path({str(tmp_path / 'ran')!r}).open('a').write('x')\n"
        f"make_shards({str(image_folder)!r}, {str(tmp_path / 'd')!r}, options=Options(), num_workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "packed                60" in result.stdout
    assert (tmp_path / "ran").read_text() == "x"
