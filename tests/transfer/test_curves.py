"""The curves of a run: what is read from metrics.jsonl, and that a picture comes of it."""

import json
from pathlib import Path

import pytest
from conftest import Command
from PIL import Image

from transfer.curves import draw, read_metrics, series


def write(run: Path, lines: list[dict[str, object]], end: str = "\n") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + end)
    return run


def test_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"step": s, "loss": 5.0 - s} for s in (1, 2, 3)]
    # Killed after step 3, continued from step 1.
    lines += [{"step": s, "loss": 4.5 - s} for s in (2, 3, 4)] + [{"step": 4, "knn": 0.5}]
    rows = read_metrics(write(tmp_path / "run", lines))
    assert rows == [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 0.5, "knn": 0.5},
    ]
    assert series(rows, "loss") == ([1, 2, 3, 4], [4.0, 2.5, 1.5, 0.5])
    assert series(rows, "knn") == ([4], [0.5])


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [{"step": 1, "loss": 2.0}], end='\n{"step": 2, "lo')
    assert read_metrics(run) == [{"step": 1, "loss": 2.0}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [{"step": 1}], end='\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl"):
        read_metrics(run)


def test_not_finite_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3}])
    assert series(read_metrics(run), "loss") == ([2], [1.0])


def test_draw(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"step": s, "loss": 5 / s, "lr": 0.1, "images_per_second": 80 + s, "epoch": s / 10} for s in range(1, 60)
    ]
    run = write(tmp_path / "run", [*lines, {"step": 30, "knn": 0.4}, {"step": 59, "knn": 0.6}])
    path = draw(run)
    assert path == run / "curves.png"
    with Image.open(path) as image:
        assert image.size[0] > 1000
        assert len(set(image.convert("L").get_flattened_data())) > 20
    assert not list(run.glob("*.tmp"))


def test_command(run_command: Command, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    made = run_command("transfer.curves", run, "--output", tmp_path / "c.png")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "c.png").is_file()
    missing = run_command("transfer.curves", tmp_path / "nothing")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: no ")
