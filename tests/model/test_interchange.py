"""MoCo's released files: read in every layout that is about, written so that the reference's loader takes them."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from model.encoders import Encoder, build_encoder
from model.interchange import continue_from, encoder_of, load_into, read_moco, write_moco
from model.moco import MoCo

QUEUE = 32


def released(mlp: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A state as the reference code makes it: torchvision's resnet18 with num_classes=16, the head replaced for v2."""
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=16)
    if mlp:
        net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)  # type: ignore[assignment]
    return dict(net.state_dict())


def whole(mlp: bool = False) -> dict[str, Tensor]:
    state = {f"module.encoder_q.{name}": t for name, t in released(mlp).items()}
    state |= {f"module.encoder_k.{name}": t for name, t in released(mlp, seed=1).items()}
    queue = torch.nn.functional.normalize(torch.randn(16, QUEUE), dim=0)
    return state | {"module.queue": queue, "module.queue_ptr": torch.tensor([12])}


def assert_is(encoder: Encoder, state: dict[str, Tensor]) -> None:
    """The encoder computes what torchvision's model with that state does."""
    mlp = "fc.2.weight" in state
    net = torchvision.models.resnet18(num_classes=16)
    if mlp:
        net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)  # type: ignore[assignment]
    net.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder.eval()(images), net.eval()(images))


@pytest.mark.parametrize("mlp", [False, True])
def test_reads_v1_and_v2(tmp_path: Path, mlp: bool) -> None:
    state = whole(mlp)
    torch.save(
        {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "m.pth.tar"
    )
    file = read_moco(tmp_path / "m.pth.tar")
    assert (file.arch, file.width, file.small_stem, file.dim, file.mlp) == ("resnet18", 1, False, 16, mlp)
    assert file.epoch == 200 and file.queue_ptr == 12 and file.has_head
    assert file.queue is not None and torch.equal(file.queue, state["module.queue"])
    assert_is(encoder_of(read_moco(tmp_path / "m.pth.tar")), released(mlp))


@pytest.mark.parametrize(
    "prefix", ["module.encoder_q.", "encoder_q.", "model.encoder_q.", "module._orig_mod.encoder_q."]
)
def test_reads_other_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save({"state_dict": {f"{prefix}{name}": t for name, t in released(True).items()}}, tmp_path / "m.pth.tar")
    file = read_moco(tmp_path / "m.pth.tar")
    assert file.queue is None and not file.key_encoder and file.epoch == 0
    assert_is(encoder_of(read_moco(tmp_path / "m.pth.tar")), released(True))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.encoder_q."])
def test_reads_a_backbone_without_head_and_without_step_counts(tmp_path: Path, prefix: str) -> None:
    """Old files have no num_batches_tracked; stripped ones no fc; a bare model's fc is a classifier, not a head."""
    state = {
        f"{prefix}{name}": t
        for name, t in released().items()
        if not name.endswith("num_batches_tracked") and (prefix in ("", "module.") or not name.startswith("fc."))
    }
    torch.save(state, tmp_path / "m.pth")
    file = read_moco(tmp_path / "m.pth")
    assert not file.has_head and file.arch == "resnet18"
    encoder = encoder_of(file)
    images = torch.randn(2, 3, 64, 64)
    net = torchvision.models.resnet18(num_classes=16)
    net.load_state_dict(released())
    net.fc = torch.nn.Identity()  # type: ignore[assignment]
    assert torch.equal(encoder.eval().backbone(images), net.eval()(images))


@pytest.mark.parametrize(
    ("arch", "width", "small_stem"),
    [
        ("resnet18", 1, True),
        ("resnet34", 1, False),
        ("resnet50", 1, False),
        ("resnext50_32x8d", 1, False),
        ("resnet18", 2, True),
    ],
)
def test_recognises_the_architecture(tmp_path: Path, arch: str, width: int, small_stem: bool) -> None:
    encoder = build_encoder(arch, width=width, small_stem=small_stem, dim=16, mlp=True)
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), arch=arch)
    file = read_moco(tmp_path / "m.pth.tar")
    assert (file.arch, file.width, file.small_stem, file.dim, file.mlp) == (arch, width, small_stem, 16, True)
    assert all(torch.equal(t, file.encoder[name]) for name, t in encoder.state_dict().items())


def test_timm_models_go_through(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    encoder = build_encoder("timm:resnet10t", dim=16)
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), arch="timm:resnet10t", epoch=3)
    again = encoder_of(read_moco(tmp_path / "m.pth.tar"))
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True)
    )


def run(seed: int, dim: int = 16) -> tuple[Encoder, MoCo]:
    torch.manual_seed(seed)
    encoder = build_encoder("resnet18", dim=dim, mlp=True)
    return encoder, MoCo(encoder, dim=dim, queue_size=QUEUE, temperature=0.2)


def test_a_run_goes_on_from_a_file(tmp_path: Path) -> None:
    """Written by one run and continued by another: both encoders, queue and pointer to the bit."""
    encoder, moco = run(0)
    moco.momentum_update(run(1)[0], 0.5)
    moco.enqueue(torch.nn.functional.normalize(torch.randn(20, 16), dim=1))
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), moco.state_dict(), arch="resnet18", epoch=7)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth.tar"], "nothing is left beside it"
    other, other_moco = run(2)
    file = read_moco(tmp_path / "m.pth.tar")
    continue_from(file, other, other_moco)
    assert file.epoch == 7
    for a, b in ((encoder, other), (moco.encoder_k, other_moco.encoder_k)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(moco.queue, other_moco.queue) and int(other_moco.queue_ptr) == 20
    assert int(other_moco.queue_filled) == QUEUE and other_moco.queue_age() == 0


def test_a_run_goes_on_from_a_stripped_file(tmp_path: Path) -> None:
    """No key encoder, no queue: keys start as the queries, as at the start of any run."""
    write_moco(tmp_path / "m.pth.tar", run(0)[0].state_dict(), arch="resnet18")
    encoder, moco = run(2)
    queue = moco.queue.clone()
    continue_from(read_moco(tmp_path / "m.pth.tar"), encoder, moco)
    assert all(torch.equal(q, k) for q, k in zip(encoder.parameters(), moco.encoder_k.parameters()))
    assert torch.equal(moco.queue, queue) and int(moco.queue_filled) == 0


@pytest.mark.parametrize("mlp", [False, True])
def test_the_references_linear_evaluation_takes_our_file(tmp_path: Path, mlp: bool) -> None:
    """Its loader keeps `module.encoder_q.*` but for `module.encoder_q.fc*`, drops all else, and loads the rest into
    torchvision's model of that name: exactly fc.weight and fc.bias may be missing, nothing unexpected.
    """
    torch.manual_seed(0)
    encoder = build_encoder("resnet50", mlp=mlp)
    moco = MoCo(encoder, dim=128, queue_size=QUEUE, temperature=0.2)
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), moco.state_dict(), arch="resnet50", epoch=200)
    content = torch.load(tmp_path / "m.pth.tar", map_location="cpu", weights_only=True)
    query = "module.encoder_q."
    kept = {
        name[len(query) :]: t
        for name, t in content["state_dict"].items()
        if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc")
    }
    net = getattr(torchvision.models, content["arch"])()
    message = net.load_state_dict(kept, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys
    assert set(content) == {"epoch", "arch", "state_dict"} and content["epoch"] == 200
    assert content["state_dict"]["module.queue_ptr"].shape == (1,)
    # and the backbone is the same to the bit, batch-norm buffers included
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in encoder.backbone.state_dict().items())


class Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path, ("surprise",))


def test_a_file_that_needs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": whole(), "args": Surprise()}, tmp_path / "m.pth.tar")
    with pytest.raises(ValueError, match=r"is refused: it holds more than tensors and plain values \(pathlib"):
        read_moco(tmp_path / "m.pth.tar")


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_moco(tmp_path / "none.pth.tar")
    (tmp_path / "text.pth.tar").write_text("hello, this is no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pth\.tar is"):
        read_moco(tmp_path / "text.pth.tar")
    torch.save({"epoch": 3}, tmp_path / "empty.pth.tar")
    with pytest.raises(ValueError, match="no state dict of tensors"):
        read_moco(tmp_path / "empty.pth.tar")
    torch.save({"patch_embed.weight": torch.zeros(3)}, tmp_path / "vit.pth.tar")
    with pytest.raises(ValueError, match="no MoCo v1 or v2 file"):
        read_moco(tmp_path / "vit.pth.tar")
    torch.save(torchvision.models.resnext50_32x4d().state_dict(), tmp_path / "narrow.pth.tar")
    with pytest.raises(ValueError, match=r"\[3, 4, 6, 3\] blocks, 32 groups and first width 128"):
        read_moco(tmp_path / "narrow.pth.tar")


def test_reports_keys_that_do_not_fit() -> None:
    encoder, moco = run(0)
    state = encoder.state_dict()
    with pytest.raises(ValueError, match=r"missing: backbone\.conv1\.weight"):
        load_into(encoder, {name: t for name, t in state.items() if name != "backbone.conv1.weight"})
    with pytest.raises(ValueError, match=r"unknown: backbone\.conv9"):
        load_into(encoder, state | {"backbone.conv9": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of another shape: head\.2\.weight \(16, 512\) for \(8, 512\)"):
        load_into(run(0, dim=8)[0], state)
    assert moco.queue.shape == (16, QUEUE)
