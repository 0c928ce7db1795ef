"""All that has to be there before the first step: options that work here, data, network, dictionary."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model import interchange
from model.batchnorm import batchnorm_shortcut, split_batchnorm
from model.encoders import Encoder, build_encoder
from model.mechanisms import EndToEnd, MemoryBank
from model.moco import MoCo
from pipeline.command import cache_arguments
from pipeline.loader import Loader
from pipeline.sources.manifest import Source
from pipeline.sources.opening import open_source
from recipe import Recipe
from trainer.diagnosis import warnings_before
from trainer.log import Log
from trainer.resume import refuse_foreign_folder
from trainer.run_views import run_views

IN_USE_SECONDS = 120  # how long a run folder's last training may take to end
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def check_options(r: Recipe, ranks: int, device: torch.device) -> None:
    """Raises ValueError for what is wrong in itself, on so many ranks, or on this machine."""
    r.validate()
    r.images_per_pass(ranks)
    if r.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU take bf16 or fp32")


def check_launcher() -> None:
    """Raises ValueError for what `accelerate config` offers and a MoCo step is not written for."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"`accelerate config` asks for {name}; every rank holds both encoders here: answer no there, or launch "
                "with --multi_gpu"
            )


def lock_run_folder(out: Path) -> None:
    """Makes the run folder this process's own until it ends: two trainings in one folder would drop each other's
    metrics and checkpoints. Waits for one that is about to end; ValueError when it does not.
    """
    refuse_foreign_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # never closed
    deadline = time.monotonic() + IN_USE_SECONDS
    waiting = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = f"{out} is in use by the training {os.pread(lock, 200, 0).decode()}"
            if time.monotonic() > deadline:
                raise ValueError(f"{owner}: wait for its end, or give another --out") from None
            if not waiting:
                print(f"note: {owner}; waiting up to {IN_USE_SECONDS} s for its end", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(0.5)
        except OSError:  # a file system without locks
            break
    os.truncate(lock, 0)
    os.pwrite(lock, f"on {socket.gethostname()}, process {os.getpid()}".encode(), 0)


def open_sources_rank0_first(r: Recipe, rank: int, control: dist.ProcessGroup | None) -> dict[str, Source]:
    """Every source that the recipe names, by its name there. Rank 0 first: a missing index or manifest is built once,
    and then it is there.
    """
    names = {r.data} | ({r.knn_data, r.knn_train or r.data} if r.knn_every and r.knn_data else set())

    def opened() -> dict[str, Source]:
        return {name: open_source(name, **cache_arguments(r), progress=rank == 0) for name in sorted(names)}

    try:
        if rank == 0:
            return opened()
    finally:
        if control is not None:
            dist.barrier(group=control)
    return opened()


def open_loader(r: Recipe, source: Source, rank: int, ranks: int, device: torch.device) -> Loader:
    query, key = run_views(r)
    return Loader(
        source,
        views=query,
        key_views=key,
        image_size=r.image_size,
        batch_size=r.batch_size,
        seed=r.seed,
        rank=rank,
        world_size=ranks,
        device="cpu" if device.type == "cpu" else str(device),
        dtype=DTYPES[r.precision],
        num_threads=r.num_threads or None,
        quarantine=Path(r.out) / "quarantine.jsonl",
        max_bad_fraction=r.max_bad_fraction,
    )


def build_net(r: Recipe, ranks: int) -> Encoder:
    """The query encoder, its batch norm split into the groups of one forward pass. The seed is set right before, so
    that every rank, and transfer's untrained baseline, has the same weights. Raises ValueError when batch norm would
    leak.
    """
    groups = r.bn_groups_per_pass(ranks)
    torch.manual_seed(r.seed)
    net = build_encoder(r.arch, width=r.width, small_stem=r.small_stem, dim=r.dim, mlp=r.mlp, image_size=r.image_size)
    shortcut = batchnorm_shortcut(net, world_size=ranks, bn_groups=groups, shuffle_bn=r.shuffle_bn)
    if shortcut and r.shuffle_bn and r.mechanism != "memory_bank":  # with shuffle_bn false it is meant
        raise ValueError(shortcut)
    return split_batchnorm(net, groups)


def build_dictionary(
    r: Recipe, net: Encoder, ranks: int, samples: int, device: torch.device
) -> MoCo | EndToEnd | MemoryBank:
    """One of the three mechanisms of the paper's figure 2."""
    if r.mechanism == "end_to_end":
        return EndToEnd(net, temperature=r.temperature, shuffle_bn=r.shuffle_bn, seed=r.seed)
    if r.mechanism == "memory_bank":
        return MemoryBank(
            samples, dim=r.dim, num_negatives=r.queue_size, temperature=r.temperature, seed=r.seed, device=device
        )
    return MoCo(
        net,
        dim=r.dim,
        queue_size=r.queue_size,
        temperature=r.temperature,
        bn_groups=r.bn_groups_per_pass(ranks),
        shuffle_bn=r.shuffle_bn,
        seed=r.seed,
    )


def begin_from(
    r: Recipe,
    net: Encoder,
    dictionary: MoCo | EndToEnd | MemoryBank,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    notes: list[str],
) -> int:
    """Puts the MoCo file `r.init` into a new run, and into `notes` what was taken from it. Returns the step to begin
    with: 0, or that of the file's epoch when its training goes on. ValueError when it does not fit, FileNotFoundError.
    """
    file = interchange.read_moco(r.init)
    if isinstance(dictionary, MoCo):
        interchange.continue_from(file, net, dictionary, m=r.moco_momentum)
    else:
        interchange.load_query(net, file)
    taken = ["query encoder" if file.has_head else "backbone (the head begins anew)"]
    if isinstance(dictionary, MoCo):
        taken += ["key encoder"] if file.key_encoder else []
        taken += ["queue"] if file.queue is not None else []
    epoch = 0
    if file.optimizer is not None and r.init_with == "all":
        momentum = interchange.momentum_state(file, net)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": momentum})
        taken, epoch = [*taken, "optimiser"], file.epoch
    step = epoch * loader.steps_per_epoch
    loader.load_state_dict(loader.state_dict() | {"batches": step})
    if isinstance(dictionary, MoCo):
        dictionary.shuffler.count = step * r.accumulate * (1 + r.symmetric)
    notes.append(f"from {r.init}: {', '.join(taken)}; begins at epoch {epoch}")
    return step


def introduce(
    log: Log, r: Recipe, net: Encoder, samples: int, ranks: int, step: int, total: int, per_epoch: int, notes: list[str]
) -> None:
    """Tells the user what is about to run, with the warnings that its settings call for."""
    log.say(
        f"{samples} images, {per_epoch} steps an epoch, steps {step} to {total}; {ranks} ranks x {r.accumulate} x "
        f"{r.images_per_pass(ranks)} images, batch norm over groups of {r.batch_size // r.bn_groups} "
        f"({r.bn_groups} groups)"
    )
    rule = 0.03 * r.batch_size / 256
    log.say(f"lr {r.lr} for a global batch of {r.batch_size}; in proportion to the papers' 0.03 per 256: {rule:.4g}")
    for note in notes:
        log.say(f"note: {note}")
    log.warn(warnings_before(r.mechanism, samples, r.batch_size, r.queue_size, r.lr, r.warmup_epochs))
    if not net.has_batchnorm:
        log.say(f"note: {r.arch} has no batch norm, so there is nothing to shuffle")
    elif not r.shuffle_bn:
        log.say("note: shuffle_bn is off: query and key share batch statistics (the paper's negative control)")
    if step >= total:
        log.say(f"nothing to do: the run is at step {step} of {total}; raise epochs or max_steps to train on")


def what_to_lower(r: Recipe, ranks: int) -> str:
    """Advice for a GPU that is too small, the least harmful first."""
    options = [] if r.precision in ("bf16", "fp16") else ["precision bf16"]
    each, passes = r.images_per_pass(ranks), 2 * r.accumulate * ranks
    fewest = passes if ranks > 1 else 2 * passes  # one group in one process: no shuffling hides the statistics
    smaller = f"accumulate {2 * r.accumulate} ({each // 2} images at a time, not {each}; lr as it is)"
    if r.bn_groups % passes == 0 and r.bn_groups >= fewest:
        options.append(smaller)
    elif r.batch_size % fewest == 0 and r.batch_size // fewest >= 8:
        sizes = f"batch norm over {r.batch_size // fewest} images, not {r.batch_size // r.bn_groups}"
        options.append(f"{smaller} with bn_groups {fewest}: {sizes}")
    options += [
        f"more GPUs than {ranks}",
        f"batch_size {r.batch_size // 2} with lr {r.lr / 2:g}",
        "a smaller image_size",
    ]
    return "Out of memory: try " + ", or ".join(options)
