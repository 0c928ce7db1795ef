"""MoCo pre-training: `accelerate launch train.py --config recipes/moco_v2_r50.yaml --data shards/photos --out runs/photos`.

Running the same command again continues the run; SIGTERM, SIGINT and SIGUSR1 save and end it. `--help` lists the recipe's fields."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

import recipe as recipes
from checkpoint import Writer
from model.batchnorm import batchnorm_shortcut, split_batchnorm
from model.encoders import build_encoder
from model.moco import MoCo
from pipeline import views
from pipeline.loader import Loader
from pipeline.manifest import Source, open_source
from recipe import Recipe
from resume import compare_recipes, gather_objects, load_newest, random_state, set_random_state
from schedule import learning_rate
from transfer import curves, knn
from watch import Log, Window, memory_gb, norm, warnings_before, warnings_during
from watchdog import Stop, Watchdog, agree, control_group


def train(r: Recipe, accelerator: Accelerator, control: Any, watchdog: Watchdog) -> None:
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out, phase = Path(r.out), watchdog.phase

    # --- data and model: whatever is wrong with them is found on all ranks before the first step ---------------------
    problem, facts, notes = "", dict[str, Any](), list[str]()
    try:
        r.validate()
        groups = r.bn_groups_per_rank(ranks)
        notes += compare_recipes(out, r)
        source = open_in_turn(r, rank, control)
        loader = open_loader(r, source, rank, ranks, device)
        torch.manual_seed(r.seed)
        net = split_batchnorm(
            build_encoder(r.arch, width=r.width, small_stem=r.small_stem, dim=r.dim, mlp=r.mlp), groups
        )
        if shortcut := batchnorm_shortcut(net, world_size=ranks, bn_groups=groups, shuffle_bn=r.shuffle_bn):
            if r.shuffle_bn:
                raise ValueError(shortcut)
            notes.append(shortcut)
        moco = MoCo(
            net,
            dim=r.dim,
            queue_size=r.queue_size,
            temperature=r.temperature,
            bn_groups=groups,
            shuffle_bn=r.shuffle_bn,
            seed=r.seed,
        )
        per_epoch = loader.steps_per_epoch
        total = min(r.epochs * per_epoch or r.max_steps, r.max_steps or r.epochs * per_epoch)
        facts = recipes.to_dict(r) | {"data": source.fingerprint, "steps": total, "torch": torch.__version__}
    except (ValueError, FileNotFoundError) as error:
        problem = str(error)
    agree(facts, problem, control)

    net.to(device, memory_format=torch.channels_last)
    moco.to(device, memory_format=torch.channels_last)
    if r.compile:
        net.compile()
        moco.encoder_k.compile()
    optimizer: Any = torch.optim.SGD(net.parameters(), r.lr, momentum=r.sgd_momentum, weight_decay=r.weight_decay)
    encoder, optimizer = accelerator.prepare(net, optimizer)

    # --- continue where the run folder ends --------------------------------------------------------------------------
    window, step = Window(device), 0
    state = load_newest(out, control)
    if state is not None:
        step = state["step"]
        net.load_state_dict(state["encoder"])
        moco.load_state_dict(state["moco"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["loader"])
        window.settled = state["metrics"]["rows"]
        if rank < len(state["rng"]):
            set_random_state(state["rng"][rank], device)
    moco.check_ranks(net)
    log = Log(out, step=step, total=total, enabled=rank == 0)
    if rank == 0:
        recipes.save(r, out / "recipe.yaml")
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step}} if step else {})
    writer = Writer(out, keep=r.keep_checkpoints, keep_every=r.keep_every * per_epoch)
    monitor = open_monitor(r, source) if r.knn_every else None
    introduce(log, r, source, ranks, groups, step, total, per_epoch, notes)

    def save(step: int) -> None:
        """Collective: every rank's generators go in. Nothing that is not finite is ever saved."""
        stop_if_not_finite(window, accelerator, control, writer)
        moco.check_ranks(net)
        rng = gather_objects(random_state(device), control)
        if rank == 0:
            state = {
                "step": step,
                "epoch": step / per_epoch,
                "encoder": net.state_dict(),
                "moco": moco.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "loader": loader.state_dict(),
                "rng": rng,
                "recipe": recipes.to_dict(r),
                "metrics": {"rows": window.state()},
            }
            writer.submit(state, step)

    # --- train -------------------------------------------------------------------------------------------------------
    stop = Stop(control)
    saved = step
    while step < total and not stop.asked():
        watchdog.next_step(step)
        is_log_step = (step + 1) % r.log_every == 0 or step + 1 == total
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

        phase("data")
        with window.waiting():
            batch = next(loader)

        # Algorithm 1 of the paper. The reference code has the momentum update at the beginning of the next forward pass instead of
        # the end of this step, which is the same thing. Queue and key encoder stand still over the passes of one step.
        all_keys, rows = list[Tensor](), list[Tensor]()
        passes = passes_of(batch.query, batch.key, r.accumulate, r.symmetric)
        for i, (query, key) in enumerate(passes):
            gradients_stay_local = accelerator.no_sync(encoder) if i + 1 < len(passes) else contextlib.nullcontext()
            with gradients_stay_local:
                phase("shuffle")
                shuffled = moco.shuffle(key)  # on their way to the other ranks while the queries are encoded
                phase("query encoder")
                q = encoder(query)  # [N, dim]
                phase("key encoder")
                with accelerator.autocast():
                    keys = moco.encode_keys(shuffled)  # [N, dim], no gradient
                phase("loss")
                loss, stats = moco.loss(q, keys)
                phase("backward")
                accelerator.backward(loss / r.accumulate)
            all_keys.append(keys)
            rows.append(torch.stack([loss.detach(), stats.accuracy, stats.positive, stats.negative]))
        phase("optimizer")
        gradient_norm = norm([p.grad for p in net.parameters() if p.grad is not None]) if is_log_step else None
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # fp16: after an overflow nothing else may move either
            phase("momentum")
            moco.momentum_update(net, r.moco_momentum)
            phase("queue")
            moco.enqueue(torch.cat(all_keys))
        window.add(step, rows, batch.sample_ids)
        step += 1
        log.step()

        phase("log")
        if is_log_step:
            stop_if_not_finite(window, accelerator, control, writer)
            metrics: dict[str, Any] = {"step": step, "epoch": step / per_epoch, "lr": lr} | window.means(r.batch_size)
            metrics |= {
                "queue_filled": moco.queue_filled.item() / r.queue_size,
                "queue_age": moco.queue_age().item(),
                "gradient_norm": gradient_norm.item() if gradient_norm is not None else 0.0,
                "parameter_norm": norm(list(net.parameters())).item(),
                "memory_gb": memory_gb(device),
                "seconds_left": (total - step) * r.batch_size / max(metrics["images_per_second"], 1e-9),
            }
            log.write(metrics)
            accelerator.log(metrics, step=step)
            stages = loader.timings()
            bottleneck = loader.bottleneck(stages)
            for kind, text in warnings_during(metrics, r.queue_size, r.batch_size, bottleneck, stages).items():
                log.warn(kind, text)

        if monitor is not None and step % (r.knn_every * per_epoch) == 0:
            phase("knn")
            accuracy = monitor(net, accelerator)
            log.write({"step": step, "epoch": step / per_epoch, "knn": accuracy})
            accelerator.log({"knn": accuracy}, step=step)
            log.say(f"step {step}  epoch {step / per_epoch:.2f}  kNN {accuracy:.1%}")
            window.restart()

        keep_for_good = r.keep_every and step % (r.keep_every * per_epoch) == 0
        if step % r.save_every == 0 or step == total or keep_for_good:
            phase("save")
            save(step)
            saved = step
            window.restart()

    phase("save")
    if saved < step:
        save(step)
    writer.join()
    log.close()
    loader.close()
    if rank == 0 and (out / "metrics.jsonl").is_file():
        log.say(f"curves: {curves.draw(out)}")
    if step < total:
        log.say(
            f"{stop.name or 'another rank was told to stop'}: saved at step {step} of {total}; run the same command to continue"
        )


def passes_of(query: Tensor, key: Tensor, accumulate: int, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
    """The (query, key) pairs [N / accumulate, 3, S, S] of one optimiser step; symmetric: once more with the roles swapped."""
    pairs = list(zip(query.chunk(accumulate), key.chunk(accumulate)))
    return pairs + [(b, a) for a, b in pairs] if symmetric else pairs


def open_in_turn(r: Recipe, rank: int, control: Any) -> Source:
    """Rank 0 first: a missing index or manifest is built once, and then there."""

    def opened() -> Source:
        return open_source(
            r.data, cache_dir=r.cache_dir or None, cache_bytes=int(r.cache_gb * 2**30), progress=rank == 0
        )

    try:
        if rank == 0:
            return opened()
    finally:
        if control is not None:
            dist.barrier(group=control)
    return opened()


def open_loader(r: Recipe, source: Source, rank: int, ranks: int, device: torch.device) -> Loader:
    Path(r.out).mkdir(parents=True, exist_ok=True)
    return Loader(
        source,
        views=r.views,
        image_size=r.image_size,
        crop_min=r.crop_min,
        batch_size=r.batch_size,
        seed=r.seed,
        rank=rank,
        world_size=ranks,
        device=str(device),
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(r.precision, torch.float32),
        num_threads=r.num_threads or None,
        quarantine=Path(r.out) / "quarantine.jsonl",
        max_bad_fraction=r.max_bad_fraction,
        cache_dir=r.cache_dir or None,
        cache_bytes=int(r.cache_gb * 2**30),
    )


def open_monitor(r: Recipe, source: Source) -> Any:
    """A function (net, accelerator) -> kNN accuracy on knn_data, the same on all ranks."""
    bank = open_source(r.knn_train, progress=False) if r.knn_train else source
    val = open_source(r.knn_data, progress=False)

    def monitor(net: Any, accelerator: Accelerator) -> float:
        with accelerator.autocast():
            return knn.monitor(
                net,
                bank,
                val,
                image_size=r.image_size,
                mean_std=views.mean_std(r.views),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                device=accelerator.device,
            )

    return monitor


def stop_if_not_finite(window: Window, accelerator: Accelerator, control: Any, writer: Writer) -> None:
    """Reads the losses since the last look, on all ranks. Raises FloatingPointError with what is needed to find the cause."""
    bad = window.settle(accelerator.gather)
    if bad is None:
        return
    step, rank, loss = bad
    ids = gather_objects(window.sample_ids(step), control)[rank]
    writer.join()
    shown = ", ".join(map(str, ids[:32])) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
    raise FloatingPointError(
        f"the loss is {loss} at step {step} on rank {rank} (sample ids {shown}); the last good checkpoint is {writer.last_good or 'none'}. "
        "A lower lr or a warm-up, precision bf16 or fp32 instead of fp16, or looking at these samples are the usual remedies"
    )


def introduce(
    log: Log,
    r: Recipe,
    source: Source,
    ranks: int,
    groups: int,
    step: int,
    total: int,
    per_epoch: int,
    notes: list[str],
) -> None:
    """What is about to run, and what its numbers alone say about it."""
    each = r.images_per_rank(ranks)
    log.say(
        f"{source.samples} images, {per_epoch} steps an epoch, steps {step} to {total}; {ranks} ranks x {r.accumulate} x {each} images in "
        f"{groups} batch-norm group{'s' if groups > 1 else ''} of {each // groups}"
    )
    log.say(
        f"lr {r.lr} for a global batch of {r.batch_size} (the papers' 0.03 per 256 would be {0.03 * r.batch_size / 256:.4g})"
    )
    for note in notes:
        log.say(f"note: {note}")
    for kind, text in warnings_before(
        samples=source.samples,
        batch_size=r.batch_size,
        queue_size=r.queue_size,
        lr=r.lr,
        warmup_epochs=r.warmup_epochs,
        ranks=ranks,
    ).items():
        log.warn(kind, text)


def main() -> None:
    r = recipes.parse()
    torch.set_float32_matmul_precision("high" if r.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = r.precision != "fp32"
    accelerator = Accelerator(
        mixed_precision=r.precision if r.precision in ("bf16", "fp16") else "no",
        log_with=list(r.trackers),
        project_dir=r.out,
        # Each rank keeps its own batch-norm statistics; DDP would send rank 0's to all at every forward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    watchdog = Watchdog(accelerator.process_index, accelerator.num_processes, r.hang_seconds)
    if r.hang_seconds:
        watchdog.start()
    try:
        train(r, accelerator, control_group(), watchdog)
    except (ValueError, FileNotFoundError) as error:
        if accelerator.is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    accelerator.end_training()


if __name__ == "__main__":
    main()
