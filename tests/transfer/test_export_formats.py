"""Every export is opened by its own library, gives the same features there, and says where it came from."""

import contextlib
import importlib.util
import io
import json
import pickle
import pickletools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SHARED_DATA
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import recipe as recipes
from model.encoders import build_encoder
from transfer import export as command
from transfer import provenance
from transfer.export import export
from transfer.export_timm import crop_share
from transfer.load import LoadedEncoder, load_encoder
from transfer.provenance import check

specification = importlib.util.spec_from_file_location("export_parity", REPOSITORY / "benchmarks" / "export_parity.py")
assert specification is not None and specification.loader is not None
parity: Any = importlib.util.module_from_spec(specification)
sys.modules["export_parity"] = parity
specification.loader.exec_module(parity)

SIZE = 64
NAMES = {
    "torchvision": "r18.pth",
    "moco": "r18.pth.tar",
    "timm": "timm",
    "hf": "hf",
    "detectron2": "r18.pkl",
    "onnx": "r18.onnx",
}


@pytest.fixture(scope="module")
def pictures(image_folder: Path) -> list[Path]:
    """Photographs where there are some, else pictures drawn here."""
    real = sorted((SHARED_DATA / "photos").glob("*.JPEG")) if SHARED_DATA.is_dir() else []
    return (real or sorted(image_folder.rglob("*.jpg")))[:3]


@pytest.fixture(scope="module")
def run(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = parity.make_run(tmp_path_factory.mktemp("runs") / "photos", "resnet18", SIZE, pictures)
    rows = [{"step": 2, "loss": 7.25}, {"step": 3, "knn": 0.4375}, {"step": 4, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = provenance.weights_hash(load_encoder(folder).encoder.backbone)
    judged = [
        {"protocol": "linear", "val": "abc", "encoder": e, "figures": {"linear": f}} for e, f in ((own, 0.25), ("x", 1))
    ]
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in judged))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By format; each is written once, by the test that first asks for it."""
    folder = tmp_path_factory.mktemp("exported")

    class Exported(dict[str, Path]):
        def __missing__(self, format: str) -> Path:
            export(str(run), folder / NAMES[format], format)  # type: ignore[arg-type]
            self[format] = folder / NAMES[format]
            return self[format]

    return Exported()


@pytest.fixture
def quickly_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders without initial weights, which take most of the time."""
    for rule in ("kaiming_normal_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, rule, lambda tensor, *_, **__: tensor)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchvision", "moco", "timm", "hf", "onnx"])
def test_its_library_computes_the_same(run: Path, exported: dict[str, Path], pictures: list[Path], format: str) -> None:
    pytest.importorskip({"hf": "transformers", "onnx": "onnxruntime", "timm": "timm"}.get(format, "torch"))
    loaded = load_encoder(run)
    images = parity.photographs(pictures, SIZE, loaded.mean_std)
    with torch.no_grad():
        ours = loaded.encoder.backbone(images)
        for number in (len(images), 1) if format == "onnx" else (len(images),):
            theirs = parity.features(format, exported[format], "resnet18", images[:number])
            assert theirs.shape == ours[:number].shape
            assert float((theirs - ours[:number]).abs().max() / ours.abs().max()) < 1e-5


def test_timm_takes_its_own_back(pictures: list[Path], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    run = parity.make_run(tmp_path / "run", "timm:test_vit", SIZE, pictures)
    images = parity.photographs(pictures, SIZE, load_encoder(run).mean_std)
    assert parity.difference(run, "timm", tmp_path / "out", images) < 1e-5
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert timm.data.resolve_data_config({}, model=net)["input_size"][1] == SIZE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "width", "format"), [("resnext50_32x8d", 1, "timm"), ("resnet18", 2, "hf")], ids=["groups", "width"]
)
@pytest.mark.usefixtures("quickly_built")
def test_other_shapes(arch: str, width: int, format: str, tmp_path: Path) -> None:
    """Groups in timm, widths in transformers: all tensors find their places. `benchmarks/export_parity.py` compares
    their features."""
    pytest.importorskip({"timm": "timm", "hf": "transformers"}[format])
    encoder = build_encoder(arch, width=width, dim=8).eval()
    r = recipes.Recipe(arch=arch, width=width, dim=8, image_size=SIZE)
    loaded = LoadedEncoder(encoder, r, SIZE, ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), "run")
    folder = command.timm_folder if format == "timm" else command.hf_folder
    for name, content in folder(loaded, provenance.provenance(loaded, format), {}).items():
        (tmp_path / name).write_bytes(content)
    if format == "timm":
        import timm

        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).layer1[0].conv2.groups == 32
    else:
        import transformers

        _, said = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(said.values()), said
    assert check(tmp_path)["recipe"]["arch"] == arch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "format", "refused"),
    [
        ({"arch": "resnet18", "small_stem": True}, "timm", "timm has no resnet18 with a 3x3 stride-1 stem"),
        ({"arch": "resnet18", "width": 2}, "timm", "timm has no resnet18 with width 2"),
        ({"arch": "resnet18", "small_stem": True}, "hf", "no 3x3 stride-1 stem .*resnet18"),
        ({"arch": "resnext50_32x8d"}, "hf", "no groups, so it holds no resnext50_32x8d"),
        ({"arch": "timm:test_vit"}, "hf", "holds no timm:test_vit"),
        ({"arch": "timm:test_vit"}, "detectron2", "not timm:test_vit"),
        ({"arch": "resnet18", "small_stem": True}, "detectron2", "no a 3x3 stride-1 stem"),
        ({"arch": "resnet18", "width": 2}, "detectron2", "no a stem of width 2"),
    ],
)
@pytest.mark.usefixtures("quickly_built")
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, options: dict[str, Any], format: str, refused: str
) -> None:
    (tmp_path / "run").mkdir()
    recipes.save(recipes.Recipe(**options, dim=8, image_size=32), tmp_path / "run" / "recipe.yaml")
    state = load_encoder(tmp_path / "run", untrained=True).encoder.state_dict()
    checkpoint.save(tmp_path / "run", {"encoder": state, "step": 1}, step=1, keep=1)
    with pytest.raises(ValueError, match=refused.replace("no a", "no a?")):
        export(str(tmp_path / "run"), tmp_path / "out.pkl", format)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_timm_feeds_and_finetunes_it_as_it_was_trained(run: Path, exported: dict[str, Path]) -> None:
    timm = pytest.importorskip("timm")
    loaded = load_encoder(run)
    net = timm.create_model(f"local-dir:{exported['timm']}", pretrained=True, num_classes=5)
    assert net.fc.out_features == 5
    assert torch.equal(net.layer1[0].conv1.weight, loaded.encoder.backbone.layer1[0].conv1.weight)  # type: ignore[union-attr, index]
    config = timm.data.resolve_data_config({}, model=net)
    mean, std = loaded.mean_std
    assert tuple(config["input_size"]) == (3, SIZE, SIZE) and config["interpolation"] == "bilinear"
    assert (tuple(config["mean"]), tuple(config["std"])) == (tuple(mean), tuple(std))
    for size in range(16, 600, 7):  # timm divides, and rounds down
        config = {**config, "input_size": (3, size, size), "crop_pct": crop_share(size)}
        resize = timm.data.create_transform(**config).transforms[0]
        assert resize.size == parity.default_resize(size)


def test_transformers_feeds_it_as_it_was_trained(run: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(exported["hf"])
    mean_std = load_encoder(run).mean_std
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    image = Image.fromarray(pixels).resize((400, 200), Image.Resampling.BICUBIC)  # an even rest is cut on both sides
    image.save(tmp_path / "a.png")
    ours = parity.photographs([tmp_path / "a.png"], SIZE, mean_std)
    theirs = processor([image], return_tensors="pt")["pixel_values"]
    assert theirs.shape == ours.shape
    levels = (theirs - ours).abs() * torch.tensor(mean_std[1]).view(1, 3, 1, 1) * 255
    assert levels.mean() < 0.5 and levels.max() <= 2  # it resizes tensors, we resize pictures


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_the_model_card_tells_what_the_run_knows(run: Path, exported: dict[str, Path], format: str) -> None:
    text = (exported[format] / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == {"timm": "timm", "hf": "transformers"}[format]
    recipe = yaml.safe_load(body.partition("```yaml")[2].partition("```")[0])
    assert recipe["arch"] == "resnet18" and recipe["image_size"] == SIZE and "data" not in recipe
    assert "fingerprint of the data: photographs" in body and "steps: 3" in body
    assert "| loss, step 2 | 7.25 |" in body and "| kNN accuracy, step 3 | 0.4375 |" in body
    assert "| linear: linear, on data abc | 0.25 |" in body and body.count("| linear: ") == 1
    assert str(run.parent) not in text  # a card is for others
    code = body.partition("```python")[2].partition("```")[0]
    scope: dict[str, Any] = {"image": Image.new("RGB", (90, 80), "teal")}
    exec(code.replace("FOLDER", str(exported[format])), scope)
    assert tuple(scope["features"].shape) == (1, 512)


def resnet50_of_detectron2(first: str, last: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the ResNet-50 in a detectron2 model whose res5 lies below `last`, as its configurations have
    it (BN): R-50-C4 keeps res5 in the heads, FPN has all of it in backbone.bottom_up."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        shapes.update({f"{name}.norm.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.norm.num_batches_tracked"] = ()

    layer(f"{first}.stem.conv1", 64, 3, 7)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        middle = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"{last if stage == 5 else first}.res{stage}.{block}"
            into = middle * 4 if block else (64 if stage == 2 else middle * 2)
            layer(f"{name}.conv1", middle, into, 1)
            layer(f"{name}.conv2", middle, middle, 3)
            layer(f"{name}.conv3", middle * 4, middle, 1)
            if not block:
                layer(f"{name}.shortcut", middle * 4, into, 1)
    return shapes


@pytest.fixture(scope="module")
def resnet50_pkl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("r50")
    recipes.save(recipes.Recipe(arch="resnet50", dim=8, mlp=True, image_size=32), folder / "recipe.yaml")
    state = load_encoder(folder, untrained=True).encoder.state_dict()
    checkpoint.save(folder, {"encoder": state, "step": 1}, step=1, keep=1)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        export(str(folder), folder / "r50.pkl", "detectron2")
    assert "PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]" in said.getvalue()
    return folder / "r50.pkl"


@pytest.mark.parametrize(
    ("first", "last"), [("backbone", "roi_heads"), ("backbone.bottom_up", "backbone.bottom_up")], ids=["C4", "FPN"]
)
def test_detectron2_finds_every_tensor(resnet50_pkl: Path, first: str, last: str) -> None:
    """Its rule: a tensor of the model takes the longest name in the file that is the end of its own."""
    with resnet50_pkl.open("rb") as file:
        content = pickle.load(file, encoding="latin1")  # as detectron2 reads it
    assert content["matching_heuristics"] is True and content["__author__"] == "MOCO"
    model = {name: torch.from_numpy(array) for name, array in content["model"].items()}
    matched = set()
    for name, shape in resnet50_of_detectron2(first, last).items():
        found = max((key for key in model if f".{name}".endswith(f".{key}")), key=len, default="")
        assert found, name
        assert tuple(model[found].shape) == shape, name
        assert found not in matched  # one tensor for two is an error there
        matched.add(found)
    rest = model.keys() - matched
    assert rest == {f"stem.fc.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}  # the head, as the converter
    encoder = load_encoder(resnet50_pkl.parent).encoder.backbone.state_dict()
    assert torch.equal(model["res4.5.conv2.norm.weight"], encoder["layer3.5.bn2.weight"])
    assert torch.equal(model["res3.0.shortcut.weight"], encoder["layer2.0.downsample.0.weight"])


def test_an_old_numpy_reads_the_pickle(resnet50_pkl: Path) -> None:
    """NumPy 2 names modules that NumPy 1 does not have, and detectron2 is often installed with that."""
    names = [
        argument for code, argument, _ in pickletools.genops(resnet50_pkl.read_bytes()) if isinstance(argument, str)
    ]
    assert not any("_core" in name or "multiarray" in name for name in names) and "numpy" in names


@pytest.mark.slow
@pytest.mark.parametrize("format", NAMES)
def test_every_export_says_where_it_came_from(
    run: Path, exported: dict[str, Path], format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip({"timm": "timm", "onnx": "onnx"}.get(format, "torch"))
    command.main(command.Namespace(check=exported[format]))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == check(exported[format])
    assert record["format"] == format and record["step"] == 3 and record["data"] == "photographs"
    assert record["recipe"]["arch"] == "resnet18" and record["input"]["image_size"] == SIZE
    assert record["encoder"].endswith(provenance.weights_hash(load_encoder(run).encoder.backbone))
    assert str(run.parent) not in json.dumps(record)


def test_a_file_of_another_program_tells_its_architecture_alone(exported: dict[str, Path], tmp_path: Path) -> None:
    """The rest of its recipe is not known, and the usual values are not taken for it."""
    export(str(exported["moco"]), tmp_path / "again.safetensors", "torchvision")
    record = check(tmp_path / "again.safetensors")
    assert record["recipe"] == {"arch": "resnet18", "width": 1, "small_stem": False, "dim": 16, "mlp": False}
    assert record["encoder"] == check(exported["moco"])["encoder"]
    assert record["step"] == 0 and record["data"] == ""


def test_other_weights_under_the_same_record_are_noticed(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    state = load_file(exported["timm"] / "model.safetensors")
    state["bn1.bias"][0] += 1e-6
    record = json.dumps(check(exported["timm"]))
    save_file(state, folder / "model.safetensors", metadata={"provenance": record})
    with pytest.raises(ValueError, match="holds other weights than were exported"):
        check(folder)
    with pytest.raises(ValueError, match="does not say where it came from"):
        save_file(state, folder / "model.safetensors")
        check(folder)
    moved = tmp_path / "moved.pth"
    moved.write_bytes(exported["torchvision"].read_bytes())
    with pytest.raises(ValueError, match="does not say where it came from"):
        check(moved)
    Path(f"{moved}.json").write_text(Path(f"{exported['torchvision']}.json").read_text())
    assert check(moved)["format"] == "torchvision"


def test_a_pickle_of_another_program_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match="nothing of it was run"):
        check(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("format", NAMES)
def test_nothing_of_others_is_written_over(run: Path, tmp_path: Path, format: str) -> None:
    place = tmp_path / NAMES[format]
    theirs = place
    if format in ("timm", "hf"):
        place.mkdir()
        theirs = place / "notes.txt"
    theirs.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"is there and is no|is no empty folder"):
        export(str(run), place, format)  # type: ignore[arg-type]
    assert theirs.read_bytes() == b"mine" and sorted(tmp_path.rglob("*")) == sorted({place, theirs})


@pytest.mark.slow
def test_an_export_is_written_anew(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(str(run), tmp_path / "a.pth", "torchvision")
    assert check(tmp_path / "a.pth")["format"] == "torchvision"
    (tmp_path / "b.pth.json").write_text("[]")
    with pytest.raises(ValueError, match=r"b\.pth\.json is there and is no export"):
        export(str(run), tmp_path / "b.pth", "torchvision")


def test_a_folder_at_a_url(run: Path) -> None:
    import fsspec

    export(str(run), "memory://exports/timm", "timm")
    fs = fsspec.filesystem("memory")
    names = {name.rpartition("/")[2] for name in fs.find("exports/timm")}
    assert names == {"model.safetensors", "config.json", "README.md"}
    with pytest.raises(ValueError, match="is there and is no empty folder"):
        export(str(run), "memory://exports/timm", "timm")


@pytest.mark.slow
def test_onnx_with_a_classifier(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = parity.make_run(tmp_path / "run", "timm:test_resnet", SIZE, pictures)
    loaded = load_encoder(run)
    fc = nn.Linear(loaded.encoder.features, 3)
    weights = {f"fc.{name}": tensor.detach() for name, tensor in fc.named_parameters()}
    monkeypatch.setattr(command, "trained_classifier", lambda folder, _: weights)
    export(str(run), tmp_path / "c.onnx", "onnx", tmp_path)
    images = parity.photographs(pictures, SIZE, loaded.mean_std)
    session = onnxruntime.InferenceSession(str(tmp_path / "c.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = fc(loaded.encoder.backbone(images)).numpy()
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5
    assert check(tmp_path / "c.onnx")["format"] == "onnx"
