"""What a run writes and shows: lines that survive a kill and a full disk, warnings once, a bar with room."""

import json
import resource
from pathlib import Path

import pytest

from trainer.log import Log, drop_lines_after


def test_lines_behind_the_checkpoint_and_half_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(1, 9)) + '{"step": 9, "lo')
    drop_lines_after(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the file's size stands in for the disk."""
    log = Log(tmp_path, step=0, total=10, enabled=True)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, room in ((1, 100), (2, 30), (3, 1000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
        try:
            log.write({"step": step, "knn": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]
    assert log.has("knn", 3)
    assert not log.has("loss", 3)
    assert not log.has("knn", 2)


def test_a_warning_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, step=0, total=10, enabled=True)
    for _ in range(3):
        log.warn({"kind": "trouble"})
    assert capsys.readouterr().err.count("trouble") == 1


def test_the_bar_of_a_long_run_has_room_for_what_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    log = Log(tmp_path, step=123_455, total=1_250_000, enabled=True)
    numbers = {"step": 123_457, "epoch": 0.1, "loss": 10.98, "lr": 0.029912, "data_wait": 0.1234}
    log.write(numbers | {"images_per_second": 12345.6, "seconds_left": 5.5 * 86400})
    log.step()
    bar = log.progress.bar
    bar.dynamic_ncols, bar.ncols = None, 80
    shown = str(bar)
    log.close()
    assert len(shown) == 80
    assert "123456/1250000, loss 10.980  lr 0.0299  12346 img/s  wait 12%  5 d 12 h" in shown


def test_steps_are_told_until_there_are_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten slow steps with log_every 10 were a minute and a half without a word."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    figures = {"epoch": 0.5, "loss": 1.0, "lr": 0.1, "data_wait": 0.0, "images_per_second": 1, "seconds_left": 60}
    log = Log(tmp_path, step=40, total=100, enabled=True)
    log.begin()
    for step in range(41, 62):
        clock[0] += 9
        log.step()
        if step == 50:
            log.write({"step": step} | figures)
    lines = [line.partition("  epoch")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ["step 41/100  0:09 min so far", "step 43/100  0:27 min so far", "step 45/100  0:45 min so far"]
    assert "step 50/100" in lines and "step 52/100  1:48 min so far" in lines
    assert 10 <= len(lines) <= 13
    log.close()


def test_quick_steps_have_lines_with_figures_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    figures = {"epoch": 0.5, "loss": 1.0, "lr": 0.1, "data_wait": 0.0, "images_per_second": 1, "seconds_left": 60}
    log = Log(tmp_path, step=0, total=1000, enabled=True)
    log.begin()
    for step in range(1, 301):
        clock[0] += 0.1
        log.step()
        if step % 10 == 0:
            log.write({"step": step} | figures)
    lines = capsys.readouterr().out.splitlines()
    assert all("loss 1.000" in line for line in lines) and 3 <= len(lines) <= 5
    log.close()
