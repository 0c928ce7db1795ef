"""The ranks of benchmarks/against_reference.py: they train ours and note it, replay that in the reference's code, and
load our export there. Each change of torch's or our functions is for a forked process that then ends.
"""

import importlib
import json
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import recipe as recipes
import train
from model import batchnorm
from model.encoders import Encoder
from model.interchange import reference_checkpoint
from model.moco import MoCo
from pipeline import files
from pipeline.loader import Batch, Loader
from trainer import build
from transfer.export import export
from transfer.load import load_encoder

BATCH = 16
COMMON = (
    f"--arch resnet18 --image_size 32 --batch_size {BATCH} --queue_size 64 --moco_momentum 0.9 --lr 0.002 --epochs 2 "
    "--precision fp32 --num_threads 1 --log_every 1 --save_every 1000000 --hang_seconds 0 --trackers []"
)
VERSIONS = {
    "v1": "--mlp false --temperature 0.07 --views v1 --schedule step --milestones [1]",
    "v2": "--mlp true --temperature 0.2 --views v2 --schedule cosine",
}
QUANTITIES = ("loss", "query parameters", "key parameters", "statistics", "queue", "pointer")


class Case(NamedTuple):
    version: str
    ours: int  # ranks
    theirs: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.version} {self.ours}:{self.theirs} {self.dtype}"

    def flags(self, shards: Path, out: Path) -> list[str]:
        groups = "--bn_groups 1 --shuffle_bn false" if self.theirs == 1 else "--bn_groups 2"
        flags = f"{COMMON} {VERSIONS[self.version]} {groups}".split()
        return [*flags, "--data", str(shards), "--out", str(out)]


CASES = {
    case.name: case
    for dtype in ("float32", "float64")
    for version in VERSIONS
    for ours, theirs in ((2, 2), (1, 1), (1, 2))
    for case in [Case(version, ours, theirs, dtype)]
}


# --- processes ------------------------------------------------------------------------------------


def in_ranks(work: Callable[..., None], ranks: int, log: Path, *arguments: Any) -> None:
    """work(rank, *arguments) in forked processes that find each other by the environment. SystemExit with the end of
    their output when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # torch and DALI are imported once for all
    processes = [fork.Process(target=_rank, args=(work, rank, ranks, port, log, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()  # it would wait for the one that failed
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{work.__name__} failed:\n{log.read_text()[-3000:]}")


def _rank(work: Callable[..., None], rank: int, ranks: int, port: int, log: Path, arguments: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    work(rank, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def stand_in(checkout: Path) -> None:
    """Makes the checkout importable and able to run here, as against_reference.py tells. For a process of its own."""
    view = torch.Tensor.view

    def identity(self: Any, *arguments: Any, **options: Any) -> Any:
        return self

    def view_or_copy(self: Tensor, *shape: Any) -> Tensor:
        try:
            return view(self, *shape)
        except RuntimeError:
            return self.reshape(*shape)

    sys.dont_write_bytecode = True
    sys.path.insert(0, str(checkout))
    tensor: Any = torch.Tensor
    module: Any = nn.Module
    tensor.view, tensor.cuda, module.cuda = view_or_copy, identity, identity


# --- ours -----------------------------------------------------------------------------------------


def record(rank: int, case: Case, shards: Path, folder: Path) -> None:
    """Runs train.py. Leaves in `folder` the state before the first step and after each, in the reference's names
    (rank 0), and each rank's batches, permutations and losses."""
    double = case.dtype == "float64"
    notes: dict[str, list[Any]] = {"batches": [], "permutations": [], "losses": []}
    take, draw, make = Loader.__next__, batchnorm.draw_permutation, build.build_dictionary

    def next_batch(loader: Loader) -> Batch:
        batch = take(loader)
        notes["batches"].append((batch.query.contiguous().clone(), batch.key.contiguous().clone()))
        return batch._replace(query=batch.query.double(), key=batch.key.double()) if double else batch

    def permutation(rows: int, seed: int, count: int) -> Any:
        notes["permutations"].append(torch.from_numpy(draw(rows, seed, count)))
        return notes["permutations"][-1].numpy()

    def dictionary(r: recipes.Recipe, net: Encoder, *arguments: Any) -> Any:
        moco = make(r, net, *arguments)
        assert isinstance(moco, MoCo)
        if double:
            net.double()
            moco.double()
        enqueue, loss = moco.enqueue, moco.loss

        def save(step: int) -> None:
            if rank == 0:
                state = reference_checkpoint(net.state_dict(), moco.state_dict(), arch=r.arch)["state_dict"]
                torch.save(state, folder / f"step{step}.pt")

        def enqueue_and_save(keys: Tensor) -> None:  # the last thing that a step changes
            enqueue(keys)
            save(len(notes["losses"]))

        def loss_noted(q: Tensor, keys: Tensor) -> Any:
            found = loss(q, keys)
            notes["losses"].append(found[0].item())
            return found

        moco.enqueue, moco.loss = enqueue_and_save, loss_noted  # type: ignore[method-assign]
        save(0)
        return moco

    Loader.__next__ = next_batch  # type: ignore[method-assign, assignment]
    batchnorm.draw_permutation = permutation
    build.build_dictionary = dictionary  # type: ignore[assignment]
    if double:
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    train.main(recipes.parse(case.flags(shards, folder / "run")))
    torch.save(notes, folder / f"rank{rank}.pt")


# --- theirs ---------------------------------------------------------------------------------------


def replay(rank: int, case: Case, checkout: Path, folder: Path) -> None:
    """Trains with the reference's code what `record` left in `folder`, and writes there losses{rank}.json, and
    differences.json: the largest ones by quantity (rank 0)."""
    stand_in(checkout)
    builder, main_moco = importlib.import_module("moco.builder"), importlib.import_module("main_moco")
    r = recipes.parse(case.flags(folder, folder))
    dtype = getattr(torch, case.dtype)
    notes = [torch.load(folder / f"rank{i}.pt") for i in range(case.ours)]

    def share(step: int) -> list[Tensor]:
        """Query and key images of this rank: its part of the global batch."""
        views = zip(*(note["batches"][step] for note in notes))
        return [torch.cat(view).chunk(case.theirs)[rank].to(dtype) for view in views]

    drawn = iter(notes[0]["permutations"])
    torch.randperm = lambda rows: next(drawn, torch.arange(rows))  # type: ignore[assignment]
    dist.init_process_group("gloo")
    base = torchvision.models.__dict__[r.arch]
    model = builder.MoCo(base, r.dim, r.queue_size, r.moco_momentum, r.temperature, r.mlp).to(dtype)
    model = nn.parallel.DistributedDataParallel(model)
    model.load_state_dict(torch.load(folder / "step0.pt"))  # every name, and none besides
    criterion, losses = nn.CrossEntropyLoss(), list[float]()
    criterion.register_forward_hook(lambda module, given, loss: losses.append(loss.item()))
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=r.sgd_momentum, weight_decay=r.weight_decay)
    largest = dict.fromkeys(QUANTITIES[1:], 0.0)

    def compare(*_: Any) -> None:
        step = len(losses)
        now, before = (torch.load(folder / f"step{i}.pt") for i in (step, step - 1))
        for name, theirs in model.state_dict().items():
            kind = quantity(name)
            ours = before[name] if kind == "key parameters" else now[name]
            largest[kind] = max(largest[kind], difference(ours, theirs))

    if rank == 0:
        optimizer.register_step_post_hook(compare)
    steps = len(notes[0]["batches"])
    args = SimpleNamespace(
        lr=r.lr, cos=r.schedule == "cosine", epochs=r.epochs, schedule=list(r.milestones), gpu=None, print_freq=1
    )
    for epoch in range(r.epochs):
        main_moco.adjust_learning_rate(optimizer, epoch, args)
        per_epoch = range(epoch * steps // r.epochs, (epoch + 1) * steps // r.epochs)
        main_moco.train([(share(step), None) for step in per_epoch], model, criterion, optimizer, epoch, args)
    files.write_atomically(folder / f"losses{rank}.json", json.dumps(losses).encode())
    if rank == 0:
        files.write_atomically(folder / "differences.json", json.dumps(largest).encode())


def quantity(name: str) -> str:
    """The one of QUANTITIES that a tensor of the reference's state dict belongs to."""
    if name.endswith("queue_ptr"):
        return "pointer"
    if name.endswith("queue"):
        return "queue"
    if "running_" in name or "num_batches" in name:
        return "statistics"
    return "query parameters" if "encoder_q." in name else "key parameters"


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of any element; infinite where one is no number."""
    found = (one.double() - other.double()).abs().max().item()
    return found if math.isfinite(found) else math.inf


# --- the way back ---------------------------------------------------------------------------------


def linear(rank: int, checkout: Path, images: Path, folder: Path) -> None:
    """The reference's linear evaluation on our export of `folder`'s run; writes folder/linear.json."""
    file = folder / "export.pth.tar"
    export(str(folder / "run"), str(file), "moco")
    ours = load_encoder(str(folder / "run"), feeds_images=False).encoder.eval().backbone
    stand_in(checkout)
    os.chdir(folder)  # where it writes its checkpoints
    found: dict[str, Any] = {"missing": [], "unexpected": [], "passes": 0, "logits": 0.0}
    load, arch = nn.Module.load_state_dict, "resnet18"

    def load_noted(self: nn.Module, state: Any, strict: bool = True, **options: Any) -> Any:
        message = load(self, state, strict=strict, **options)
        if not strict:
            found.update(missing=sorted(message.missing_keys), unexpected=sorted(message.unexpected_keys))
        return message

    def beside_ours(module: nn.Module, given: Any, logits: Tensor) -> None:
        if not isinstance(module, torchvision.models.ResNet) or module is ours:
            return
        with torch.no_grad():
            features = ours(given[0])
            expected = nn.functional.linear(features, module.fc.weight, module.fc.bias)
        found["passes"] += 1
        found["logits"] = max(found["logits"], difference(expected, logits))

    nn.Module.load_state_dict = load_noted  # type: ignore[method-assign, assignment]
    nn.modules.module.register_module_forward_hook(beside_ours)
    sys.argv = ["main_lincls.py", str(images), "-a", arch, "--pretrained", str(file), "-b", "8", "-j", "0"]
    sys.argv += ["--epochs", "1"]
    importlib.import_module("main_lincls").main()
    files.write_atomically(folder / "linear.json", json.dumps(found).encode())
