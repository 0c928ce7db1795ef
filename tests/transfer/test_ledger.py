"""The ledger: what is written once is there once, whoever writes beside it and whatever a kill leaves."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from transfer import evaluations, ledger


def entry(protocol: str = "knn", encoder: str = "e1", figure: float = 0.5, **settings: Any) -> ledger.Entry:
    about = {"encoder": encoder, "train": "t", "val": "v", **settings}
    return ledger.entry(protocol, about, {"top1": figure, "top5": 0.9}, run="runs/r", step=7)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("arch: resnet18\n")
    return folder


def test_an_entry_is_there_once(run: Path) -> None:
    for found in (entry(k=200), entry(k=20), entry(k=200), entry(k=200, figure=0.6)):
        assert ledger.record(found, str(run)) == str(run / "evaluations.jsonl")
    entries = ledger.read(str(run / "evaluations.jsonl"))
    assert [(e["settings"], e["figures"]["top1"]) for e in entries] == [
        ({"k": 200}, 0.5), ({"k": 20}, 0.5), ({"k": 200}, 0.6),
    ]  # fmt: skip
    assert entries[0] | {"date": "", "version": ""} == {
        "protocol": "knn", "run": "runs/r", "step": 7, "start": "trained", "encoder": "e1", "train": "t", "val": "v",
        "settings": {"k": 200}, "figures": {"top1": 0.5, "top5": 0.9}, "date": "", "version": "",
    }  # fmt: skip
    newest = ledger.latest(entries, entry(k=200))
    assert newest is not None and newest["figures"]["top1"] == 0.6
    assert ledger.latest(entries, entry(k=200, encoder="e2")) is None


def test_a_checkpoint_belongs_to_its_run(run: Path, tmp_path: Path) -> None:
    assert ledger.ledger_of(str(run / "checkpoints" / "step_00000007.pt")) == str(run / "evaluations.jsonl")
    assert ledger.ledger_of(str(tmp_path / "moco.pth.tar")) is None
    assert ledger.ledger_of("s3://bucket/run") == "s3://bucket/run/evaluations.jsonl"


def test_what_a_kill_leaves_is_passed_over(run: Path) -> None:
    ledger.record(entry(k=1), str(run))
    path = run / "evaluations.jsonl"
    with path.open("ab") as file:
        file.write(b'{"protocol": "knn", "enco')
    ledger.record(entry(k=2), str(run))
    assert [e["settings"]["k"] for e in ledger.read(str(path))] == [1, 2]
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line",
    [
        '{"figures": {"knn": 0.5}, "settings": {}}',
        '{"protocol": 3, "figures": {"knn": 0.5}, "settings": {}}',
        '{"protocol": "knn", "figures": {"knn": 0.5}, "settings": "k 200"}',
        '{"protocol": "knn", "figures": {}, "settings": {}}',
        '["knn"]',
    ],
)
def test_lines_that_are_no_entries_are_passed_over_by_everyone(run: Path, line: str) -> None:
    ledger.record(entry(k=1), str(run))
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(line + "\n")
    assert [e["settings"] for e in ledger.read(str(run / "evaluations.jsonl"))] == [{"k": 1}]
    assert "top1 0.5" in evaluations.evaluations_table([("run", run)])


def test_many_writers_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "lines")
    with ThreadPoolExecutor(8) as pool:  # each opens the file anew, as processes do
        list(pool.map(lambda i: files.append_line(path, json.dumps({"i": i, "long": "x" * 5000}).encode()), range(200)))
    assert sorted(json.loads(line)["i"] for line in files.read(path).splitlines()) == list(range(200))


def test_where_there_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, output = str(tmp_path / "moco.pth.tar"), tmp_path / "out"
    assert ledger.record(entry(), bare) is None
    assert f"{bare} is no run folder: the figure is kept nowhere" in capsys.readouterr().err
    assert ledger.record(entry(), bare, output) == str(output / "evaluations.jsonl")
    assert f"is no run folder: the figure is kept in {output / 'evaluations.jsonl'}" in capsys.readouterr().err
    assert len(ledger.read(str(output / "evaluations.jsonl"))) == 1


def test_a_folder_that_cannot_be_written_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations.jsonl").mkdir()
    assert ledger.record(entry(), str(run), tmp_path / "out") == str(tmp_path / "out" / "evaluations.jsonl")
    assert "cannot be written to" in capsys.readouterr().err


def test_a_run_at_a_url() -> None:
    for k in (1, 2, 1):
        assert ledger.record(entry(k=k), "memory://bucket/run") == "memory://bucket/run/evaluations.jsonl"
    assert [e["settings"]["k"] for e in ledger.read("memory://bucket/run/evaluations.jsonl")] == [1, 2]
