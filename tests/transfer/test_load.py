"""What a file is, its content says; whatever is computed from parts that it lacks is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import checkpoint
import recipe as recipes
from model.interchange import read_moco, reference_checkpoint
from pipeline.sources.opening import open_source
from transfer import arguments, gallery, knn
from transfer.export import export
from transfer.gallery import make_gallery
from transfer.load import CentralCrops, load_encoder


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
        knn.main(arguments.knn())


def test_the_head_of_a_run_is_its_own(run_folder: Path) -> None:
    loaded = load_encoder(run_folder)
    assert loaded.part("head") is loaded.encoder
    assert loaded.part("head")(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def demo_state(seed: int) -> tuple[torchvision.models.ResNet, dict[str, torch.Tensor]]:
    """A ResNet-18 as the reference's CIFAR-10 demo builds it, and its state under the demo's names."""
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=128)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = torch.nn.Identity()  # type: ignore[assignment]
    parts: list[torch.nn.Module] = []
    for name, module in net.named_children():
        if name == "maxpool":
            continue
        if name == "fc":
            parts.append(torch.nn.Flatten(1))
        parts.append(module)
    return net, {f"net.{name}": t for name, t in torch.nn.Sequential(*parts).state_dict().items()}


def demo_file(path: Path) -> torchvision.models.ResNet:
    net, query = demo_state(0)
    state = {f"encoder_q.{name}": t for name, t in query.items()}
    state |= {f"encoder_k.{name}": t for name, t in demo_state(1)[1].items()}
    state |= {"queue": torch.randn(128, 40), "queue_ptr": torch.tensor([8])}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_the_demos_own_file_is_read_wherever_it_lies(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "model_last.pth"
    path.parent.mkdir(exist_ok=True)
    theirs, loaded = demo_file(path), load_encoder(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.part("head")(images), theirs(images))
    assert loaded.image_size == 32 and loaded.recipe.views == "cifar"
    file = read_moco(path)
    assert (file.arch, file.small_stem, file.mlp, file.dim, file.epoch) == ("resnet18", True, False, 128, 3)
    key_state = demo_state(1)[0].state_dict()
    assert torch.equal(file.key_encoder["backbone.layer4.1.conv2.weight"], key_state["layer4.1.conv2.weight"])
    assert file.queue is not None and file.queue.shape == (128, 40) and file.queue_ptr == 8


def test_a_checkpoint_is_read_wherever_it_lies(run_folder: Path, tmp_path: Path) -> None:
    inside = next((run_folder / "checkpoints").glob("*.pt"))
    state = checkpoint.load(inside)
    torch.save(state | {"recipe": recipes.to_dict(recipes.load(run_folder / "recipe.yaml"))}, tmp_path / "best.pt")
    loaded = load_encoder(tmp_path / "best.pt")
    assert (loaded.step, loaded.image_size, loaded.recipe.views) == (7, 32, "v1")
    assert torch.equal(loaded.encoder.head.weight, load_encoder(run_folder).encoder.head.weight)  # type: ignore[arg-type]
    shutil.copy(inside, tmp_path / "bare.pt")
    with pytest.raises(FileNotFoundError, match=r"bare\.pt is a checkpoint that holds no recipe"):
        load_encoder(tmp_path / "bare.pt")


def test_a_safetensors_file_of_export_is_read(run_folder: Path, tmp_path: Path) -> None:
    path = export(str(run_folder), tmp_path / "r18.safetensors", "torchvision")
    images = torch.randn(2, 3, 32, 32)
    loaded = load_encoder(path)
    assert not loaded.has_head
    assert torch.equal(loaded.part("backbone")(images), load_encoder(run_folder).encoder.backbone(images))


VIT = {"cls_token": torch.zeros(1, 1, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 16, 16)}
R18 = {name: t for name, t in torchvision.models.resnet18().state_dict().items() if not name.startswith("fc.")}


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: t for name, t in state.items()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (VIT, "is no MoCo v1 or v2 file but a vision transformer: foreign files are read as ResNets alone"),
        (
            {"model": below("encoder.", VIT), "state_dict": below("module.", VIT)},
            "is no MoCo .* but a vision transformer",
        ),
        ({"student": R18, "teacher": below("backbone.", R18)}, "is a full DINO .* what it holds as 'teacher' alone"),
        ({"student": VIT, "teacher": below("backbone.", VIT)}, "is a full DINO .* of a vision transformer"),
        (
            {"state_dict": below("module.base_encoder.", R18) | below("module.momentum_encoder.", R18)},
            r"is a MoCo v3 file .* names begin with module\.base_encoder\. under",
        ),
        ({"state_dict": below("module.base_encoder.", VIT)}, "is a MoCo v3 file .* of a vision transformer"),
        ({"heads": {}, "settings": {}}, "is a classifier of transfer.linear"),
        ({"features.0.weight": torch.zeros(1)}, r"is no MoCo v1 or v2 file.*; it has features\.0\.weight"),
        (below("module.", {"features.0.weight": torch.zeros(1)}), r"is no MoCo .*; it has module\.features\.0\.weight"),
    ],
)
def test_other_programs_files_get_the_sentence_that_says_what_they_are(
    tmp_path: Path, content: dict[str, Any], says: str
) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth " + says):
        load_encoder(tmp_path / "file.pth")


def test_the_remedies_for_dino_and_moco_v3_work(tmp_path: Path) -> None:
    torch.save(
        below("module.backbone.", R18) | below("module.head.", {"mlp.0.weight": torch.zeros(4, 4)}), tmp_path / "d"
    )
    torch.save(R18 | below("fc.", {"0.weight": torch.zeros(4, 512), "1.weight": torch.zeros(4)}), tmp_path / "v3")
    for name in ("d", "v3"):
        loaded = load_encoder(tmp_path / name)
        assert not loaded.has_head
        assert torch.equal(loaded.encoder.backbone.state_dict()["conv1.weight"], R18["conv1.weight"])


def test_refusals_quote_the_names_of_the_file(tmp_path: Path) -> None:
    state = below("module.encoder_q.", dict(torchvision.models.resnet18(num_classes=16).state_dict()))
    more = state | {"module.encoder_q.layer1.0.extra": torch.zeros(1)}
    torch.save({"state_dict": more}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"more\.pth does not fit .* unknown: module\.encoder_q\.layer1\.0\.extra$"):
        load_encoder(tmp_path / "more.pth")
    odd = state | {"module.encoder_q.layer4.1.bn2.bias": torch.zeros(7)}
    torch.save({"state_dict": odd}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"of another shape: module\.encoder_q\.layer4\.1\.bn2\.bias \(7,\) for"):
        load_encoder(tmp_path / "odd.pth")
    del state["module.encoder_q.layer4.1.bn2.bias"]
    torch.save({"state_dict": state}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"less\.pth does not fit the encoder; missing: layer4\.1\.bn2\.bias$"):
        load_encoder(tmp_path / "less.pth")


def test_a_vit_is_judged_at_the_size_that_it_was_trained_at(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    recipe = recipes.Recipe(arch="timm:vit_tiny_patch16_224", dim=8, image_size=32)
    recipes.save(recipe, tmp_path / "recipe.yaml")
    loaded = load_encoder(tmp_path, untrained=True)
    assert loaded.part("head")(torch.randn(2, 3, 32, 32)).shape == (2, 8)
    with pytest.raises(ValueError, match="timm:vit_tiny_patch16_224 does not take images of 64 pixels"):
        load_encoder(tmp_path, untrained=True, image_size=64)
    checkpoint.save(tmp_path, {"encoder": loaded.encoder.state_dict(), "step": 1, "epoch": 1.0}, step=1, keep=1)
    state = reference_checkpoint(loaded.encoder.state_dict(), arch="timm:vit_tiny_patch16_224")
    torch.save(state, tmp_path / "vit.pth.tar")
    assert load_encoder(tmp_path / "vit.pth.tar", image_size=32).part("head")(torch.randn(2, 3, 32, 32)).shape == (2, 8)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return (os.system, ("touch /tmp/never",))


def test_a_malicious_checkpoint_is_no_file_of_this_program(tmp_path: Path) -> None:
    """torch's own message tells how to load it all the same; no word of that is handed on."""
    torch.save({"step": 1, "encoder": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is refused: .* it is no file of this program") as raised:
        load_encoder(tmp_path / "evil.pt")
    for advice in ("weights_only", "trust", "safe_globals", "torch.load"):
        assert advice not in str(raised.value)
    (tmp_path / "text.pt").write_text("\x80\x02 hello")
    with pytest.raises(ValueError, match=r"text\.pt is no file of torch\.save") as raised:
        load_encoder(tmp_path / "text.pt")
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("arch: resnet99", "unknown arch 'resnet99'"),
        ("dim: 24", "size mismatch"),
        ("dim: -3", "dim -3"),
        ("width: 0", "width is 0"),
        ("views: v7", "views 'v7'"),
        ("image_size: 0", "image_size 0"),
        ("mlp: true", "do not fit"),
    ],
)
def test_an_edited_recipe_is_one_line_that_names_the_file(
    run_folder: Path, tmp_path: Path, edit: str, says: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    name = edit.split(":")[0]
    lines = [line for line in (folder / "recipe.yaml").read_text().splitlines() if not line.startswith(f"{name}:")]
    (folder / "recipe.yaml").write_text("\n".join([*lines, edit]))
    with pytest.raises(ValueError, match=says) as raised:
        load_encoder(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_with_foreign_keys_is_one_line_that_names_the_file(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    state = {"step": 9, "encoder": {"somebody.elses": torch.zeros(1)}}
    checkpoint.save(folder, state, step=9, keep=9)
    with pytest.raises(ValueError, match="do not fit") as raised:
        load_encoder(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.slow
def test_foreign_files_are_fed_as_told(
    tmp_path: Path, shards_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--image_size, --mean and --std decide what the encoder sees; what is taken without them is said."""
    file = torchvision_file(tmp_path / "r18.pth")
    usual = load_encoder(file)
    assert (usual.image_size, usual.mean_std[0]) == (224, (0.485, 0.456, 0.406))
    assert "224 pixels (--image_size), ImageNet's mean and std (--mean --std)" in capsys.readouterr().err
    seen = []

    def extract(embed: object, source: object, crops: Any, **_: object) -> None:
        seen.append(crops)
        raise ValueError("seen")

    monkeypatch.setattr(knn, "extract", extract)
    monkeypatch.setattr("transfer.gallery.extract", extract)
    told = ["--run", str(file), "--image_size", "64", "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.1"]
    shards = str(shards_dir)
    monkeypatch.setattr("sys.argv", ["knn", *told, "--train", shards, "--val", shards])
    with pytest.raises(ValueError, match="seen"):
        knn.main(arguments.knn())
    monkeypatch.setattr("sys.argv", ["gallery", *told, "--data", shards, "--output", str(tmp_path / "g.png")])
    with pytest.raises(ValueError, match="seen"):
        gallery.main(arguments.gallery())
    assert "does not say" not in capsys.readouterr().err
    for crops in seen:
        assert (crops.image_size, crops.mean_std) == (64, ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    monkeypatch.setattr("sys.argv", ["linear", *told, "--train", shards, "--val", shards])
    assert arguments.encoder_arguments(arguments.linear())["mean_std"] == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    monkeypatch.setattr("sys.argv", ["linear", *told[:8], "--train", shards, "--val", shards])
    with pytest.raises(ValueError, match="--mean and --std belong together"):
        arguments.encoder_arguments(arguments.linear())


def test_another_normalisation_gives_other_features(run_folder: Path, shards_dir: Path) -> None:
    source = open_source(str(shards_dir))
    features = []
    for mean_std in (None, ((0.5,) * 3, (0.25,) * 3)):
        loaded = load_encoder(run_folder, mean_std=mean_std)
        crops = CentralCrops(loaded.image_size, loaded.mean_std, batch_size=16, num_threads=1)
        features.append(knn.extract(loaded.part("backbone"), source, crops, limit=16)[0])
    assert not torch.allclose(features[0], features[1], atol=1e-3)
