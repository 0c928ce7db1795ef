"""One training process: it continues exactly, stops when told, and says what is wrong."""

import itertools
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from training import Runs, log_of, losses, metrics, wait_for_step

import checkpoint
from transfer.load import load_encoder

STEPS = 20  # 60 images, 12 a step, 4 epochs


def test_the_run_folder_holds_what_it_should(undisturbed: Path) -> None:
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = (
        "step epoch loss lr images_per_second data_wait queue_filled queue_age accuracy positive_logit negative_logit"
    )
    assert set(f"{wanted} gradient_norm parameter_norm memory_gb".split()) <= set(rows[-1])
    assert [row["queue_filled"] for row in rows[:5]] == [12, 24, 36, 40, 40]
    assert (undisturbed / "recipe.yaml").is_file()
    assert (undisturbed / "curves.png").is_file()
    assert checkpoint.list_steps(undisturbed) == [STEPS]
    said = log_of(undisturbed).read_text()
    assert "queue_size 40 is 67% of the 60 images" in said
    assert "in proportion to the papers' 0.03 per 256: 0.001406" in said


def test_killed_ten_times_the_losses_are_bit_identical(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    rng = np.random.default_rng(0)
    kills, story = 0, []
    while kills < 10:
        pids = runs.start(out, shards_dir, save_every=1, keep_checkpoints=2)
        saved = checkpoint.list_steps(out)
        wait_for_save(out, (saved[-1] if saved else 0) + 1)
        time.sleep(float(rng.uniform(0, 0.3)))
        os.kill(pids[0], signal.SIGKILL)
        codes = runs.wait(pids)
        assert codes == [-signal.SIGKILL] or (codes == [0] and (out / "finished").is_file())  # this process was late
        kills += 1
        story.append(checkpoint.list_steps(out)[-1])
        if story[-1] >= STEPS - 1:
            break
    assert runs.train(out, shards_dir, save_every=1, keep_checkpoints=2) == [0]
    print(f"killed {kills} times, behind steps {story}")
    assert kills == 10 or story[-1] >= STEPS - 1
    assert losses(out) == losses(undisturbed)
    one, other = (checkpoint.load(checkpoint.path_of(run, STEPS)) for run in (out, undisturbed))
    for part in ("encoder", "moco", "optimizer", "loader"):
        assert_same(one[part], other[part])


def test_own_views_are_kept_in_the_run_folder(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    """The file that they came from may change or go; what judges the run normalises as it did."""
    out, own = tmp_path / "run", tmp_path / "own.yaml"
    own.write_text("{blur: 0.1, crop_scale: [0.3, 0.9], mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}")
    key = {**yaml.safe_load(own.read_text()), "solarise": 1.0}
    (tmp_path / "key.yaml").write_text(yaml.safe_dump(key))
    views = {"views": own, "key_views": tmp_path / "key.yaml"}
    assert runs.train(out, shards_dir, max_steps=2, **views) == [0], log_of(out).read_text()
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert kept["views"]["crop_scale"] == [0.3, 0.9] and kept["key_views"]["solarise"] == 1
    assert load_encoder(out).mean_std == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert runs.train(out, shards_dir, max_steps=3, **views) == [0], log_of(out).read_text()
    own.write_text("{blur: 0.2, crop_scale: [0.3, 0.9], mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}")
    assert runs.train(out, shards_dir, max_steps=4, **views) == [2]
    assert "views.blur 0.1 there and 0.2 now" in log_of(out).read_text()
    for path in views.values():
        path.unlink()
    assert runs.train(out, shards_dir, recipe=out / "recipe.yaml", max_steps=4) == [0], log_of(out).read_text()
    assert len(losses(out)) == 4


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "damaged"
    assert runs.train(out, shards_dir, max_steps=10, save_every=4) == [0]
    newest = checkpoint.path_of(out, 10)
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert runs.train(out, shards_dir, max_steps=0, save_every=4) == [0]
    said = log_of(out).read_text()
    assert "step_00000010.pt is damaged" in said
    assert "steps 8 to 20" in said
    assert "note: max_steps changes from 10 to 0" in said
    assert losses(out) == losses(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_save_and_end_with_0(
    number: signal.Signals, runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup: training then ignores it too")
    out = tmp_path / "told"
    slow = """
import time
from trainer import metrics
add = metrics.Window.add
metrics.Window.add = lambda *arguments: (time.sleep(0.1), add(*arguments))  # so that the signal comes before the end
"""
    pids = runs.start(out, shards_dir, patch=slow)
    wait_for_step(out, 3)
    told = time.monotonic()
    os.kill(pids[0], number)
    assert runs.wait(pids) == [0]
    assert time.monotonic() - told < 20
    assert f"{number.name}: saved at step {checkpoint.list_steps(out)[-1]} of 20" in log_of(out).read_text()
    if number is signal.SIGTERM:
        assert runs.train(out, shards_dir) == [0]
        assert losses(out) == losses(undisturbed)


def test_a_signal_during_start_up_ends_the_run_before_its_first_step(
    runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "early"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')  # of a run killed before its first checkpoint
    patch = """
import os, signal
from trainer import build
build_net = build.build_net
def told(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return build_net(*arguments)
build.build_net = told
"""
    assert runs.train(out, shards_dir, patch=patch) == [0], log_of(out).read_text()
    assert "SIGTERM: nothing trained yet" in log_of(out).read_text()
    assert metrics(out) == []
    assert checkpoint.list_steps(out) == []
    assert runs.train(out, shards_dir, patch=patch, profile=2) == [0], log_of(out).read_text()


def test_a_run_folder_has_one_training_at_a_time(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    first = runs.start(out, shards_dir, epochs=400, schedule="constant")
    wait_for_step(out, 3)
    patch = "from trainer import build; build.IN_USE_SECONDS = 1"
    assert runs.train(out, shards_dir, patch=patch) == [2], log_of(out).read_text()
    assert f"process {first[0]}: wait for its end, or give another --out" in log_of(out).read_text()
    second = runs.start(out, shards_dir, max_steps=1, epochs=400, schedule="constant")
    deadline = time.monotonic() + 60
    while log_of(out).read_text().count("note: ") < 2:
        assert time.monotonic() < deadline, log_of(out).read_text()
        time.sleep(0.05)
    os.kill(first[0], signal.SIGTERM)
    assert runs.wait([*first, *second]) == [0, 0], log_of(out).read_text()
    assert [row["step"] for row in metrics(out)] == list(range(1, checkpoint.list_steps(out)[-1] + 1))


def test_a_run_that_is_over_stays_so(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "over"
    assert runs.train(out, shards_dir, max_steps=3) == [0]
    assert (out / "finished").read_text() == "3\n"
    assert runs.train(out, shards_dir, max_steps=2) == [0]
    assert "nothing to do: the run is at step 3 of 2; raise epochs or max_steps" in log_of(out).read_text()
    assert (out / "finished").is_file()
    state = checkpoint.load(checkpoint.path_of(out, 3))
    del state["rng"]
    checkpoint.save(out, state, step=3, keep=1)
    assert runs.train(out, shards_dir, max_steps=4) == [2]
    assert "is of another version of this program: it has no rng" in log_of(out).read_text()


def test_the_recipe_decides_and_not_accelerate_config(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "configured"
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert runs.train(out, shards_dir, max_steps=4, env=env) == [0], log_of(out).read_text()
    assert losses(out) == losses(undisturbed)[:4]
    assert runs.train(out, shards_dir, env={"ACCELERATE_USE_FSDP": "true"}) == [2]
    assert "error: `accelerate config` asks for FSDP" in log_of(out).read_text()


def test_knn_data_without_labels_is_told_before_the_first_step(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    unlabelled, out = tmp_path / "unlabelled", tmp_path / "run"
    shutil.copytree(shards_dir, unlabelled)
    manifest = unlabelled / "manifest.json"
    manifest.write_text(re.sub(r'"classes": \[.*?\]', '"classes": []', manifest.read_text()))
    assert runs.train(out, shards_dir, knn_data=unlabelled, knn_every=1) == [2], log_of(out).read_text()
    assert "has no classes" in log_of(out).read_text()
    assert not (out / "checkpoints").exists()


def test_the_knn_monitor_disturbs_nothing(runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "watched"
    assert runs.train(out, shards_dir, knn_data=shards_dir, knn_every=2) == [0], log_of(out).read_text()
    found = {row["step"]: row["knn"] for row in metrics(out) if "knn" in row}
    assert list(found) == [10, 20]
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert [row["step"] for row in metrics(out) if row.get("rankme", 0) > 1] == [10, 20]
    assert losses(out) == losses(undisturbed)
    one, other = (checkpoint.load(checkpoint.path_of(run, STEPS)) for run in (out, undisturbed))
    assert_same(one["encoder"], other["encoder"])


def test_rankme_needs_no_labels_and_disturbs_nothing(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ranked"
    assert runs.train(out, shards_dir, knn_every=2) == [0], log_of(out).read_text()
    rows = [row for row in metrics(out) if "rankme" in row]
    assert [row["step"] for row in rows] == [10, 20]
    assert all(row["rankme"] > 1 and "knn" not in row for row in rows)
    assert losses(out) == losses(undisturbed)
    one, other = (checkpoint.load(checkpoint.path_of(run, STEPS)) for run in (out, undisturbed))
    assert_same(one["encoder"], other["encoder"])


def test_a_kill_during_knn_does_not_cost_it(runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    options = {"knn_data": shards_dir, "knn_every": 2, "max_steps": 12}
    patch = f"""
import os, time
import checkpoint
from transfer import monitor
def killed(*arguments, **options):
    while not checkpoint.list_steps({str(out)!r}):
        time.sleep(0.02)
    os._exit(9)
monitor.measure = killed
"""
    assert runs.train(out, shards_dir, patch=patch, **options) == [9]
    assert checkpoint.list_steps(out) == [10]
    for _ in range(2):
        assert runs.train(out, shards_dir, **options) == [0], log_of(out).read_text()
    assert [row["step"] for row in metrics(out) if "knn" in row] == [10]
    assert losses(out) == losses(undisturbed)[:12]


def test_log_steps_do_not_change_what_is_logged(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Means over windows, also over one that a stop and a restart fall into."""
    out = tmp_path / "windows"
    assert runs.train(out, shards_dir, log_every=4, max_steps=6) == [0]
    assert runs.train(out, shards_dir, log_every=4) == [0]
    each = losses(undisturbed)
    rows = {row["step"]: row["loss"] for row in metrics(out)}
    assert rows[20] == pytest.approx(np.mean(each[16:20]), abs=1e-12)
    assert rows[12] == pytest.approx(np.mean(each[8:12]), abs=1e-12)


def test_accumulation_keeps_queue_and_momentum_at_one_move_a_step(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two passes of 6 in a group each are a batch of 12 in two groups: but for rounding the same, without shuffling."""
    plain, halves = tmp_path / "plain", tmp_path / "halves"
    for out, options in ((plain, {"bn_groups": 2}), (halves, {"bn_groups": 2, "accumulate": 2})):
        options |= {"shuffle_bn": False, "max_steps": 4, "lr": 0.0001}
        assert runs.train(out, shards_dir, **options) == [0], log_of(out).read_text()
    assert losses(halves) == pytest.approx(losses(plain), rel=2e-3)
    one, other = (checkpoint.load(checkpoint.path_of(out, 4))["moco"] for out in (plain, halves))
    assert int(one["queue_ptr"]) == int(other["queue_ptr"]) == 48 % 40
    assert int(other["enqueues"]) == 4
    assert (one["queue"] - other["queue"]).abs().max() < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "end_to_end"},
        {"mechanism": "memory_bank", "symmetric": True},
        {"symmetric": True},
        {"precision": "bf16"},
    ],
)
def test_other_ways_to_train_run_and_continue_exactly(
    options: dict[str, Any], runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert runs.train(once, shards_dir, max_steps=6, **options) == [0], log_of(once).read_text()
    assert runs.train(twice, shards_dir, max_steps=3, **options) == [0]
    assert runs.train(twice, shards_dir, max_steps=6, **options) == [0]
    assert losses(once) == losses(twice)
    assert len(losses(once)) == 6
    assert all(np.isfinite(losses(once)))


def test_a_loss_that_is_not_finite_stops_the_run(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "nan"
    patch = """
from model.moco import MoCo
loss, calls = MoCo.loss, []
def poisoned(self, q, keys):
    calls.append(1)
    return loss(self, q * float("nan") if len(calls) == 7 else q, keys)
MoCo.loss = poisoned
"""
    assert runs.train(out, shards_dir, patch=patch, save_every=4, log_every=5) == [1]
    said = log_of(out).read_text().splitlines()[-1]
    assert "the loss is nan at step 6 on rank 0 (sample ids " in said
    assert "step_00000004.pt" in said
    assert checkpoint.list_steps(out) == [4]


def test_a_skipped_step_moves_nothing(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    """What fp16's gradient scaler does on an overflow, here by hand: it needs a GPU."""
    out = tmp_path / "skipped"
    patch = """
from accelerate.optimizer import AcceleratedOptimizer
step, calls = AcceleratedOptimizer.step, []
def skipping(self, closure=None):
    calls.append(1)
    self._is_overflow = len(calls) in (2, 3)
    if not self._is_overflow:
        step(self, closure)
AcceleratedOptimizer.step = skipping
"""
    assert runs.train(out, shards_dir, patch=patch, max_steps=5) == [0], log_of(out).read_text()
    moco = checkpoint.load(checkpoint.path_of(out, 5))["moco"]
    assert int(moco["enqueues"]) == 3
    assert int(moco["queue_filled"]) == 36
    assert len(losses(out)) == 3


def test_a_full_disk_costs_a_warning_and_at_the_end_an_error(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full"
    assert runs.train(out, shards_dir, max_steps=3) == [0]
    assert runs.train(out, shards_dir, save_every=5, largest_file=2_000_000) == [1], log_of(out).read_text()
    said = log_of(out).read_text()
    assert "warning: step 5 not saved" in said
    assert "File too large; the same command repeats them" in said.splitlines()[-1].replace("'", "")
    assert not (out / "finished").exists()
    assert checkpoint.list_steps(out) == [3]
    assert losses(out) == losses(undisturbed)


def test_a_log_that_cannot_be_written_costs_no_step(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "unheard"
    log_of(out).symlink_to("/dev/full")
    assert runs.train(out, shards_dir) == [0]
    assert losses(out) == losses(undisturbed)


def test_another_recipe_is_refused_and_so_is_other_data(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert runs.train(undisturbed, shards_dir, lr=0.5, dim=32) == [2]
    said = log_of(undisturbed).read_text().splitlines()[-1]
    assert "dim 16 there and 32 now" in said
    assert "lr 0.02 there and 0.5 now" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 84}, "60"),
        ({"bn_groups": 1}, "one process with bn_groups 1"),
        ({"bn_groups": 5}, "batch_size 12 does not divide into bn_groups 5"),
        ({"views": "v7"}, "views 'v7' is none of v1"),
        ({"arch": "resnet19"}, "unknown arch 'resnet19'"),
        ({"trackers": "[wandb_that_is_not]"}, "wandb_that_is_not"),
        ({"precision": "fp16"}, "fp16"),
        ({"data": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    options: dict[str, Any], says: str, runs: Runs, shards_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mistake"
    data = options.pop("data", shards_dir)
    assert runs.train(out, data, **options) == [2], log_of(out).read_text()
    said = [line for line in log_of(out).read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert says in said[0]


def test_a_run_folder_that_cannot_be_is_one_line_too(runs: Runs, shards_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("")
    assert runs.train(out, shards_dir) == [2]
    assert log_of(out).read_text().splitlines()[-1] == f"error: [Errno 17] File exists: '{out}'"


def test_profile_names_the_phases_and_changes_nothing(
    runs: Runs, shards_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "profiled"
    assert runs.train(out, shards_dir, profile=2) == [0], log_of(out).read_text()
    said = log_of(out).read_text()
    for phase in (
        "data",
        "shuffle",
        "query encoder",
        "key encoder",
        "loss",
        "backward",
        "optimizer",
        "momentum",
        "queue",
    ):
        assert f"  {phase} " in said
    assert (out / "trace.json").stat().st_size > 1000
    assert not (out / "checkpoints").exists()
    assert not (out / "metrics.jsonl").exists()


def wait_for_save(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (saved := checkpoint.list_steps(out)) or saved[-1] < step:
        assert time.monotonic() < deadline, log_of(out).read_text()[-2000:]
        time.sleep(0.01)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list):
        for a, b in itertools.zip_longest(one, other):
            assert_same(a, b)
    else:
        assert (one == other).all() if hasattr(one, "all") else one == other
