"""What a file is, its content says; whatever is computed from parts that it lacks is refused."""

from pathlib import Path

import pytest
import torch
import torchvision

from pipeline.sources.opening import open_source
from transfer import knn
from transfer.gallery import make_gallery
from transfer.load import load_encoder


def torchvision_file(path: Path) -> Path:
    """A bare ResNet-18 as torchvision saves it, classifier and all."""
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def test_the_head_of_a_file_without_one_is_refused(tmp_path: Path, shards_dir: Path) -> None:
    loaded = load_encoder(torchvision_file(tmp_path / "r18.pth"))
    images = torch.randn(2, 3, 32, 32)
    assert loaded.part("backbone")(images).shape == (2, 512)
    with pytest.raises(ValueError, match=r"r18\.pth holds a backbone without a projection head"):
        loaded.part("head")
    with pytest.raises(ValueError, match="--features backbone"):
        make_gallery(loaded, open_source(str(shards_dir)), tmp_path / "g.png", features="head", progress=False)


def test_knn_on_the_head_of_a_file_without_one_is_an_error(
    tmp_path: Path, shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, shards = str(torchvision_file(tmp_path / "r18.pth")), str(shards_dir)
    command = ["knn", "--run", file, "--train", shards, "--val", shards, "--features", "head"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(ValueError, match="without a projection head"):
        knn.main()


def test_the_head_of_a_run_is_its_own(run_folder: Path) -> None:
    loaded = load_encoder(run_folder)
    assert loaded.part("head") is loaded.encoder
    assert loaded.part("head")(torch.randn(2, 3, 32, 32)).shape == (2, 16)
