"""A run folder that is kept at a URL: the run lives in a local folder, and what it saves is copied to the URL.

1. `local_folder` names the folder on this machine. `pull` brings to a fresh machine the checkpoint that the pointer
   names, and the logs.
2. After each local save, `Mirror.push` uploads the checkpoint as one object, then the pointer to it, then the logs and
   pictures that have changed, whole. An upload that dies leaves the pointer at the checkpoint before it.
3. `Mirror` holds the URL as its only writer, by `writer-NNNNNN.json` objects: who takes over creates the next number,
   which the store grants to one (a conditional put), and the holder renews its own every few seconds. A store without
   conditional puts cannot keep out two writers that begin at the same moment.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import xxhash

import checkpoint
from pipeline import files
from pipeline.sources.cache import default_cache_dir, locked
from pipeline.sources.remote import retry
from trainer.resume import WRITTEN_OVER

POINTER = "checkpoints/latest.json"
RENEW_SECONDS = 10.0
LEASE_SECONDS = 45.0  # without a renewal for so long, the writer counts as dead
WRITER = re.compile(r"writer-(\d{6})\.json")
# The first goes up by itself, W&B's files by W&B; transfer/ writes the ledger at the URL, where it may be newer.
NOT_MIRRORED = ("checkpoints", "wandb", "evaluations.jsonl")


def local_folder(out: str, work_dir: str = "") -> Path:
    """The folder on this machine for a run whose --out is `out`: `out` itself unless it is a URL; else `work_dir`, or
    by default a folder of the cache named after the URL.
    """
    if not files.is_remote(out):
        return files.local_path(out)
    if work_dir:
        return Path(work_dir).expanduser()
    name = out.rstrip("/").rpartition("/")[2]
    return default_cache_dir() / "runs" / f"{name}-{xxhash.xxh3_64_hexdigest(out.rstrip('/').encode())}"


def read_pointer(url: str) -> dict[str, Any] | None:
    """{"step", "file", "bytes"} of the newest checkpoint at `url`, None when there is none.

    ValueError when the object is not a pointer, or the store refuses; OSError when it does not answer.
    """
    place = files.join(url, POINTER)
    try:
        content = retry(place, lambda: files.read(place))
    except FileNotFoundError:
        return None
    try:
        pointer = json.loads(content)
        if (int(pointer["step"]), int(pointer["bytes"])) < (0, 0) or not re.fullmatch(r"step_\d+\.pt", pointer["file"]):
            raise ValueError(pointer)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a pointer to a checkpoint ({error!r}): take another --out") from None
    return dict(pointer)


def pull(url: str, folder: Path) -> int | None:
    """Brings what `folder` lacks: the checkpoint of the pointer at `url`; all logs, too, when it is ahead of the
    folder's newest checkpoint. Returns the pointer's step, None where nothing was saved yet. Errors as `read_pointer`.
    """
    pointer = read_pointer(url)
    if pointer is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".pull"):  # the ranks of a machine come here at once
        steps = checkpoint.list_steps(folder)
        if pointer["step"] > max(steps, default=-1):
            _pull_logs(url, folder)
        if pointer["step"] not in steps:
            _download(files.join(url, f"checkpoints/{pointer['file']}"), folder / "checkpoints" / pointer["file"])
    return int(pointer["step"])


def _pull_logs(url: str, folder: Path) -> None:
    fs, root = files.file_system(url)
    root = root.rstrip("/")
    for path in retry(url, lambda: fs.find(root)):
        name = path.removeprefix(root + "/")
        parts = name.split("/")
        if parts[0] in NOT_MIRRORED or WRITER.fullmatch(name) or any(part in ("", ".", "..") for part in parts):
            continue
        _download(files.join(url, name), folder / name)


def _download(place: str, path: Path) -> None:
    fs, remote_path = files.file_system(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(str(path)) as file:
        target = file.name
        retry(place, lambda: fs.get_file(remote_path, target))


def bring(run: str) -> str:
    """`run` itself, or the local folder with the newest checkpoint and the logs of a run at a URL.

    FileNotFoundError when the URL holds no run; else errors as `read_pointer`.
    """
    if not files.is_remote(run):
        return run
    folder = local_folder(run)
    if pull(run.rstrip("/"), folder) is None:
        raise FileNotFoundError(f"no run at {run}: it has no {POINTER}")
    return str(folder)


class Mirror:
    """Copies `folder` to `url`, as the only one who writes there. Nothing is sent before `begin`, which rank 0 calls
    alone.

    When the store fails, the run and its local checkpoints are untouched, and the next push sends all that is missing.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self.lost = ""  # why this process is no longer the writer
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and mtime of what was uploaded
        # The boot's number tells machines apart that have one host name, as spot machines often do.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = {"host": socket.gethostname(), "boot": boot, "folder": str(folder.absolute())}
        # And the token those of containers, whose processes have the same numbers too.
        self._own: dict[str, Any] = place | {"process": os.getpid(), "token": secrets.token_hex(8)}
        self._number = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Becomes the writer; then folder and URL have the same newest checkpoint. The caller holds the folder's lock.

        ValueError when another run writes there, or the store refuses; OSError when it does not answer.
        """
        self._number = self._take()
        self._thread = threading.Thread(target=self._renew, name="mirror", daemon=True)
        self._thread.start()
        there = pull(self.url, self.folder)
        here = checkpoint.latest(self.folder)
        if here is not None and here != checkpoint.path_of(self.folder, -1 if there is None else there):
            self._push_checkpoint(here)  # an upload had failed; the other machines take it from the URL

    def push(self, *, keep: int, keep_every: int = 0) -> None:
        """Uploads the newest checkpoint and what has changed of logs and pictures, and removes older checkpoints there
        as `checkpoint.save` does in the folder. ValueError when another run has taken the place; OSError.
        """
        self._check_writer()
        newest = checkpoint.latest(self.folder)
        if newest is not None and self._is_new(newest):
            self._push_checkpoint(newest)
            place = files.join(self.url, "checkpoints")
            there = retry(place, lambda: files.names(place))
            (kept,) = checkpoint.steps_in([newest.name])
            for step in checkpoint.superseded(checkpoint.steps_in(there), kept, keep=keep, keep_every=keep_every):
                self._remove(f"checkpoints/{checkpoint.path_of(self.folder, step).name}")
        if not (self.folder / "finished").exists():  # the run goes on that had been finished
            self._remove("finished")
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            hidden = any(part.startswith(".") or part.endswith(".tmp") for part in name.split("/"))
            if not hidden and name.split("/")[0] not in NOT_MIRRORED and file.is_file() and self._is_new(file):
                self._upload(file, name)

    def _push_checkpoint(self, path: Path) -> None:
        self._upload(path, f"checkpoints/{path.name}")
        (step,) = checkpoint.steps_in([path.name])
        pointer = {"step": step, "file": path.name, "bytes": path.stat().st_size}
        place = files.join(self.url, POINTER)
        retry(place, lambda: files.write(place, json.dumps(pointer).encode()))

    def close(self) -> None:
        """Gives the place up, so that the next writer need not wait for the lease to run out."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        if self.lost:
            return
        place = self._place(self._number)
        with contextlib.suppress(OSError, ValueError):  # the lease runs out by itself
            retry(place, lambda: files.write(place, json.dumps(self._own | {"ended": True}).encode()))

    def _remove(self, name: str) -> None:
        place = files.join(self.url, name)
        retry(place, lambda: files.remove(place))

    def _is_new(self, file: Path) -> bool:
        status = file.stat()
        return self._sent.get(str(file)) != (status.st_size, status.st_mtime_ns)

    def _upload(self, path: Path, name: str) -> None:
        place, status = files.join(self.url, name), path.stat()
        fs, remote_path = files.file_system(place)
        files.make_folder_of(place)
        retry(place, lambda: fs.put_file(str(path), remote_path))
        self._sent[str(path)] = (status.st_size, status.st_mtime_ns)

    # --- the only writer ----------------------------------------------------------------------------------------------

    def _place(self, number: int) -> str:
        return files.join(self.url, f"writer-{number:06d}.json")

    def _numbers(self) -> list[int]:
        there = retry(self.url, lambda: files.names(self.url))
        return sorted(int(match[1]) for name in there if (match := WRITER.fullmatch(name)))

    def _take(self) -> int:
        numbers = self._numbers()
        if numbers:
            self._wait_for_end(numbers[-1])
        elif read_pointer(self.url) is None:
            self._refuse_foreign()
        number = (numbers[-1] if numbers else 0) + 1
        place = self._place(number)
        fs, path = files.file_system(place)
        files.make_folder_of(place)

        def create() -> bool:
            own = json.dumps(self._own).encode()
            try:
                fs.pipe_file(path, own, mode="create")
            except FileExistsError:  # by this process too, when the answer to an earlier try was lost
                return bool(files.read(place) == own)
            return True

        if not retry(place, create):
            raise ValueError(f"{self.url} was taken by another run at this moment: give another --out")
        for old in numbers:
            self._remove(f"writer-{old:06d}.json")
        return number

    def _refuse_foreign(self) -> None:
        """ValueError when objects are there that a run would write over, and no run of this program has been there."""
        saved = files.join(self.url, "checkpoints")
        there = [name for name in retry(self.url, lambda: files.names(self.url)) if name in WRITTEN_OVER]
        there += [f"checkpoints/{n}" for n in retry(saved, lambda: files.names(saved)) if checkpoint.NAME.fullmatch(n)]
        if there:
            raise ValueError(f"{self.url} holds {min(there)} and no run of this program: give another --out")

    def _wait_for_end(self, number: int) -> None:
        """Returns when writer `number` has ended or lets its lease run out; ValueError when it renews it."""
        place = self._place(number)
        begun, first, waiting = time.monotonic(), b"", False
        while time.monotonic() - begun < LEASE_SECONDS:
            content = retry(place, lambda: files.read(place))
            told = json.loads(content)
            same_folder = all(told.get(name) == self._own[name] for name in ("boot", "folder"))
            if told.get("ended") or same_folder:  # the folder's own lock is held by this process: that one is dead
                return
            if first and content != first:
                raise ValueError(
                    f"{self.url} is written to by process {told.get('process')} on {told.get('host')}: wait for its "
                    "end, or give another --out"
                )
            first = content
            if not waiting:
                print(
                    f"note: {self.url} was written to by process {told.get('process')} on {told.get('host')}; waiting "
                    f"{LEASE_SECONDS:.0f} s to see whether it is still alive",
                    file=sys.stderr,
                    flush=True,
                )
                waiting = True
            time.sleep(1.0)

    def _check_writer(self) -> None:
        newest = self._numbers()[-1:]
        if newest and newest[0] > self._number:
            self.lost = f"{self.url} was taken over by another run, which took this one for dead"
        if self.lost:
            raise ValueError(self.lost)

    def _renew(self) -> None:
        place, count = self._place(self._number), 0
        while not self._over.wait(RENEW_SECONDS):
            count += 1
            try:
                self._check_writer()
                files.write(place, json.dumps(self._own | {"renewed": count}).encode())
            except (OSError, ValueError):
                if self.lost:
                    return
            except Exception:  # each file system has errors of its own; the next renewal may come through
                continue
