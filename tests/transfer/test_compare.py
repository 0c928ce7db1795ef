"""Rows and columns of the comparison, judged once; what the ledger has is not judged again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coloured import coloured
from PIL import Image

import checkpoint
import recipe as recipes
from transfer import arguments, compare, comparison, knn, ledger, report
from transfer.load import load_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, and two labelled sources."""
    root = tmp_path_factory.mktemp("compare")
    coloured(root / "train", 60, 0)
    coloured(root / "val", 31, 1)
    small = recipes.Recipe(data="unused", out="unused", arch="timm:test_resnet", dim=16, image_size=32, seed=3)
    (root / "run").mkdir()
    recipes.save(small, root / "run" / "recipe.yaml")
    encoder = load_encoder(root / "run", untrained=True).encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.01)
    state = {"encoder": encoder.state_dict(), "step": 20, "recipe": recipes.to_dict(small)}
    checkpoint.save(root / "run", state, step=20, keep=1)
    row = {"step": 20, "loss": 1.0, "epoch": 1.0}
    (root / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return root


def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    argv = ["compare", str(place / "run"), "--train", str(place / "train"), "--val", str(place / "val")]
    monkeypatch.setattr(sys, "argv", [*argv, *flags.split(), "--num_threads", "1", "--batch_size", "20"])
    compare.main(arguments.compare())
    said = capsys.readouterr()
    answer: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    return answer | {"noted": "no ledger has a figure of protocol 'detect' for random" in said.err}


@pytest.mark.slow
def test_judged_once(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--protocols knn,linear,logistic,finetune,detect --pixels --k 5 --seeds 2 --linear_epochs 2 "
    flags += "--linear_lr [0.1,1] --finetune_epochs 1 --finetune_lr 0.02"
    first = run(place, monkeypatch, capsys, flags)
    assert first["judged_now"] == 1 + 2 * (1 + 2 + 1 + 2)  # pixels; two encoders: kNN, 2 seeds, logistic, 2 seeds
    assert first["noted"]
    names = [row["name"] for row in first["rows"]]
    assert names[:2] == ["random", "raw pixels"] and names[2].endswith(", step 20")
    assert [row["start"] for row in first["rows"]] == ["untrained", "pixels", "trained"]
    cells = first["rows"][2]["cells"]
    titles = ["kNN, k 5", "linear", "logistic, all labels", "logistic, 10 % of the labels"]
    titles += ["logistic, 1 % of the labels", "fine-tuned, 100 % of the labels"]
    assert list(cells) == titles
    assert [len(cells[title]["values"]) for title in titles] == [1, 2, 1, 1, 1, 2]
    assert cells["linear"]["spread"] is not None and cells["logistic, 1 % of the labels"]["spread"] is not None
    assert cells["kNN, k 5"]["spread"] is None and list(first["rows"][1]["cells"]) == ["kNN, k 5"]
    entries = ledger.read(str(place / "run" / "evaluations.jsonl"))
    assert len(entries) == first["judged_now"] and {e["start"] for e in entries} == {"trained", "untrained", "pixels"}

    # Other rows, fewer columns and a figure that another command has left: nothing is judged again but k 7.
    found = next(e for e in entries if e["step"] == 20)
    about = {"encoder": found["encoder"], "train": "t", "val": "voc07"}
    ledger.record(ledger.entry("detect", about, {"AP": 0.25}, run="r", step=20), str(place / "run"))
    monkeypatch.setattr(knn, "evaluate", None)
    again = run(place, monkeypatch, capsys, flags)
    assert again["judged_now"] == 0
    assert again["rows"][2]["cells"] == cells | {
        "detect, AP, on voc07": {"mean": 0.25, "spread": None, "values": [0.25]}
    }
    assert again["rows"][0] == first["rows"][0]
    with pytest.raises(TypeError, match="not callable"):
        run(place, monkeypatch, capsys, flags.replace("--k 5", "--k 7"))

    folder = place / "run" / "compare"
    text = (folder / "compare.md").read_text()
    assert "| random | " in text and "60 training and 31 validation images" in text and " ± " in text
    assert (folder / "compare.csv").read_text().count("\n") == 1 + 2 * 6 + 1 + 1
    with Image.open(folder / "compare.png") as drawn:
        assert drawn.width > 1000
    page = Path(report.write_report([place / "run"], place / "report.html", images=0)).read_text()
    assert "Side by side" in page and "detect, AP, on voc07" in page and comparison.as_html(folder) in page


def test_a_bare_file_needs_an_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = str(place / "run" / "checkpoints" / "step_00000020.pt")
    needed = ["--train", str(place / "train"), "--val", str(place / "val")]
    monkeypatch.setattr(sys, "argv", ["compare", first, *needed])
    with pytest.raises(ValueError, match="is no run folder here: say with --output where the tables go"):
        compare.main(arguments.compare())
