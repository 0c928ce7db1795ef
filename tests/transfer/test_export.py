"""What leaves a run: torchvision loads it, the reference's layout comes back whole, and another run starts from it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import REPOSITORY, cpu_environment
from safetensors.torch import load_file
from training import Runs, log_of, losses, metrics

import checkpoint
import recipe as recipes
from model.interchange import read_moco
from model.moco import MoCo
from pipeline.labelled import eval_batches
from pipeline.sources.opening import open_source
from trainer.joining import Ranks
from transfer.export import export
from transfer.linear import Protocol, linear
from transfer.load import load_encoder

SMALL = recipes.Recipe(arch="resnet18", dim=8, mlp=True, queue_size=24, batch_size=12, bn_groups=2, image_size=32)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps that never happened: its weights are random, its key encoder another than its query encoder."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    recipes.save(SMALL, folder / "recipe.yaml")
    encoder = load_encoder(folder, untrained=True).encoder
    moco = MoCo(encoder, dim=8, queue_size=24, temperature=0.2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.01)
    moco.enqueue(torch.nn.functional.normalize(torch.randn(30, 8), dim=1))
    state = {"encoder": encoder.state_dict(), "moco": moco.state_dict(), "step": 3, "epoch": 1.0}
    checkpoint.save(folder, state, step=3, keep=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18.pth", "r18.safetensors"])
def test_torchvision_loads_it_and_computes_the_same(run_folder: Path, tmp_path: Path, name: str) -> None:
    path = export(str(run_folder), tmp_path / name, "torchvision")
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    theirs = torchvision.models.resnet18().eval()
    assert set(theirs.load_state_dict(state, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(images), load_encoder(run_folder).encoder.backbone(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"arch": "resnet18"},
        {"arch": "resnet18", "small_stem": True},
        {"arch": "resnet18", "width": 2, "small_stem": True},
        {"arch": "resnext50_32x8d"},
        {"arch": "timm:test_resnet"},
    ],
)
def test_export_says_what_the_file_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    """The note's own line of Python, run as it stands, makes a model that takes the file and computes the same."""
    recipe = recipes.Recipe(**options, dim=8, image_size=32)
    (tmp_path / "run").mkdir()
    recipes.save(recipe, tmp_path / "run" / "recipe.yaml")
    loaded = load_encoder(tmp_path / "run", untrained=True)
    checkpoint.save(tmp_path / "run", {"encoder": loaded.encoder.state_dict(), "step": 1}, step=1, keep=1)
    path = export(str(tmp_path / "run"), tmp_path / "r.pth", "torchvision")
    code = re.search(r"it fits the model of `(.*)`; net\.load", capsys.readouterr().err)
    assert code is not None
    made: dict[str, Any] = {}
    exec(code.group(1), made)
    missing, unexpected = made["net"].load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert set(missing) <= {"fc.weight", "fc.bias"} and not unexpected
    made["net"].fc = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(made["net"].eval()(images), loaded.encoder.backbone(images))


@pytest.mark.slow
def test_export_says_what_the_reference_does_not_take(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(str(run_folder), tmp_path / "m.pth.tar", "moco")
    assert "fits the reference code with -a resnet18" in capsys.readouterr().err
    demo = tmp_path / "demo.pth"
    state = torchvision.models.resnet18(num_classes=8).state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save({"state_dict": {f"encoder_q.{name}": t for name, t in state.items()}}, demo)
    export(str(demo), tmp_path / "d.pth.tar", "moco")
    said = capsys.readouterr().err
    assert "the reference code has no such encoder" in said and "does not say" not in said


def test_what_is_read_is_not_written_over(run_folder: Path, tmp_path: Path) -> None:
    (run,) = (run_folder / "checkpoints").glob("*.pt")
    before = run.read_bytes()
    for given, output in [(run_folder, run), (run, run), (run, tmp_path / "link.pth")]:
        if output != run:
            output.symlink_to(run)
        with pytest.raises(ValueError, match=r"--output .* is what the encoder is read from: name another file"):
            export(str(given), output, "torchvision")
    assert run.read_bytes() == before


@pytest.mark.slow
def test_a_linear_classifier_goes_along(run_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    loaded, source = load_encoder(run_folder), open_source(str(shards_dir))
    alone = Ranks(0, 1, torch.device("cpu"))
    folder = tmp_path / "linear"
    protocol = Protocol([1e-9, 0.002], epochs=3, batch_size=30)
    rows = linear(loaded, source, source, folder, protocol, num_threads=1, ranks=alone)
    path = export(str(run_folder), tmp_path / "classifier.pth", "torchvision", folder)
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    right = total = 0
    with torch.no_grad():
        for batch in eval_batches(source, image_size=32, resize=32, batch_size=30, mean_std=loaded.mean_std):
            right += int((theirs(batch.images).argmax(dim=1) == batch.labels).sum())
            total += len(batch.labels)
    assert right / total == max(row["top1"] for row in rows) > min(row["top1"] for row in rows)
    with pytest.raises(ValueError, match="--format torchvision or onnx alone"):
        export(str(run_folder), tmp_path / "x", "moco", folder)
    with pytest.raises(FileNotFoundError, match="no classifier in"):
        export(str(run_folder), tmp_path / "x", "torchvision", tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    recipes.save(SMALL, other / "recipe.yaml")
    state = load_encoder(other, untrained=True).encoder.state_dict()
    checkpoint.save(other, {"encoder": state, "step": 0}, step=0, keep=1)
    with pytest.raises(ValueError, match="other weights"):
        export(str(other), tmp_path / "x", "torchvision", folder)


@pytest.mark.slow
def test_the_reference_layout_comes_back_whole(run_folder: Path, tmp_path: Path) -> None:
    path = export(str(run_folder), tmp_path / "moco.pth.tar", "moco")
    file, saved = read_moco(path), checkpoint.load_newest(run_folder)
    assert saved is not None
    assert (file.arch, file.dim, file.mlp, file.epoch) == ("resnet18", 8, True, 1)
    assert all(torch.equal(tensor, file.encoder[name]) for name, tensor in saved["encoder"].items())
    assert all(torch.equal(tensor, saved["moco"][f"encoder_k.{name}"]) for name, tensor in file.key_encoder.items())
    assert file.queue is not None
    assert torch.equal(file.queue, saved["moco"]["queue"])
    again = read_moco(export(str(path), tmp_path / "again.pth.tar", "moco"))  # of a bare file: the encoder alone
    assert all(torch.equal(tensor, file.encoder[name]) for name, tensor in again.encoder.items())


@pytest.mark.slow
@pytest.mark.process
def test_a_run_starts_from_such_a_file(run_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    path, out = export(str(run_folder), tmp_path / "moco.pth.tar", "moco"), tmp_path / "run"
    flags = (
        "--dim 8 --mlp true --queue_size 24 --batch_size 12 --bn_groups 2 --image_size 32 --precision fp32 --lr 1e-9"
    )
    flags += " --max_steps 1 --views cifar --num_threads 1 --moco_momentum 1 --weight_decay 0 --trackers []"
    command = [
        sys.executable,
        "train.py",
        "--arch",
        "resnet18",
        "--init",
        str(path),
        "--out",
        str(out),
        "--data",
        str(shards_dir),
        *flags.split(),
    ]

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=REPOSITORY, env=cpu_environment(), timeout=120, capture_output=True, text=True
        )

    done = train()
    assert done.returncode == 0, done.stderr
    after, file = checkpoint.load_newest(out), read_moco(path)
    assert after is not None
    assert file.queue is not None
    for name, parameter in load_encoder(run_folder).encoder.named_parameters():
        torch.testing.assert_close(after["encoder"][name], parameter.detach(), rtol=0, atol=1e-5)
        assert torch.equal(after["moco"][f"encoder_k.{name}"], file.key_encoder[name])  # m 1: it stands still
    # 12 of the 24 columns are new, those behind the file's pointer
    old = (after["moco"]["queue"] == file.queue).all(dim=0)
    assert old.sum() == 12
    assert old.roll(-file.queue_ptr)[12:].all()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1]
    unlike = train("--dim", "16", "--out", str(tmp_path / "unlike"))
    assert unlike.returncode == 2
    assert "does not fit the encoder" in unlike.stderr


def test_a_run_goes_through_the_references_layout_and_on_as_if_nothing_had_been(
    undisturbed: Path, runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    """One epoch, exported, and a new run from the file: from the second epoch on every loss is that of the run that was
    never moved, as optimiser, key encoder, queue, pointer and epoch went along. `weights` begins anew instead."""
    assert runs.train(tmp_path / "first", shards_dir, max_steps=5) == [0], log_of(tmp_path / "first").read_text()
    file = export(str(tmp_path / "first"), tmp_path / "m.pth.tar", "moco")
    content = torch.load(file, weights_only=True)
    parameters = len([name for name in content["state_dict"] if name.startswith("module.encoder_q.")])
    assert content["epoch"] == 1
    assert parameters > len(content["optimizer"]["state"]) > 20  # buffers of batch norm have no momentum
    assert len(content["optimizer"]["param_groups"][0]["params"]) == 2 * len(content["optimizer"]["state"])

    assert runs.train(tmp_path / "on", shards_dir, init=file) == [0], log_of(tmp_path / "on").read_text()
    assert "query encoder, key encoder, queue, optimiser; begins at epoch 1" in log_of(tmp_path / "on").read_text()
    assert [row["step"] for row in metrics(tmp_path / "on")] == list(range(6, 21))
    assert losses(tmp_path / "on") == losses(undisturbed)[5:]

    again = export(str(file), tmp_path / "again.pth.tar", "moco")  # of a foreign file nothing is lost either
    both = torch.load(again, weights_only=True)
    assert both["epoch"] == 1 and both["key_encoder_updated"] is True
    for name, tensor in content["state_dict"].items():
        assert torch.equal(both["state_dict"][name], tensor), name
    assert both["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    for i, state in content["optimizer"]["state"].items():
        assert torch.equal(both["optimizer"]["state"][i]["momentum_buffer"], state["momentum_buffer"])

    options = {"init": file, "init_with": "weights", "max_steps": 1}
    assert runs.train(tmp_path / "anew", shards_dir, **options) == [0], log_of(tmp_path / "anew").read_text()
    assert [row["step"] for row in metrics(tmp_path / "anew")] == [1]
    assert "query encoder, key encoder, queue; begins at epoch 0" in log_of(tmp_path / "anew").read_text()
