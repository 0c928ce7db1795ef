"""kNN against a brute-force float64 reference, over ranks."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, Command, cpu_environment

from pipeline.sources.opening import open_source
from transfer import knn
from transfer.load import CentralCrops, default_resize, load_encoder


def brute_force(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temperature: float, classes: int
) -> np.ndarray:
    """Wu et al. 2018, section 3.4, in float64 and one test image at a time."""
    predictions = []
    for x in test.astype(np.float64):
        similarity = train.astype(np.float64) @ x
        nearest = np.argsort(-similarity, kind="stable")[:k]
        scores = np.zeros(classes)
        np.add.at(scores, labels[nearest], np.exp(similarity[nearest] / temperature))
        predictions.append(scores.argmax())
    return np.array(predictions)


def some_features(n: int, seed: int, classes: int = 7, d: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy clusters, so that votes are neither unanimous nor random."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return F.normalize(centres[labels] + 1.8 * torch.randn(n, d, generator=g), dim=1), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.1), (200, 0.005), (999, 1.0)])
def test_classify_equals_brute_force(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 130)  # several chunks, most of them smaller than k
    monkeypatch.setattr(knn, "TEST_CHUNK", 64)
    train, labels = some_features(999, 0)
    test, truth = some_features(300, 1)
    ours = knn.classify(train, labels, test, k, temperature, classes=7).numpy()
    reference = brute_force(train.numpy(), labels.numpy(), test.numpy(), k, temperature, 7)
    np.testing.assert_array_equal(ours, reference)
    assert 0.3 < (ours == truth.numpy()).mean() < 0.999


def test_nearest_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 50)
    train, _ = some_features(170, 0)
    test, _ = some_features(9, 1)
    with torch.autocast("cpu", torch.bfloat16):  # the monitor may be called inside; similarities stay fp32
        similarities, indices = knn.nearest(train, test, 12)
    expected, where = (test @ train.T).topk(12, dim=1)
    torch.testing.assert_close(similarities, expected)
    torch.testing.assert_close(indices, where)


@pytest.mark.process
def test_memory_is_that_of_a_chunk() -> None:
    """8,192 x 100,000 similarities would be 3.3 GB; what is added to the features stays far below."""
    script = """
import torch
from pathlib import Path
from transfer.knn import nearest
def peak():  # in kB; not ru_maxrss, which begins with the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
train, test = torch.randn(100_000, 4), torch.randn(8_192, 4)
nearest(train[:40_000], test[:2048], 5)  # whatever torch itself takes
before = peak()
nearest(train, test, 5)
print((peak() - before) / 1024)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=cpu_environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert float(result.stdout) < 200  # MB


SHARED_CLASSIFY = """
import torch
import torch.nn.functional as F
from transfer import knn
from trainer.joining import joined

torch.set_num_threads(1)
knn.TRAIN_CHUNK, knn.TEST_CHUNK = 130, 64
# some_features
train, labels = some_features(999, 0)
test, _ = some_features(300, 1)
with joined() as (rank, world_size, device):
    part = slice(0, 60) if rank == 0 else slice(60, 999)  # rank 0 has fewer than k
    group = torch.distributed.group.WORLD
    shared = knn.classify(train[part], labels[part], test, 200, 0.1, classes=7, group=group)
alone = knn.classify(train, labels, test, 200, 0.1, classes=7)
assert torch.equal(shared, alone), (shared != alone).sum()
print("same" * (rank == 0))
"""


def test_ranks_share_the_work(run_command: Command, tmp_path: Path) -> None:
    script = tmp_path / "classify.py"
    script.write_text(SHARED_CLASSIFY.replace("# some_features", inspect.getsource(some_features)))
    done = run_command(script, ranks=2)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr


@pytest.mark.slow
def test_command(run_folder: Path, shards_dir: Path, run_command: Command) -> None:
    arguments = ["--run", run_folder, "--train", shards_dir, "--val", shards_dir, "--k", "5", "--batch_size", "16"]
    alone = run_command("transfer.knn", *arguments)
    assert alone.returncode == 0, alone.stderr
    result = json.loads(alone.stdout.splitlines()[-1])
    assert {key: result[key] for key in ("k", "train", "val", "classes", "step", "features")} == {
        "k": 5,
        "train": 60,
        "val": 60,
        "classes": 3,
        "step": 7,
        "features": "backbone",
    }
    assert 1 / 3 < result["knn"] <= 1  # each image is among its own neighbours here
    both = run_command("transfer.knn", *arguments, ranks=2)
    assert both.returncode == 0, both.stderr
    shared = json.loads(both.stdout.splitlines()[-1])
    assert shared["knn"] == result["knn"]
    assert shared["train"] == 60
    told = [line for line in alone.stderr.splitlines() if "60 of the 60 images" in line]
    assert len(told) == 1 and "are in the train source too" in told[0]


@pytest.mark.process
def test_command_errors(run_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    """In a new interpreter, as a user's is."""
    flags = ["--run", tmp_path / "nothing", "--train", shards_dir, "--val", shards_dir]
    command = [sys.executable, "-m", "transfer.knn", *map(str, flags)]
    wrong = subprocess.run(command, env=cpu_environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "nothing" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def crops() -> CentralCrops:
    return CentralCrops(32, ((0.5,) * 3, (0.25,) * 3), batch_size=16, num_threads=1)


@pytest.mark.slow
def test_k_is_capped(run_folder: Path, shards_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(str(shards_dir))
    result = knn.evaluate(knn.raw_pixels, source, source, crops(), k=200, progress=True)
    assert result["k"] == 60
    assert "k 200 is more than the 60 training images" in capsys.readouterr().err


def test_images_that_find_themselves_are_told(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder, a part of it, a copy of it, and other images."""
    whole, part = open_source(str(shards_dir)), open_source(f"{shards_dir}/shard-000001.tar")
    copied = open_source(str(shutil.copytree(shards_dir, tmp_path / "copy")))
    others = open_source(f"{shards_dir}/shard-00000[023].tar")
    for train, val, told in [(whole, part, "15 of the 15"), (part, copied, "15 of the 60"), (others, part, "")]:
        knn.warn_of_overlap(train, val)
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == bool(told)


def test_extract_in_order(shards_dir: Path) -> None:
    source = open_source(str(shards_dir))
    features, labels, sample_ids = knn.extract(knn.raw_pixels, source, crops())
    assert features.shape == (60, 3 * 32 * 32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(60))
    assert sample_ids.tolist() == list(range(60))
    assert labels.bincount().tolist() == [20, 20, 20]
    first, _, _ = knn.extract(knn.raw_pixels, source, crops(), limit=21)
    torch.testing.assert_close(first, features[:21])


@pytest.mark.process
def test_unlabelled_source_is_an_error(image_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(image_folder.rglob("*.jpg"))[:20]):
        (flat / f"{i}.jpg").write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pipeline.make_shards", str(flat), str(tmp_path / "shards"), "--workers", "1"]
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=120, capture_output=True)
    labelled, unlabelled = open_source(str(shards_dir)), open_source(str(tmp_path / "shards"))
    with pytest.raises(ValueError, match="20 of 20 images of the val source have no label"):
        knn.evaluate(knn.raw_pixels, labelled, unlabelled, crops())


def test_untrained_is_the_runs_own_start(run_folder: Path) -> None:
    trained, untrained = load_encoder(run_folder), load_encoder(run_folder, untrained=True)
    again = load_encoder(run_folder, untrained=True)
    assert (trained.step, untrained.step) == (7, 0)
    a, b, c = (loaded.encoder.state_dict() for loaded in (trained, untrained, again))
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert not torch.equal(a["backbone.bn1.weight"], b["backbone.bn1.weight"])
    assert not any(module.training for module in trained.encoder.modules())


def test_a_checkpoint_file_is_a_run_too(run_folder: Path) -> None:
    loaded = load_encoder(run_folder / "checkpoints" / "step_00000007.pt")
    assert loaded.step == 7
    assert (loaded.image_size, loaded.recipe.views) == (32, "v1")


def test_default_resize() -> None:
    assert [default_resize(s) for s in (224, 160, 32, 28)] == [256, 183, 32, 28]
