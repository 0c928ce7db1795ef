"""MoCo pre-training.

    accelerate launch train.py --config recipes/moco_v2_r50.yaml --data shards/photos --out runs/photos

Running the same command again continues the run; SIGTERM, SIGINT and SIGUSR1 save and end it. `--help` lists the
recipe's fields.

`main` joins the ranks, `set_up` builds what the loop needs, `train` is the loop (the paper's Algorithm 1), `finish` the
ending.
"""

import os

import recipe as recipes
from pipeline.progress import say_if_slow, saying

if __name__ == "__main__":
    # Before torch, DALI and accelerate, whose import takes seconds: --help and a mistyped flag answer at once.
    RECIPE = recipes.parse()
    IMPORTING = say_if_slow("importing torch, DALI and accelerate" if os.environ.get("RANK", "0") == "0" else "")

import contextlib
import functools
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import Tensor, nn

import checkpoint
from model.encoders import Encoder
from model.mechanisms import EndToEnd, MemoryBank
from model.moco import MoCo, Stats
from pipeline.files import is_remote
from pipeline.loader import Loader
from recipe import Recipe
from trainer import build, resume, trackers
from trainer.diagnosis import stop_if_not_finite, warnings_during
from trainer.joining import (
    CommonError,
    all_ranks_agree,
    check_all_came,
    check_driver,
    control_group,
    exit_with_launcher,
    gather_objects,
    rejoin,
)
from trainer.log import Log
from trainer.metrics import Window, memory_gb, norm, norm_of_gradients
from trainer.mirror import Mirror, local_folder, pull
from trainer.profiling import WARM_UP, Profile
from trainer.run_views import resolved
from trainer.schedule import key_momentum, learning_rate
from trainer.signals import Stop
from trainer.watching import Watchdog
from transfer import curves
from transfer.monitor import build_monitor


@dataclass(frozen=True)
class Training:
    """Everything that set-up hands on to the loop and to the ending."""

    r: Recipe
    accelerator: Accelerator
    control: dist.ProcessGroup | None  # for messages between hosts that must not touch the GPU
    phase: Callable[[str], None]  # tells the watchdog, and the profile, what the loop goes on to
    loader: Loader
    net: Encoder  # the query encoder
    encoder: nn.Module  # the same as DDP wraps it
    dictionary: MoCo | EndToEnd | MemoryBank
    optimizer: AcceleratedOptimizer
    window: Window
    log: Log
    writer: checkpoint.Writer
    mirror: Mirror | None  # of a run whose --out is a URL
    monitor: Callable[[nn.Module, torch.device, AbstractContextManager[object]], dict[str, float]] | None
    profile: Profile | None
    first: int  # the step to begin with: optimiser steps done
    total: int  # the step to end at
    planned: int  # steps that the schedules are stretched over

    @property
    def out(self) -> Path:
        return Path(self.r.out)

    @property
    def per_epoch(self) -> int:
        return self.loader.steps_per_epoch


def set_up(
    r: Recipe, mirror: Mirror | None, accelerator: Accelerator, control: dist.ProcessGroup | None, watchdog: Watchdog
) -> Training:
    """Everything that can be wrong is found here, on all ranks, before the first step."""
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out = Path(r.out)
    phase: Callable[[str], None] = watchdog.phase
    with all_ranks_agree(control):
        build.check_options(r, ranks, device)
        r = resolved(r)
        if rank == 0:
            build.lock_run_folder(out)
            if mirror is not None:
                mirror.begin()

    with all_ranks_agree(control) as facts:
        if mirror is not None:
            resume.refuse_foreign_folder(out)
            pull(mirror.url, out)  # on machines other than rank 0's
        notes = resume.compare_recipes(out, r)
        own = ("data", "num_threads", "cache_dir")  # what a machine may have of its own
        facts |= {name: value for name, value in recipes.to_dict(r).items() if name not in own}
        if mirror is not None:
            facts["out"] = mirror.url  # each machine has a folder of its own
        facts["torch"] = torch.__version__

    with all_ranks_agree(control) as facts:
        phase("index")
        sources = build.open_sources_rank0_first(r, rank, control)
        phase("start")
        source = sources[r.data]
        loader = build.open_loader(r, source, rank, ranks, device)
        per_epoch = loader.steps_per_epoch
        planned = r.epochs * per_epoch or r.max_steps
        total = min(planned, r.max_steps or planned)
        net = build.build_net(r, ranks)
        dictionary = build.build_dictionary(r, net, ranks, source.samples, device)
        monitor = build_monitor(r, sources, rank, ranks) if r.knn_every else None
        facts |= {"data fingerprint": source.fingerprint, "steps": total}

    net.to(device).to(memory_format=torch.channels_last)
    dictionary.to(device).to(memory_format=torch.channels_last)
    if r.compile:
        net.compile()
        if isinstance(dictionary, MoCo):
            dictionary.encoder_k.compile()
    sgd = torch.optim.SGD(net.parameters(), r.lr, momentum=r.sgd_momentum, weight_decay=r.weight_decay)
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers, which accelerate does not know yet
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        encoder, optimizer = accelerator.prepare(net, sgd)
    window, step = Window(device), 0

    with all_ranks_agree(control) as facts:
        state = resume.load_newest(out, control)
        if state is not None:
            step = state["step"]
            with resume.loading(checkpoint.path_of(out, step)):
                net.load_state_dict(state["encoder"])
                dictionary.load_state_dict(state["moco"])
                optimizer.load_state_dict(state["optimizer"])
                if accelerator.scaler is not None and state["scaler"]:  # none when it was another precision
                    accelerator.scaler.load_state_dict(state["scaler"])
                loader.load_state_dict(state["loader"])
                window.settled = state["metrics"]["rows"]
                if rank < len(state["rng"]):
                    resume.set_random_state(state["rng"][rank], device)
            del state
        elif r.init:
            step = build.begin_from(r, net, dictionary, optimizer, loader, notes)
        if r.trackers and not r.profile:
            trackers.start(accelerator.init_trackers, r, step, is_main=accelerator.is_main_process)
        facts["step"] = step
    dictionary.check_ranks(net)

    log = Log(out, step=step, total=total, enabled=rank == 0 and not r.profile)
    profile = None
    if r.profile:
        total = step + WARM_UP + 2 * r.profile
        if rank == 0:
            profile = Profile(out, r.profile, device, loader.timings)
            phase = profile.beside(watchdog.phase)
    elif rank == 0:
        recipes.save(replace(r, out=mirror.url) if mirror else r, out / "recipe.yaml")
        if step < total:
            (out / "finished").unlink(missing_ok=True)
    keep = {"keep": r.keep_checkpoints, "keep_every": r.keep_every * per_epoch}
    writer = checkpoint.Writer(out, **keep, upload=functools.partial(mirror.push, **keep) if mirror else None)
    build.introduce(log, r, net, source.samples, ranks, step, total, per_epoch, notes)
    return Training(
        r, accelerator, control, phase, loader, net, encoder, dictionary, optimizer, window, log, writer, mirror,
        monitor, profile, first=step, total=total, planned=planned,
    )  # fmt: skip


def train(t: Training, watchdog: Watchdog, stop: Stop) -> int:
    """The loop. Returns the steps that are done; all of them are saved, or being saved."""
    r, accelerator, loader, window, phase = t.r, t.accelerator, t.loader, t.window, t.phase
    net, encoder, dictionary, optimizer = t.net, t.encoder, t.dictionary, t.optimizer
    step, saved, save_seconds, skipped = t.first, t.first, 0.0, 0
    stop.begin(t.control)
    t.log.begin()
    if knn_is_due(t, step) and not gather_objects(t.log.has("knn" if t.r.knn_data else "rankme", step), t.control)[0]:
        evaluate_knn(t, step)  # a kill in its middle had lost it: the checkpoint comes before it

    while step < t.total and not stop.asked():
        watchdog.next_step(step)
        lr = learning_rate(
            step,
            lr=r.lr,
            schedule=r.schedule,
            steps_per_epoch=t.per_epoch,
            epochs=r.epochs,
            milestones=r.milestones,
            decay=r.decay,
            decay_steps=r.decay_steps,
            warmup_epochs=r.warmup_epochs,
        )
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        m = key_momentum(step, momentum=r.moco_momentum, schedule=r.momentum_schedule, total_steps=t.planned)

        phase("data")
        with window.waiting():
            batch = next(loader)

        # Algorithm 1 of the paper. The reference code puts the momentum update at the start of the next forward pass
        # instead of the end of this step, which is the same. Queue and key encoder stand still over the passes of a
        # step.
        seen, rows = list[Tensor](), list[Tensor]()
        passes = passes_of(batch.query, batch.key, batch.sample_ids, r.accumulate, r.symmetric)
        for i, (query, key, ids) in enumerate(passes):
            with accelerator.no_sync(encoder) if i + 1 < len(passes) else contextlib.nullcontext():
                if isinstance(dictionary, MoCo):
                    phase("shuffle")
                    shuffled = dictionary.shuffle(key)  # on its way to the other ranks while the queries are encoded
                    phase("query encoder")
                    q = encoder(query)  # [N, dim]
                    phase("key encoder")
                    with accelerator.autocast():
                        keys = dictionary.encode_keys(shuffled)  # [N, dim], no gradient
                    phase("loss")
                    loss, stats = dictionary.loss(q, keys)
                else:
                    keys, loss, stats = ablation_forward(dictionary, encoder, query, key, ids, phase)
                phase("backward")
                accelerator.backward(loss / r.accumulate)
            seen.append(keys)
            rows.append(torch.stack([loss.detach(), *stats]))

        phase("optimizer")
        is_log_step = ((step + 1) % r.log_every == 0 or step + 1 == t.total) and not r.profile
        gradient_norm = norm_of_gradients(net, accelerator.scaler) if is_log_step else None  # before they are zeroed
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:  # fp16 overflow: nothing else may move either
            skipped += 1
        else:
            skipped = 0
            if isinstance(dictionary, MoCo):
                phase("momentum")
                dictionary.momentum_update(net, m)
                phase("queue")
                dictionary.enqueue(torch.cat(seen))
            elif isinstance(dictionary, MemoryBank):
                phase("bank")
                dictionary.update(torch.cat(seen), batch.sample_ids)
            window.add(step, rows, batch.sample_ids)
        step += 1
        t.log.step()

        # --- every so often -------------------------------------------------------------------------------------------
        phase("log")
        if skipped == 20:
            raise FloatingPointError(f"fp16 overflowed in 20 steps on end, up to {step}: take bf16 or a lower lr")
        if gradient_norm is not None:
            write_metrics(t, step, lr, gradient_norm, save_seconds)
            save_seconds = 0.0
        if save_is_due(t, step):
            save_seconds, saved = save(t, step), step
        if knn_is_due(t, step):
            evaluate_knn(t, step)
        if t.mirror is not None and t.mirror.lost:
            stop.name = "another machine goes on with this run"

    if saved < step and not r.profile:  # told to stop
        save(t, step)
    return step


def finish(t: Training, step: int, stop: Stop) -> None:
    """Waits for the last checkpoint, draws the curves, and says where the run stands. OSError when the last steps could
    not be saved.
    """
    rank = t.accelerator.process_index
    if t.profile is not None and step == t.total:
        print(t.profile.table(t.r.batch_size))
    t.phase("save")
    t.writer.join()
    t.log.close()
    t.loader.close()
    if rank == 0 and (t.out / "metrics.jsonl").is_file():
        try:
            t.log.say(f"curves: {curves.draw(t.out)}")
        except Exception as error:  # a full disk, nothing to draw yet: no reason for a run to fail at its end
            t.log.say(f"no curves: {error}")
    # The watchdog takes a rank that has exited for a dead one, so all wait here for rank 0's disk.
    gather_objects(None, t.control)
    if t.writer.problem:
        raise OSError(f"the last steps are not saved: {t.writer.problem}")
    if rank == 0 and step >= t.total and not t.r.profile:
        # For job scripts: a stopped run is not finished, and ends with 0 too.
        (t.out / "finished").write_text(f"{step}\n")
    if rank == 0 and t.writer.upload is not None and not t.r.profile:
        t.writer.upload()
    if step < t.total:
        who = stop.name or "another rank was told to stop"
        where = f"saved at step {step} of {t.total}; the same command continues from there"
        t.log.say(f"{who}: {where if step else 'nothing trained yet'}")


def passes_of(
    query: Tensor, key: Tensor, ids: Tensor, accumulate: int, symmetric: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, sample ids) of each forward pass of one optimiser step; symmetric: once more with the roles
    swapped.
    """
    passes = list(zip(query.chunk(accumulate), key.chunk(accumulate), ids.chunk(accumulate)))
    return passes + [(b, a, i) for a, b, i in passes] if symmetric else passes


def ablation_forward(
    dictionary: EndToEnd | MemoryBank,
    encoder: nn.Module,
    query: Tensor,
    key: Tensor,
    ids: Tensor,
    phase: Callable[[str], None],
) -> tuple[Tensor, Tensor, Stats]:
    """The forward pass of the paper's two other mechanisms (figure 2): what goes into it, loss, stats."""
    phase("query encoder")
    q = encoder(query)
    if isinstance(dictionary, MemoryBank):
        phase("loss")
        return q.detach(), *dictionary.loss(q, ids)
    phase("key encoder")
    keys = dictionary.encode_keys(key, encoder)
    phase("loss")
    return keys.detach(), *dictionary.loss(q, keys)


def save_is_due(t: Training, step: int) -> bool:
    for_good = t.r.keep_every > 0 and step % (t.r.keep_every * t.per_epoch) == 0
    due = step % t.r.save_every == 0 or step == t.total or for_good or knn_is_due(t, step)
    return due and not t.r.profile


def knn_is_due(t: Training, step: int) -> bool:
    return t.monitor is not None and not t.r.profile and step > 0 and step % (t.r.knn_every * t.per_epoch) == 0


def write_metrics(t: Training, step: int, lr: float, gradient_norm: Tensor, save_seconds: float) -> None:
    """The means since the last log step into metrics.jsonl and the trackers, with warnings that they call for. It
    waits for the device. save_seconds: that training stood still for a checkpoint since then.
    """
    r, dictionary, loader = t.r, t.dictionary, t.loader
    stop_if_not_finite(t.window, t.accelerator.gather, t.control, t.writer)
    metrics: dict[str, float] = {"step": step, "epoch": step / t.per_epoch, "lr": lr}
    metrics |= t.window.means(r.batch_size, r.temperature)
    if "images_per_second" in metrics:
        metrics["seconds_left"] = (t.total - step) * r.batch_size / metrics["images_per_second"]
    metrics["gradient_norm"] = gradient_norm.item()
    metrics["parameter_norm"] = norm(list(t.net.parameters())).item()
    metrics["memory_gb"] = memory_gb(t.accelerator.device)
    if isinstance(dictionary, MoCo):
        metrics |= {"queue_filled": dictionary.queue_filled.item(), "queue_age": dictionary.queue_age().item()}
    if len(loader.source.names) > 1:
        metrics |= {f"samples_{name}": count for name, count in loader.source_counts().items()}
    if save_seconds:
        metrics |= {"save_seconds": save_seconds, "write_seconds": t.writer.seconds}
    t.log.write(metrics)
    trackers.track(t.accelerator.log, t.log, metrics)
    stages = loader.timings()
    slowest = loader.bottleneck(stages)
    t.log.warn(warnings_during(metrics, r.queue_size, r.batch_size, t.window.usual_wait(), slowest, stages))


def save(t: Training, step: int) -> float:
    """Hands a checkpoint to the writer. All ranks call it, as the random generators of each go in. Refuses to save a
    state that holds NaN or inf. Returns the seconds that training stood still.
    """
    began = time.perf_counter()
    t.phase("save")
    stop_if_not_finite(t.window, t.accelerator.gather, t.control, t.writer)
    t.dictionary.check_ranks(t.net)
    rng = gather_objects(resume.random_state(t.accelerator.device), t.control)
    if t.accelerator.process_index == 0:
        scaler = t.accelerator.scaler
        state = {
            "step": step,
            "epoch": step / t.per_epoch,
            "encoder": t.net.state_dict(),
            "moco": t.dictionary.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "loader": t.loader.state_dict(),
            "rng": rng,
            "recipe": recipes.to_dict(t.r),
            "metrics": {"rows": t.window.settled},
        }
        t.writer.submit(state, step)
    t.window.restart()
    return time.perf_counter() - began


def evaluate_knn(t: Training, step: int) -> None:
    """Writes kNN accuracy and RankMe of the query encoder as it is; all ranks call it."""
    assert t.monitor is not None
    t.phase("knn")
    with saying(f"step {step}: features of {t.r.knn_data or t.r.data}" if t.accelerator.is_main_process else ""):
        measured = t.monitor(t.net, t.accelerator.device, t.accelerator.autocast())
    found = {"step": step, "epoch": step / t.per_epoch} | measured
    t.log.write(found)
    trackers.track(t.accelerator.log, t.log, found)
    accuracy = f"kNN {measured['knn']:.1%}  " if "knn" in measured else ""
    t.log.say(f"step {step}  epoch {step / t.per_epoch:.2f}  {accuracy}RankMe {measured['rankme']:.1f}")
    t.window.restart()


def join(r: Recipe) -> Accelerator:
    """Finds the other ranks. ValueError when they do not come; for a tracker, launcher or driver that will not do."""
    trackers.check(r.trackers)
    build.check_launcher()
    check_driver()
    ranks = os.environ.get("WORLD_SIZE", "1")
    with saying(f"waiting for all {ranks} ranks" if os.environ.get("RANK", "0") == "0" else ""):
        accelerator = Accelerator(
            mixed_precision=r.precision if r.precision in ("bf16", "fp16") else "no",
            log_with=list(r.trackers) or None,
            project_dir=r.out,
            # The recipe alone decides, whatever `accelerate config` was told: its accumulation would divide the loss.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            # Each rank keeps its own batch-norm statistics; DDP would send rank 0's to all at every forward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    check_all_came(accelerator.num_processes)
    return accelerator


def main(r: Recipe) -> None:
    """Ends the process with 2 when the user has to change something, with 1 when the run failed."""
    stop = Stop()
    exit_with_launcher()
    torch.set_float32_matmul_precision("high" if r.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = r.precision != "fp32"
    rejoin()
    url = r.out if is_remote(r.out) else ""
    r = replace(r, out=str(local_folder(r.out, r.work_dir)), work_dir="") if url else r
    try:
        accelerator = join(r)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine have the same packages
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rank = accelerator.process_index
    mirror = Mirror(url, Path(r.out)) if url else None
    watchdog = Watchdog(rank, accelerator.num_processes, r.hang_seconds)
    if r.hang_seconds:
        watchdog.start()
    code, said = 1, ""
    try:
        with saying("setting up data, encoders and dictionary" if rank == 0 else ""):
            training = set_up(r, mirror, accelerator, control_group(), watchdog)
        step = train(training, watchdog, stop)
        finish(training, step, stop)
        code = 0
    except CommonError as error:
        code, said = 2, str(error) if rank == 0 else ""
    except FloatingPointError as error:
        said = str(error) if rank == 0 else ""
    except (ValueError, FileNotFoundError) as error:
        code, said = 2, str(error)
    except torch.OutOfMemoryError as error:
        said = f"{str(error).splitlines()[0]} {build.what_to_lower(r, accelerator.num_processes)}"
    except OSError as error:  # the disk of the run folder
        said = str(error)
    except Exception as error:
        # When a rank is gone the others' collectives fail: say which one, not that a socket was closed.
        said = watchdog.lost()
        if not said:
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
    watchdog.stop()
    if mirror is not None:
        mirror.close()
    if code == 0:
        trackers.finish(accelerator.end_training)
        return
    if said:
        where = f"rank {rank}, step {watchdog.step}, {watchdog.name_of_phase}: " if code == 1 else ""
        print(f"error: {where}{said}", file=sys.stderr, flush=True)
        watchdog.tell(said)
    sys.exit(code)


if __name__ == "__main__":
    IMPORTING.cancel()
    main(RECIPE)
