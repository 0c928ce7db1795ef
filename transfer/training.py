"""The common ground of all trainings in this room: where one runs, how it goes on after a kill, its loop, its end.

1. `session` joins the ranks, holds the folder (local, or mirrored at a URL), and has watchdog and signals.
2. `continue_from` hands every rank the newest checkpoint, if it is of the same experiment.
3. `train` is the loop of whatever changes the whole network: log, checkpoints, evaluation, curves, as train.py has
   them. The linear protocol, whose state is that of whole epochs, has a loop of its own.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from pipeline import files
from trainer import resume
from trainer.build import DTYPES, lock_run_folder
from trainer.diagnosis import stop_if_not_finite
from trainer.joining import Ranks, all_ranks_agree, control_group, exit_with_launcher, gather_objects, joined
from trainer.log import Log
from trainer.metrics import Window, memory_gb, norm_of_gradients
from trainer.mirror import Mirror, local_folder
from trainer.signals import Stop
from trainer.watching import Watchdog
from transfer import curves
from transfer.load import ALONE

Precision = Literal["fp32", "bf16", "fp16"]
HANG_SECONDS = 600.0
MOST_SKIPPED = 20  # steps on end that fp16 may overflow in


@dataclass(frozen=True)
class Session:
    """Where a training runs. As it stands: alone, without signals and watchdog, as a test or a script has it."""

    folder: Path  # on this machine
    ranks: Ranks = ALONE
    control: dist.ProcessGroup | None = None  # for messages between hosts that must not touch the GPU
    upload: Callable[[], None] | None = None  # copies the folder to its URL
    stop: Stop | None = None
    watchdog: Watchdog | None = None

    def phase(self, name: str) -> None:
        if self.watchdog is not None:
            self.watchdog.phase(name)

    def next_step(self, step: int) -> None:
        if self.watchdog is not None:
            self.watchdog.next_step(step)

    def begin(self) -> None:
        """From here on there is something to save, so that a second signal no longer ends the process at once."""
        if isinstance(self.stop, Stop):
            self.stop.begin(self.control)

    def asked_to_stop(self) -> bool:
        """Call once a step, on all ranks."""
        return self.stop is not None and self.stop.asked()


@contextmanager
def session(out: str, *, hang_seconds: float = HANG_SECONDS) -> Iterator[Session]:
    """The whole of a command's work runs inside: reading, training, and what is written to `out`, a folder or URL.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are for `train` from here on: the first ends it saved, or the command at its
    first step; a second one before that ends it at once. A rank that dies or hangs is named, and all end;
    hang_seconds 0: no watchdog.
    Raises ValueError for a folder that another training is in, or that holds files of something else.
    """
    stop = Stop()
    exit_with_launcher()
    with joined() as ranks:
        control = control_group()
        watchdog = Watchdog(ranks.rank, ranks.world_size, hang_seconds)
        watchdog.phase("index")  # no limit, until the first step: a large source may have to be looked through
        if hang_seconds:
            watchdog.start()
        try:
            with mirrored(out, ranks.rank) as (folder, upload):
                with all_ranks_agree(control):
                    if ranks.rank == 0 and not files.is_remote(out):
                        lock_run_folder(folder)
                sends = upload if files.is_remote(out) and ranks.rank == 0 else None
                yield Session(folder, ranks, control, sends, stop, watchdog)
        except Exception as error:
            lost = "" if isinstance(error, ValueError) else watchdog.lost()
            watchdog.tell(str(error).split("\n")[0])
            if lost:
                raise OSError(lost) from error
            raise
        finally:
            watchdog.stop()


def folder_of(args: Namespace, name: str, holds: str = "metrics and checkpoint") -> str:
    """`--out`; when left out the folder `name` in that of the run, of its own for `--untrained`. holds: what a training
    leaves there. ValueError where there is none."""
    if args.out is not None:
        return str(args.out)
    if not (files.is_remote(args.run) or Path(args.run).is_dir()):
        raise ValueError(f"{args.run} is no run folder: say with --out where {holds} go")
    return files.join(args.run, f"{name}_untrained" if args.untrained else name)


@contextmanager
def mirrored(out: str, rank: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The local folder of `out`, and a function that uploads what is new in it when `out` is a URL; rank 0 alone does.

    A failing upload is a warning until the last one, at the end: OSError. Errors at the start as `Mirror.begin`.
    """
    folder = local_folder(out)
    if rank or not files.is_remote(out):
        yield folder, lambda: None
        return
    lock_run_folder(folder)
    mirror = Mirror(out, folder)

    def upload() -> None:
        try:
            mirror.push(keep=1)
        except OSError as error:
            print(f"warning: this is saved in {folder} alone ({error})", file=sys.stderr, flush=True)

    try:
        mirror.begin()
        yield folder, upload
        mirror.push(keep=1)
    finally:
        mirror.close()


def shared(read: Callable[[], Any], ranks: Ranks) -> Any:
    """The content that rank 0 reads, on all ranks: not every machine has to see the folder."""
    box = [read() if ranks.rank == 0 else None]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are read back from a checkpoint: with lists for tuples, and without jsonargparse's number types,
    which would make it unreadable."""
    return dict(json.loads(json.dumps(settings)))


def continue_from(
    out: Path, settings: dict[str, Any], ranks: Ranks, what: str, *, unsaid: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The newest checkpoint's state, None in a new folder; all ranks call it. what: "linear classifier" and the like.

    Its "settings" have to be these (`plain`), so put in whatever makes it another experiment: hashes of encoder and
    data, the protocol's name and numbers. unsaid: values that checkpoints of older versions do not say.
    Raises ValueError for another experiment, for files of something else, and for damaged checkpoints.
    """
    state: dict[str, Any] | None = shared(lambda: checkpoint.load_newest(out), ranks)
    metrics = out / "metrics.jsonl"
    if state is None:
        if shared(metrics.exists, ranks):
            raise ValueError(f"{metrics} is of no {what} that this program began: take another --out, or move it away")
        return None
    if not isinstance(state.get("settings"), dict):
        raise ValueError(f"{checkpoint.directory(out)} holds no checkpoints of a {what}: take another --out")
    before = (unsaid or {}) | state["settings"]
    if changed := [name for name, value in settings.items() if before.get(name) != value]:
        was = ", ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in changed)
        raise ValueError(f"{out} holds another experiment: {was}; take another --out, or delete it")
    return state


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    files.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def check_precision(precision: Precision, device: torch.device) -> None:
    """ValueError for one that this device does not have."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU take bf16 or fp32")


def train(
    at: Session,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    forward: Callable[[nn.Module, Any], Tensor],
    rates: Callable[[int], list[float]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    *,
    state: dict[str, Any] | None,
    settings: dict[str, Any],
    total: int,
    steps_per_epoch: int,
    batch_size: int,
    fields: tuple[str, ...] = ("loss",),
    judged_by: str,
    precision: Precision = "fp32",
    log_every: int = 20,
    save_every: int = 1000,
    evaluate_every: int = 0,
) -> int:
    """Trains `net`, which stands on the ranks' device in train mode, from step 0 or that of `state` (of
    `continue_from`) to `total`; `batches` begin there. Returns the step it came to: less than `total` when told to
    stop. All that is done is saved then, in the folder: checkpoint, metrics.jsonl, curves.png, and `finished` at the
    end.

    forward: (net as DDP wraps it, batch) -> figures fp32 [F], named by `fields`; the first is the loss that is
    minimised, a mean over this rank's part. rates: step -> the learning rate of each parameter group.
    evaluate: net, in eval mode and without gradients -> figures for metrics.jsonl, the same on all ranks, `judged_by`
    among them; after every `evaluate_every` steps (0: none) and at the end. batch_size: images a step over all ranks,
    for the speed alone.
    Raises FloatingPointError when a loss is not finite, OSError when the last steps could not be saved.
    """
    rank, world_size, device = at.ranks
    check_precision(precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    window, step = Window(device, fields), 0
    if state is not None:
        step = state["step"]
        with resume.loading(checkpoint.path_of(at.folder, step)):
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"]) if scaler.is_enabled() else None
            window.settled = state["rows"]
            if rank < len(state["rng"]):
                resume.set_random_state(state["rng"][rank], device)
    model = DistributedDataParallel(net) if world_size > 1 else net
    log = Log(at.folder, step=step, total=total, enabled=rank == 0)
    writer = checkpoint.Writer(at.folder, keep=1, upload=at.upload)
    if rank == 0 and step < total:
        (at.folder / "finished").unlink(missing_ok=True)

    def gather(x: Tensor) -> Tensor:
        if world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def save() -> None:
        at.phase("save")
        stop_if_not_finite(window, gather, at.control, writer)
        rng = gather_objects(resume.random_state(device), at.control)
        if rank == 0:
            parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            about = {"step": step, "settings": settings, "rng": rng, "rows": window.settled}
            writer.submit(about | parts, step)
        window.restart()

    def judge() -> None:
        at.phase("evaluate")
        if world_size > 1:  # each rank has batch-norm statistics of its own; rank 0's are saved
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)
        with resume.undisturbed(net), torch.no_grad():
            found = evaluate(net)
        log.write({"step": step, "epoch": step / steps_per_epoch} | found)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        log.say(f"step {step}  epoch {step / steps_per_epoch:.2f}  {shown}")
        window.restart()

    def evaluation_is_due() -> bool:
        return step == total or (step > 0 and evaluate_every > 0 and step % evaluate_every == 0)

    at.begin()
    log.begin()
    if evaluation_is_due() and not gather_objects(log.has(judged_by, step), at.control)[0]:
        judge()  # a kill in its middle had lost it: the checkpoint comes before it
    saved, skipped = step, 0
    while step < total and not at.asked_to_stop():
        at.next_step(step)
        for group, rate in zip(optimizer.param_groups, rates(step)):
            group["lr"] = rate
        at.phase("data")
        with window.waiting():
            batch = next(batches)
        at.phase("forward")
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            figures = forward(model, batch)  # [F]
        at.phase("backward")
        scaler.scale(figures[0]).backward()
        at.phase("optimizer")
        is_log_step = (step + 1) % log_every == 0 or step + 1 == total
        gradient_norm = norm_of_gradients(net, scaler if scaler.is_enabled() else None) if is_log_step else None
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        net.zero_grad()  # all of it: what no group holds would add up in the gradient norm
        if scaler.get_scale() < scale:  # fp16 overflowed, and the step was left out
            skipped += 1
        else:
            skipped = 0
            window.add(step, [figures.detach()], getattr(batch, "sample_ids", torch.empty(0)))
        step += 1
        log.step()

        at.phase("log")
        if skipped == MOST_SKIPPED:
            raise FloatingPointError(
                f"fp16 overflowed in {skipped} steps on end, up to {step}: take bf16 or a lower lr"
            )
        if gradient_norm is not None:
            stop_if_not_finite(window, gather, at.control, writer)
            metrics: dict[str, float] = {"step": step, "epoch": step / steps_per_epoch, "lr": rates(step - 1)[0]}
            metrics |= window.means(batch_size)
            if "images_per_second" in metrics:
                metrics["seconds_left"] = (total - step) * batch_size / metrics["images_per_second"]
            log.write(metrics | {"gradient_norm": gradient_norm.item(), "memory_gb": memory_gb(device)})
        if step % save_every == 0 or evaluation_is_due():
            save()
            saved = step
        if evaluation_is_due():
            judge()
    if saved < step:  # told to stop
        save()

    at.phase("save")
    writer.join()
    log.close()
    if rank == 0:
        with contextlib.suppress(ValueError, OSError):  # nothing to draw yet, a full disk
            curves.draw(at.folder)
    if writer.problem:
        raise OSError(f"the last steps are not saved: {writer.problem}")
    if rank == 0 and step >= total:
        (at.folder / "finished").write_text(f"{step}\n")  # for job scripts: a stopped run ends with 0 too
    gather_objects(None, at.control)  # the watchdog takes a rank that has exited for a dead one
    if step < total:
        name = at.stop.name if at.stop is not None else ""
        log.say(f"{name or 'told to stop'}: saved at step {step} of {total}; the same command continues from there")
    return step


def evaluations(folder: Path, judged_by: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that `train` wrote after an evaluation, by step."""
    path = folder / "metrics.jsonl"
    rows = curves.read_objects(path, field="step") if path.is_file() else []
    return [row for row in rows if judged_by in row]
