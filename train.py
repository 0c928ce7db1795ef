"""MoCo pre-training.

    accelerate launch train.py --config recipes/moco_v2_r50.yaml --data shards/photos --out runs/photos

Running the same command again continues the run; SIGTERM, SIGINT and SIGUSR1 save and end it. `--help` lists the
recipe's fields.
"""

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import Tensor, nn

import recipe as recipes
from checkpoint import Writer
from model.mechanisms import EndToEnd, MemoryBank
from model.moco import MoCo, Stats
from recipe import Recipe
from trainer import build, trackers
from trainer.diagnosis import warnings_during
from trainer.joining import (
    CommonError,
    check_ranks_agree,
    control_group,
    exit_with_launcher,
    gather_objects,
    rejoin,
)
from trainer.log import Log
from trainer.metrics import Window, memory_gb, norm
from trainer.profiling import WARM_UP, Profile
from trainer.resume import compare_recipes, load_newest, random_state, set_random_state
from trainer.schedule import key_momentum, learning_rate
from trainer.signals import Stop
from trainer.watching import Watchdog
from transfer import curves
from transfer.monitor import build_monitor


def train(r: Recipe, accelerator: Accelerator, control: Any, watchdog: Watchdog, stop: Stop) -> None:
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out = Path(r.out)
    phase: Callable[[str], None] = watchdog.phase

    # --- data and model: what is wrong with them is found on all ranks, before the first step -------------------------
    problem, facts, notes = "", dict[str, Any](), list[str]()
    try:
        build.check_options(r, ranks, device)
        if rank == 0:
            build.lock_run_folder(out)
        notes += compare_recipes(out, r)
    except (ValueError, OSError) as error:
        problem = str(error)
    own = ("data", "num_threads", "cache_dir")  # what a machine may have of its own
    alike = {name: value for name, value in recipes.to_dict(r).items() if name not in own}
    check_ranks_agree(alike | {"torch": torch.__version__}, problem, control)

    try:
        phase("index")
        sources = build.open_sources_rank0_first(r, rank, control)
        phase("start")
        source = sources[r.data]
        loader = build.open_loader(r, source, rank, ranks, device)
        per_epoch = loader.steps_per_epoch
        planned = r.epochs * per_epoch or r.max_steps  # what the schedules are stretched over
        total = min(planned, r.max_steps or planned)
        net = build.build_net(r, ranks)
        dictionary = build.build_dictionary(r, net, ranks, source.samples, device)
        monitor = build_monitor(r, sources, rank, ranks) if r.knn_every else None
        facts = {"data fingerprint": source.fingerprint, "steps": total}
    except (ValueError, OSError) as error:
        problem = str(error)
    check_ranks_agree(facts, problem, control)

    net.to(device).to(memory_format=torch.channels_last)
    dictionary.to(device).to(memory_format=torch.channels_last)
    if r.compile:
        net.compile()
        if isinstance(dictionary, MoCo):
            dictionary.encoder_k.compile()
    optimizer: Any = torch.optim.SGD(net.parameters(), r.lr, momentum=r.sgd_momentum, weight_decay=r.weight_decay)
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers, which accelerate does not know yet
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        encoder, optimizer = accelerator.prepare(net, optimizer)

    # --- continue where the run folder ends ---------------------------------------------------------------------------
    window, step = Window(device), 0
    state = load_newest(out, control)
    if state is not None:
        step = state["step"]
        net.load_state_dict(state["encoder"])
        dictionary.load_state_dict(state["moco"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"]:  # none when it was another precision
            accelerator.scaler.load_state_dict(state["scaler"])
        try:
            loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise CommonError(str(error)) from None
        window.settled = state["metrics"]["rows"]
        if rank < len(state["rng"]):
            set_random_state(state["rng"][rank], device)
    elif r.init:
        build.begin_from(r.init, net, dictionary)
    del state
    dictionary.check_ranks(net)

    try:
        if r.trackers and not r.profile:
            trackers.start(accelerator, r, step)
    except ValueError as error:
        problem = str(error)
    check_ranks_agree({}, problem, control)
    log = Log(out, step=step, total=total, enabled=rank == 0 and not r.profile)
    profile = None
    if r.profile:
        total = step + WARM_UP + 2 * r.profile
        if rank == 0:
            profile = Profile(out, r.profile, device, loader.timings)
            phase = profile.beside(watchdog.phase)
    elif rank == 0:
        recipes.save(r, out / "recipe.yaml")
        if step < total:
            (out / "finished").unlink(missing_ok=True)
    writer = Writer(out, keep=r.keep_checkpoints, keep_every=r.keep_every * per_epoch)
    build.introduce(log, r, net, source.samples, ranks, step, total, per_epoch, notes)
    if step >= total:
        log.say(f"nothing to do: the run is at step {step} of {total}; raise epochs or max_steps to train on")

    def save() -> float:
        """Collective, as every rank's generators go in. What is not finite is never saved. Returns the seconds it
        took.
        """
        began = time.perf_counter()
        phase("save")
        stop_if_not_finite(window, accelerator, control, writer)
        dictionary.check_ranks(net)
        rng = gather_objects(random_state(device), control)
        if rank == 0:
            state = {
                "step": step,
                "epoch": step / per_epoch,
                "encoder": net.state_dict(),
                "moco": dictionary.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "loader": loader.state_dict(),
                "rng": rng,
                "recipe": recipes.to_dict(r),
                "metrics": {"rows": window.settled},
            }
            writer.submit(state, step)
        window.restart()
        return time.perf_counter() - began

    def evaluate_knn() -> None:
        assert monitor is not None
        phase("knn")
        accuracy = monitor(net, device, accelerator.autocast())
        found = {"step": step, "epoch": step / per_epoch, "knn": accuracy}
        log.write(found)
        trackers.track(accelerator, log, found)
        log.say(f"step {step}  epoch {step / per_epoch:.2f}  kNN {accuracy:.1%}")
        window.restart()

    # --- train --------------------------------------------------------------------------------------------------------
    stop.begin(control)
    knn_steps = r.knn_every * per_epoch
    resumed_at_knn = knn_steps > 0 and step > 0 and step % knn_steps == 0 and not r.profile
    if resumed_at_knn and not gather_objects(log.has("knn", step), control)[0]:
        evaluate_knn()  # a kill in its middle had lost it: the checkpoint comes before it
    saved, save_seconds, skipped = step, 0.0, 0
    while step < total and not stop.asked():
        watchdog.next_step(step)
        is_log_step = ((step + 1) % r.log_every == 0 or step + 1 == total) and not r.profile
        lr = learning_rate(
            step,
            lr=r.lr,
            schedule=r.schedule,
            steps_per_epoch=per_epoch,
            epochs=r.epochs,
            milestones=r.milestones,
            decay=r.decay,
            decay_steps=r.decay_steps,
            warmup_epochs=r.warmup_epochs,
        )
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        m = key_momentum(step, momentum=r.moco_momentum, schedule=r.momentum_schedule, total_steps=planned)

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
                    moco = dictionary
                    phase("shuffle")
                    shuffled = moco.shuffle(key)  # on its way to the other ranks while the queries are encoded
                    phase("query encoder")
                    q = encoder(query)  # [N, dim]
                    phase("key encoder")
                    with accelerator.autocast():
                        keys = moco.encode_keys(shuffled)  # [N, dim], no gradient
                    phase("loss")
                    loss, stats = moco.loss(q, keys)
                else:
                    keys, loss, stats = ablation_forward(dictionary, encoder, query, key, ids, phase)
                phase("backward")
                accelerator.backward(loss / r.accumulate)
            seen.append(keys)
            rows.append(torch.stack([loss.detach(), *stats]))

        phase("optimizer")
        if is_log_step:
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
            gradient_norm = norm([p.grad for p in net.parameters() if p.grad is not None]) / scale
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:  # fp16 overflow: nothing else may move either
            skipped += 1
        else:
            skipped = 0
            if isinstance(dictionary, MoCo):
                phase("momentum")
                moco.momentum_update(net, m)
                phase("queue")
                moco.enqueue(torch.cat(seen))
            elif isinstance(dictionary, MemoryBank):
                phase("bank")
                dictionary.update(torch.cat(seen), torch.cat([ids for _, _, ids in passes]))
            window.add(step, rows, batch.sample_ids)
        step += 1
        log.step()

        phase("log")
        if skipped == 20:
            raise FloatingPointError(f"fp16 overflowed in 20 steps on end, up to {step}: take bf16 or a lower lr")
        if is_log_step:
            stop_if_not_finite(window, accelerator, control, writer)
            metrics = {"step": step, "epoch": step / per_epoch, "lr": lr} | window.means(r.batch_size, r.temperature)
            if "images_per_second" in metrics:
                metrics["seconds_left"] = (total - step) * r.batch_size / metrics["images_per_second"]
            metrics["gradient_norm"] = gradient_norm.item()
            metrics["parameter_norm"] = norm(list(net.parameters())).item()
            metrics["memory_gb"] = memory_gb(device)
            if isinstance(dictionary, MoCo):
                metrics |= {"queue_filled": dictionary.queue_filled.item(), "queue_age": dictionary.queue_age().item()}
            if len(source.names) > 1:
                metrics |= {f"samples_{name}": count for name, count in loader.source_counts().items()}
            if save_seconds:
                metrics |= {"save_seconds": save_seconds, "write_seconds": writer.seconds}
                save_seconds = 0.0
            log.write(metrics)
            trackers.track(accelerator, log, metrics)
            stages = loader.timings()
            slowest = loader.bottleneck(stages)
            log.warn(warnings_during(metrics, r.queue_size, r.batch_size, window.usual_wait(), slowest, stages))

        knn_due = knn_steps > 0 and step % knn_steps == 0
        keep_for_good = r.keep_every > 0 and step % (r.keep_every * per_epoch) == 0
        if (step % r.save_every == 0 or step == total or keep_for_good or knn_due) and not r.profile:
            save_seconds, saved = save(), step
            if knn_due:
                evaluate_knn()

    if profile is not None and step == total:
        print(profile.table(r.batch_size))
    elif saved < step and not r.profile:
        save()
    phase("save")
    writer.join()
    log.close()
    loader.close()
    if rank == 0 and (out / "metrics.jsonl").is_file():
        try:
            log.say(f"curves: {curves.draw(out)}")
        except Exception as error:  # a full disk, nothing to draw yet: no reason for a run to fail at its end
            log.say(f"no curves: {error}")
    gather_objects(None, control)  # nobody leaves before rank 0's disk is done: who is gone counts as lost
    if writer.problem:
        raise OSError(f"the last steps are not saved ({writer.problem}); the same command repeats them")
    if rank == 0 and step >= total and not r.profile:
        (out / "finished").write_text(f"{step}\n")  # for job scripts: stopped is not finished, and both end with 0
    if step < total:
        who = stop.name or "another rank was told to stop"
        done = (
            f"saved at step {step} of {total}; the same command continues from there" if step else "nothing trained yet"
        )
        log.say(f"{who}: {done}")


def passes_of(
    query: Tensor, key: Tensor, ids: Tensor, accumulate: int, symmetric: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, sample ids) of each forward pass of one optimiser step; symmetric: once more with the roles
    swapped.
    """
    passes = list(zip(query.chunk(accumulate), key.chunk(accumulate), ids.chunk(accumulate)))
    return passes + [(b, a, i) for a, b, i in passes] if symmetric else passes


def ablation_forward(
    dictionary: EndToEnd | MemoryBank, encoder: nn.Module, query: Tensor, key: Tensor, ids: Tensor, phase: Any
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


def stop_if_not_finite(window: Window, accelerator: Accelerator, control: Any, writer: Writer) -> None:
    """Reads the losses since the last look, on all ranks. FloatingPointError with what is needed to find the cause."""
    bad = window.settle(accelerator.gather)
    if bad is None:
        return
    step, rank, loss = bad
    ids = gather_objects(window.sample_ids(step), control)[rank]
    writer.join()
    good = gather_objects(str(writer.last_good or "none"), control)[0]  # rank 0 writes
    shown = ", ".join(map(str, ids[:32])) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
    raise FloatingPointError(
        f"the loss is {loss} at step {step} on rank {rank} (sample ids {shown}); last good checkpoint: {good}. "
        "Usual remedies: bf16 or fp32 instead of fp16, a look at these samples, a new run with a lower lr or a warm-up"
    )


def main(arguments: list[str] | None = None) -> None:
    """Ends the process with 2 when the user has to change something, with 1 when the run failed."""
    r = recipes.parse(arguments)
    stop = Stop()
    exit_with_launcher()
    torch.set_float32_matmul_precision("high" if r.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = r.precision != "fp32"
    rejoin()
    try:
        trackers.check(r.trackers)
        build.check_launcher()
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
    except ValueError as error:  # a tracker or a way to train that is not there
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a machine have the same packages
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rank = accelerator.process_index
    watchdog = Watchdog(rank, accelerator.num_processes, r.hang_seconds)
    if r.hang_seconds:
        watchdog.start()
    code, said = 1, ""
    try:
        train(r, accelerator, control_group(), watchdog, stop)
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
    if code == 0:
        trackers.finish(accelerator)
        return
    if said:
        where = f"rank {rank}, step {watchdog.step}, {watchdog.name_of_phase}: " if code == 1 else ""
        print(f"error: {where}{said}", file=sys.stderr, flush=True)
        watchdog.tell(said)
    sys.exit(code)


if __name__ == "__main__":
    main()
