"""MoCo's released files: read in every layout that is about, written so that the reference's loader takes them."""

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from model.encoders import Encoder, build_encoder
from model.interchange import (
    continue_from,
    encoder_of,
    load_into,
    momentum_state,
    over_both_encoders,
    read_moco,
    reference_checkpoint,
)
from model.moco import MoCo

QUEUE = 32


def write_moco(
    path: Path, encoder: Mapping[str, Tensor], moco: Mapping[str, Tensor] | None = None, **about: Any
) -> None:
    torch.save(reference_checkpoint(encoder, moco, **about), path)


@functools.cache
def released(mlp: bool = False, seed: int = 0) -> Mapping[str, Tensor]:
    """A state as the reference code makes it: torchvision's resnet18 with num_classes=16, the head replaced for v2."""
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=16)
    if mlp:
        net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)  # type: ignore[assignment]
    return net.state_dict()


@functools.cache
def whole(mlp: bool = False) -> Mapping[str, Tensor]:
    state = {f"module.encoder_q.{name}": t for name, t in released(mlp).items()}
    state |= {f"module.encoder_k.{name}": t for name, t in released(mlp, seed=1).items()}
    queue = torch.nn.functional.normalize(torch.randn(16, QUEUE), dim=0)
    return state | {"module.queue": queue, "module.queue_ptr": torch.tensor([12])}


def assert_is(encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    """The encoder computes what torchvision's model with that state does."""
    mlp = "fc.2.weight" in state
    net = torchvision.models.resnet18(num_classes=16)
    if mlp:
        net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)  # type: ignore[assignment]
    net.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder.eval()(images), net.eval()(images))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_goes_on_from_a_file(tmp_path: Path) -> None:
    """Written by one run and continued by another: both encoders, queue and pointer to the bit."""
    encoder, moco = run(0)
    moco.momentum_update(run(1)[0], 0.5)
    moco.enqueue(torch.nn.functional.normalize(torch.randn(20, 16), dim=1))
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), moco.state_dict(), arch="resnet18", epoch=7)
    other, other_moco = run(2)
    file = read_moco(tmp_path / "m.pth.tar")
    continue_from(file, other, other_moco, m=0.5)
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
    continue_from(read_moco(tmp_path / "m.pth.tar"), encoder, moco, m=0.5)
    assert all(torch.equal(q, k) for q, k in zip(encoder.parameters(), moco.encoder_k.parameters()))
    assert torch.equal(moco.queue, queue) and int(moco.queue_filled) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mlp", [False, True])
def test_the_references_linear_evaluation_takes_our_file(tmp_path: Path, mlp: bool) -> None:
    """Its loader keeps `module.encoder_q.*` but for `module.encoder_q.fc*`, drops all else, and loads the rest into
    torchvision's model of that name: exactly fc.weight and fc.bias may be missing, nothing unexpected.
    """
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", mlp=mlp)
    moco = MoCo(encoder, dim=128, queue_size=QUEUE, temperature=0.2)
    write_moco(tmp_path / "m.pth.tar", encoder.state_dict(), moco.state_dict(), arch="resnet18", epoch=200)
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
    assert set(content) == {"epoch", "arch", "state_dict", "key_encoder_updated"} and content["epoch"] == 200
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module.encoder_q.conv1.weight", torch.zeros(1).expand(64 * 10**6, 3, 7, 7)),  # a few bytes in the file
        ("module.encoder_q.fc.weight", torch.zeros(1).expand(10**9, 512)),
        ("module.encoder_q.fc.weight", torch.tensor(1.0)),
        ("module.encoder_q.conv1.weight", torch.tensor(1.0)),
        ("module.encoder_q.layer1.0.conv2.weight", torch.zeros(64, 0, 3, 3)),
        ("module.queue", torch.zeros(3)),
        ("module.queue", torch.zeros(16, QUEUE, dtype=torch.complex64)),
        ("module.queue_ptr", torch.tensor([QUEUE])),
        ("module.queue_ptr", torch.tensor([float("nan")])),
        ("module.queue_ptr", torch.zeros(0)),
    ],
)
def test_strange_tensors_are_one_line_that_names_the_file(tmp_path: Path, name: str, value: Tensor) -> None:
    torch.save({"epoch": "x", "arch": 3, "state_dict": {**whole(), name: value}}, tmp_path / "odd.pth.tar")
    assert (tmp_path / "odd.pth.tar").stat().st_size < 200e6
    with pytest.raises(ValueError, match=r"^.*odd\.pth\.tar[^\n]*$"):
        encoder_of(read_moco(tmp_path / "odd.pth.tar"))


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"encoder_q.conv1.weight": torch.zeros(1 << 20)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
    with pytest.raises(ValueError, match=r"bomb\.pth is refused: its records are compressed"):
        read_moco(tmp_path / "bomb.pth")


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


class Reference(torch.nn.Module):
    """The reference's MoCo for one process: key encoder moved at the beginning of a forward pass, keys enqueued at its
    end, one optimiser over both encoders (moco/builder.py and main_moco.py at 7397dfe)."""

    def __init__(self, mlp: bool) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (torchvision.models.resnet18(num_classes=16) for _ in range(2))
        if mlp:
            for net in (self.encoder_q, self.encoder_k):
                net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)  # type: ignore[assignment]
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.nn.functional.normalize(torch.randn(16, QUEUE), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, query: Tensor, key: Tensor) -> float:
        normalize = torch.nn.functional.normalize
        q = normalize(self.encoder_q(query), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
                theirs.data = theirs.data * 0.9 + ours.data * (1 - 0.9)
            k = normalize(self.encoder_k(key), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1) / 0.2  # type: ignore[operator]
        at = int(self.queue_ptr)  # type: ignore[arg-type]
        self.queue[:, at : at + len(k)] = k.T  # type: ignore[index]
        self.queue_ptr[0] = (at + len(k)) % QUEUE  # type: ignore[index]
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, path: Path, epoch: int) -> None:
        state = {f"module.{name}": t for name, t in self.state_dict().items()}
        content = {"epoch": epoch, "arch": "resnet18", "state_dict": state, "optimizer": self.optimizer.state_dict()}
        torch.save(content, path)

    def resume(self, path: Path) -> int:
        content = torch.load(path)
        self.load_state_dict({name.removeprefix("module."): t for name, t in content["state_dict"].items()})
        self.optimizer.load_state_dict(content["optimizer"])
        return int(content["epoch"])


class Ours:
    """The same step with model/'s parts, in train.py's order."""

    def __init__(self, mlp: bool) -> None:
        self.encoder = build_encoder("resnet18", dim=16, mlp=mlp)
        self.moco = MoCo(self.encoder, dim=16, queue_size=QUEUE, temperature=0.2, shuffle_bn=False)
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, query: Tensor, key: Tensor) -> float:
        q, keys = self.encoder(query), self.moco.encode_keys(key)
        loss, _ = self.moco.loss(q, keys)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.moco.momentum_update(self.encoder, 0.9)
        self.moco.enqueue(keys)
        return loss.item()

    def resume(self, path: Path) -> int:
        file = read_moco(path)
        continue_from(file, self.encoder, self.moco, m=0.9)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": momentum_state(file, self.encoder)})
        return file.epoch


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(2, 8, 3, 32, 32, generator=generator)) for _ in range(count)]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("mlp", [False, True])
def test_training_goes_from_the_reference_to_us_and_back(tmp_path: Path, mlp: bool) -> None:
    """Two steps there, two here, one there: the losses are those of five steps there, but for rounding here, and for
    the one momentum update that the reference makes twice on the way back (see `reference_checkpoint`)."""
    torch.manual_seed(0)
    whole, begun, ours, last = Reference(mlp), Reference(mlp), Ours(mlp), Reference(mlp)
    begun.load_state_dict(whole.state_dict())
    data = pairs(5)
    losses = [whole.step(*pair) for pair in data]
    assert [begun.step(*pair) for pair in data[:2]] == pytest.approx(losses[:2], rel=1e-6)

    begun.save(tmp_path / "theirs.pth.tar", epoch=2)
    assert ours.resume(tmp_path / "theirs.pth.tar") == 2
    assert [ours.step(*pair) for pair in data[2:4]] == pytest.approx(losses[2:4], rel=1e-4)

    content = reference_checkpoint(
        ours.encoder.state_dict(),
        ours.moco.state_dict(),
        arch="resnet18",
        epoch=4,
        optimizer=over_both_encoders(ours.optimizer.state_dict()),
    )
    torch.save(content, tmp_path / "ours.pth.tar")
    assert last.resume(tmp_path / "ours.pth.tar") == 4
    for name, tensor in ours.moco.encoder_k.state_dict().items():
        theirs = name.removeprefix("backbone.").replace("head.", "fc.")
        assert torch.equal(tensor, last.encoder_k.state_dict()[theirs])
    for parameter, theirs in zip(ours.encoder.parameters(), last.encoder_q.parameters(), strict=True):
        buffer = ours.optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(buffer, last.optimizer.state[theirs]["momentum_buffer"])
    assert torch.equal(ours.moco.queue, last.queue) and int(ours.moco.queue_ptr) == int(last.queue_ptr)  # type: ignore[arg-type]
    assert [last.step(*pair) for pair in data[4:]] == pytest.approx(losses[4:], rel=0.02)


@pytest.mark.slow
def test_a_file_whose_optimiser_is_another_one(tmp_path: Path) -> None:
    encoder, moco = run(0)
    adam = torch.optim.Adam(encoder.parameters())
    torch.nn.functional.cross_entropy(encoder(torch.randn(4, 3, 32, 32)), torch.zeros(4, dtype=torch.long)).backward()
    adam.step()
    torch.save({"state_dict": whole(True), "optimizer": adam.state_dict()}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="momentum buffers that are not those of SGD"):
        momentum_state(read_moco(tmp_path / "a.pth.tar"), encoder)
    sgd = torch.optim.SGD(encoder.head.parameters(), 0.1, momentum=0.9)
    sgd.step()
    torch.save({"state_dict": whole(True), "optimizer": sgd.state_dict()}, tmp_path / "h.pth.tar")
    with pytest.raises(ValueError, match=r"h\.pth\.tar has 4 momentum buffers that are not .* --init_with weights"):
        momentum_state(read_moco(tmp_path / "h.pth.tar"), encoder)
    assert moco.queue.shape == (16, QUEUE)
