"""What TensorBoard, W&B and a terminal show of real runs: what metrics.jsonl says, also over kills and restarts."""

import json
import os
import pty
import re
import signal
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import Runs, log_of, losses, metrics

import checkpoint


def test_tensorboard_shows_each_step_once_whenever_the_run_was_killed(
    runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    """Killed before its first checkpoint, and between two of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "killed"
    options: dict[str, Any] = {"trackers": "[tensorboard]", "save_every": 20, "epochs": 100, "max_steps": 50}
    for step in (4, 26):
        patch = f"""
import os, signal, time
import checkpoint
from trainer.log import Log
write = Log.write
def dying(self, values):
    write(self, values)
    while values["step"] == {step}:
        if len(checkpoint.list_steps(self.path.parent)) == {step // 20}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
Log.write = dying
"""
        assert runs.train(out, shards_dir, patch=patch, **options) == [-signal.SIGKILL], log_of(out).read_text()
        assert checkpoint.list_steps(out) == ([] if step == 4 else [20])
    assert runs.train(out, shards_dir, **options) == [0], log_of(out).read_text()

    shown = EventAccumulator(str(out / "moco"), size_guidance={"scalars": 0}).Reload()
    rows = metrics(out)
    names = {name for row in rows for name in row} - {"step"}
    assert set(shown.Tags()["scalars"]) == names
    assert {"loss", "lr", "accuracy", "queue_age", "gradient_norm", "data_wait", "memory_gb"} <= names
    assert [row["step"] for row in rows] == list(range(1, 51))
    for name in names:
        logged = [(row["step"], row[name]) for row in rows if name in row]
        events = shown.Scalars(name)
        assert [e.step for e in events] == [step for step, _ in logged]
        assert [e.value for e in events] == pytest.approx([value for _, value in logged], rel=1e-5)


def wandb_records(path: Path) -> Iterator[Any]:
    """Of an offline W&B run: LevelDB's log format, 32 KiB blocks of pieces (checksum, length, kind), behind a header of
    seven bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_goes_on_with_the_run_of_the_folder(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out, home = tmp_path / "same_name", tmp_path / "home"
    home.mkdir()
    options: dict[str, Any] = {"trackers": "[wandb]", "env": {"WANDB_MODE": "offline", "HOME": str(home)}}
    for steps in (3, 6):
        assert runs.train(out, shards_dir, ranks=2, max_steps=steps, **options) == [0, 0], log_of(out).read_text()

    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2  # two starts, one rank each
    assert not [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in str(path)]
    rows, ids = [], set()
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert (record.run.project, record.run.display_name) == ("moco", "same_name")
                assert (config["queue_size"], config["lr"], config["data"]) == (40, 0.02, str(shards_dir))
            elif record.HasField("history"):
                # the key is one of the two, by version
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append(items)
    assert ids == {(out / "wandb_id").read_text()}
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == losses(out)
    for row, logged in zip(rows, metrics(out)):
        assert {name for name in row if name[0] != "_"} == logged.keys() - {"step"}


def test_a_tracker_that_does_not_start_is_one_line_and_no_prompt(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "no_account"
    env = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_CONFIG_DIR": str(tmp_path)}
    assert runs.train(out, shards_dir, ranks=2, trackers="[wandb]", env=env) == [2, 2], log_of(out).read_text()
    said = [line for line in log_of(out).read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "WANDB_MODE=offline" in said[0]


def test_a_tracker_that_fails_costs_its_curves_not_the_run(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "fails"
    patch = """
from accelerate.tracking import TensorBoardTracker
def fail(*arguments, **options):
    raise ConnectionResetError("Connection lost")
TensorBoardTracker.log = TensorBoardTracker.finish = fail
"""
    codes = runs.train(out, shards_dir, trackers="[tensorboard]", patch=patch, max_steps=3)
    assert codes == [0], log_of(out).read_text()
    assert log_of(out).read_text().count("warning: a tracker ") == 2
    assert len(losses(out)) == 3


def test_a_terminal_shows_a_bar_of_one_line(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "watched"
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (30, 80))
    log_of(out).symlink_to(os.ttyname(slave))
    parts: list[bytes] = []

    def read() -> None:
        while part := os.read(master, 65536):
            parts.append(part)
            if b"<the end>" in part:
                return

    reader = threading.Thread(target=read)
    reader.start()
    codes = runs.train(out, shards_dir, max_steps=8, env={"TERM": "xterm", "COLUMNS": ""})
    os.write(slave, b"<the end>")
    reader.join()
    for end in (master, slave):
        os.close(end)
    text = b"".join(parts).decode()
    assert codes == [0], text
    bars = [line for line in re.split(r"[\r\n]+", text) if "|" in line]
    assert max(map(len, bars)) <= 80
    figures = r"loss \d+\.\d{3}  lr 0\.0\d+  \d+ img/s  wait \d+%  \d+:\d\d min left"
    assert re.match(rf"100%\|.*\| 8/8, {figures}", bars[-1].strip()), bars
    assert re.search(r"[\r\n]warning: queue_size 40 is 67%", text)
    assert "step 1/8" not in text
