"""A folder of features holds what the encoder gives, once for each image, however it was made."""

import csv
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, cpu_environment, make_image_folder

from pipeline.labelled import eval_batches
from pipeline.loader import Loader
from pipeline.make_shards import make_shards
from pipeline.packing.prepare import Options
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from trainer.joining import Ranks
from transfer import features
from transfer.embedding import open_embedding, read_table
from transfer.load import load_encoder

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SMALLEST_PART", 8)
    monkeypatch.setattr(features, "LARGEST_PART", 8)


def embed(run: Path, source: Source, output: Path, **changes: Any) -> tuple[dict[str, Any], int]:
    settings = {"batch_size": 5, "num_threads": 1, "ranks": ALONE} | changes
    return features.embed_source(load_encoder(run), source, output, **settings)


@pytest.mark.slow
def test_every_image_once(run_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    source = open_source(str(shards_dir))
    about, embedded = embed(run_folder, source, tmp_path / "f")
    assert (about["samples"], about["dimensions"], embedded) == (60, 512, 60)
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "embedding.json",
        "features.npy",
        "samples.parquet",
    ]
    found = open_embedding(tmp_path / "f")
    assert isinstance(found.features, np.memmap)
    assert found.views is None
    assert found.label_lists is None
    loaded = load_encoder(run_folder)
    batches = list(eval_batches(source, image_size=32, resize=32, batch_size=60, mean_std=loaded.mean_std))
    with torch.no_grad():
        expected = loaded.encoder.backbone(batches[0].images)
    torch.testing.assert_close(torch.from_numpy(found.features.copy()), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, batches[0].labels.numpy())
    np.testing.assert_array_equal(found.sample_ids, np.arange(60))
    table = read_table(tmp_path / "f", ["shard", "key"])
    assert table["shard"] == [shard.path for shard in source.manifests[0].shards for _ in range(shard.samples)]
    assert table["key"] == names_in_tars(shards_dir)


def names_in_tars(shards_dir: Path) -> list[str]:
    """Keys in the order of the shards, read by Python's own tar reader."""
    keys: dict[str, None] = {}
    for path in sorted(shards_dir.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys |= dict.fromkeys(name.split(".")[0] for name in tar.getnames())
    return list(keys)


@pytest.mark.slow
def test_views_are_those_of_training(run_folder: Path, shards_dir: Path, tmp_path: Path) -> None:
    source, loaded = open_source(str(shards_dir)), load_encoder(run_folder)
    embed(run_folder, source, tmp_path / "f", views=3, seed=9)
    found = open_embedding(tmp_path / "f")
    assert found.views is not None
    assert found.views.shape == (60, 3, 512)
    loader = Loader(source, views="v1", image_size=32, batch_size=20, seed=9, num_threads=1, num_views=3)
    batch = next(loader)
    loader.close()
    with torch.no_grad():
        each = [loaded.encoder.backbone(view).numpy() for view in batch.views]
    for i, sample in enumerate(batch.sample_ids.tolist()):
        for view in range(3):
            np.testing.assert_allclose(found.views[sample, view], each[view][i], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found.views[:, 1], found.views[:, 2])


@pytest.mark.slow
def test_a_killed_one_goes_on(
    run_folder: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(shards_dir))
    embed(run_folder, source, tmp_path / "whole")
    usual = features.feature_batches

    def killed(*arguments: Any, **settings: Any) -> Iterator[Any]:
        for i, batch in enumerate(usual(*arguments, **settings)):
            if i == 9:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "feature_batches", killed)
        embed(run_folder, source, tmp_path / "f")
    done = len(list((tmp_path / "f" / "parts").glob("*.npz")))
    assert done == 4  # of eight images in two batches each
    with pytest.raises(FileNotFoundError, match="is not whole yet"):
        open_embedding(tmp_path / "f")
    (tmp_path / "f" / "parts" / ".00000004.npz.1234.tmp").write_bytes(b"half")  # as SIGKILL leaves it
    about, embedded = embed(run_folder, source, tmp_path / "f")
    assert embedded == 60 - 8 * done
    assert not (tmp_path / "f" / "parts").exists()
    for name in ("features.npy", "samples.parquet", "embedding.json"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert embed(run_folder, source, tmp_path / "f") == (about, 0)
    with pytest.raises(ValueError, match=r"holds other features: views was 0 and is 2; take another --output"):
        embed(run_folder, source, tmp_path / "f", views=2)


@pytest.mark.slow
def test_without_pyarrow(run_folder: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(shards_dir))
    embed(run_folder, source, tmp_path / "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    embed(run_folder, source, tmp_path / "csv")
    with (tmp_path / "csv" / "samples.csv").open(newline="") as lines:
        assert next(csv.reader(lines)) == ["sample_id", "shard", "key", "label"]
    columns = ["sample_id", "shard", "key", "label"]
    from_csv = read_table(tmp_path / "csv", columns)
    monkeypatch.undo()
    assert from_csv == read_table(tmp_path / "parquet", columns)
    np.testing.assert_array_equal(open_embedding(tmp_path / "csv").labels, open_embedding(tmp_path / "parquet").labels)


@pytest.mark.parametrize("table", ["parquet", "csv"])
def test_lists_of_labels(
    run_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    names = sorted(str(path) for path in image_folder.rglob("*.jpg"))[:12]
    lists = [[], ["cat"], ["cat", "dog"], ["bird"]] * 3
    path = tmp_path / "list.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "objects"), *zip(names, map(json.dumps, lists))])
    make_shards(str(path), str(tmp_path / "shards"), options=Options(), label_key="objects")
    source = open_source(str(tmp_path / "shards"))
    if table == "csv":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    embed(run_folder, source, tmp_path / "f")
    found = open_embedding(tmp_path / "f")
    keys = read_table(tmp_path / "f", ["key"])["key"]
    assert found.label_lists is not None
    assert source.classes == ("bird", "cat", "dog")
    by_name = {Path(name).stem: labels for name, labels in zip(names, lists)}
    for key, labels in zip(keys, found.label_lists):
        assert sorted(source.classes[label] for label in labels) == sorted(by_name[key.partition("-")[2]])
    assert (found.labels == -1).all()


@pytest.mark.slow
def test_a_bad_image_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", per_class=40)
    make_shards(str(images), str(tmp_path / "shards"), options=Options())
    tar = next((tmp_path / "shards").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    at = content.index(b"\xff\xd8\xff", len(content) // 2)
    content[at : at + 3] = b"\0\0\0"
    tar.write_bytes(content)
    about, _ = embed(run_folder, open_source(str(tmp_path / "shards")), tmp_path / "f")
    found = open_embedding(tmp_path / "f")
    assert (about["samples"], about["in_source"], len(found.features)) == (119, 120, 119)
    missing = set(range(120)) - set(found.sample_ids.tolist())
    assert len(missing) == 1


def test_parts_do_not_depend_on_ranks_and_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [len(part) for part in features.split(700, 512)] == [256, 256, 188]
    assert {len(part) for part in features.split(10**9, 2048)} == {16_384, 10**9 % 16_384}
    assert max(len(part) for part in features.split(10**6, 2048 * 51)) * 2048 * 51 <= 1 << 26
    ids = [i for part in features.split(12_345_678, 2048) for i in (part.start, part.stop)]
    assert ids[0] == 0
    assert ids[-1] == 12_345_678
    assert ids[1:-1:2] == ids[2::2]


@pytest.mark.slow
def test_command_and_ranks(run_folder: Path, shards_dir: Path, tmp_path: Path, run_command: Command) -> None:
    arguments = ["--run", run_folder, "--data", shards_dir, "--batch_size", "16", "--views", "2", "--num_threads", "1"]
    alone = run_command("transfer.embed", *arguments, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    result = json.loads(alone.stdout.splitlines()[-1])
    named = {name: result[name] for name in ("samples", "left_out", "dimensions", "views", "features", "step")}
    assert named == {"samples": 60, "left_out": 0, "dimensions": 512, "views": 2, "features": "backbone", "step": 7}
    both = run_command("transfer.embed", *arguments, "--output", tmp_path / "two", ranks=2)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout.splitlines()[-1])["samples"] == 60
    one, two = (open_embedding(tmp_path / name) for name in ("alone", "two"))
    np.testing.assert_allclose(one.features, two.features, rtol=1e-5, atol=1e-6)
    assert one.views is not None
    assert two.views is not None
    np.testing.assert_allclose(one.views, two.views, rtol=1e-5, atol=1e-6)
    again = run_command("transfer.embed", *arguments, "--output", tmp_path / "alone", "--views", "0")
    assert again.returncode == 2
    assert "holds other features" in again.stderr


@pytest.mark.process
@pytest.mark.parametrize("name", ["embed", "probe", "neighbours"])
def test_help_does_not_import_torch(name: str) -> None:
    script = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("transfer.{name}", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert not {{"torch", "nvidia.dali", "matplotlib", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], env=cpu_environment(), check=True, timeout=60, capture_output=True)
