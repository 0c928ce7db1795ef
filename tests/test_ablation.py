"""The ablation's plan is fair and complete; it goes on where it was interrupted; it draws what it found."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from jsonargparse import Namespace
from PIL import Image

import recipe as recipes

specification = importlib.util.spec_from_file_location("ablation", REPOSITORY / "benchmarks" / "ablation.py")
assert specification is not None and specification.loader is not None
ablation: Any = importlib.util.module_from_spec(specification)
sys.modules["ablation"] = ablation
specification.loader.exec_module(ablation)

SETTINGS = Namespace(
    studies=["dictionary", "momentum", "shuffle"],
    sizes=[128, 2048],
    end_to_end_sizes=[128, 512],
    size=2048,
    momentum=0.99,
    batch_size=128,
    bn_size=32,
    lr=0.06,
    cache_dir=None,
    cache_gb=None,
)


def test_plan_is_fair() -> None:
    plans = ablation.plan(SETTINGS, 400)
    assert {p.steps * p.flags["batch_size"] for p in plans} == {400 * 128}, "every run sees equally many images"
    assert {p.flags["lr"] / p.flags["batch_size"] for p in plans} == {0.06 / 128}
    assert {p.flags["batch_size"] / p.flags["bn_groups"] for p in plans} == {32}
    for p in plans:
        last = p.flags["lr"] * p.flags["decay"] ** (p.steps // p.flags["decay_steps"])
        assert 0.005 * p.flags["lr"] < last < 0.02 * p.flags["lr"]


def test_plan_is_complete_and_shares_runs() -> None:
    plans = ablation.plan(SETTINGS, 400)
    found = {
        (p.flags["mechanism"], p.flags["queue_size"], p.flags["moco_momentum"], p.flags["shuffle_bn"]) for p in plans
    }
    expected = {(m, k, 0.99, True) for m in ("moco", "memory_bank") for k in (128, 2048)}
    expected |= {("end_to_end", k, 0.99, True) for k in (128, 512)}
    expected |= {("moco", 2048, m, True) for m in (0.0, 0.9, 0.99, 0.999, 0.9999)} | {("moco", 2048, 0.99, False)}
    assert found == expected
    assert len(plans) == len(expected), "the run that three studies need is trained once"
    shared = [p for p in plans if len(p.studies) > 1]
    assert [set(p.studies) for p in shared] == [{"dictionary", "momentum", "shuffle"}]
    assert len({p.name for p in plans}) == len(plans)


@pytest.mark.slow
def test_draw(tmp_path: Path) -> None:
    results = [
        {
            "name": p.name,
            "studies": p.studies,
            "steps": p.steps,
            "loss": 5.0,
            "knn": 0.3 + 0.01 * i,
            "pretext_accuracy": [[1, 0.1], [2, 0.2]],
            **{k: p.flags[k] for k in ("mechanism", "queue_size", "batch_size", "moco_momentum", "shuffle_bn")},
        }
        for i, p in enumerate(ablation.plan(SETTINGS, 10))
    ]
    for part in (results[:1], results):  # it is drawn after each run
        ablation.draw(part, tmp_path / "a.png", "title", untrained=0.25)
        with Image.open(tmp_path / "a.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    lines = ablation.table(results, 0.25).splitlines()
    assert len(lines) == 1 + 6 + 5 + 2
    assert "no shuffle BN" in lines[-1]


def test_flags_are_fields_of_the_recipe(tmp_path: Path) -> None:
    """train.py would accept every run, and its batches and batch-norm groups divide."""
    for p in ablation.plan(SETTINGS, 100):
        settings = {
            "data": "d",
            "arch": "resnet18",
            "small_stem": False,
            "image_size": 32,
            "precision": "fp32",
            "seed": 0,
        }
        command = ablation.train_command(Namespace(**vars(SETTINGS), **settings), p, tmp_path)
        r = recipes.parse(command[2:])
        r.validate()
        assert r.max_steps == p.steps
        assert r.bn_groups_per_pass(1) == p.flags["bn_groups"]


def test_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished trainings are not repeated, the interrupted one is; what was found so far is drawn meanwhile."""
    trained: list[str] = []

    def call(command: list[str], log: Path) -> str:
        if command[1] != "train.py":
            return 'a warning\n{"knn": 0.25}\n'
        folder = next(Path(flag.removeprefix("--out=")) for flag in command if flag.startswith("--out="))
        trained.append(folder.name)
        folder.mkdir(exist_ok=True)
        if len(trained) == 2:
            raise KeyboardInterrupt
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "accuracy": 0.5}\n')
        return ""

    monkeypatch.setattr(ablation, "call", call)
    arguments = [f"--data={tmp_path}", f"--val={tmp_path}", f"--out={tmp_path}", "--steps=2", "--studies=[shuffle]"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        ablation.main()
    assert (tmp_path / "ablation.png").is_file()
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 1
    ablation.main()
    shuffled, not_shuffled = "moco_k2048_b128_m0.99", "moco_k2048_b128_m0.99_noshuffle"
    assert trained == [shuffled, not_shuffled, not_shuffled]
    assert [r["shuffle_bn"] for r in json.loads((tmp_path / "results.json").read_text())["results"]] == [True, False]
    assert "no shuffle BN" in capsys.readouterr().out


@pytest.mark.process
def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exit code 3 .*(?s:.)*the reason"):
        ablation.call(
            [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"], tmp_path / "log"
        )
