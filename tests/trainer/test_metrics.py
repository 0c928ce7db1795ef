"""What a run says about itself: warnings that explain, lines that survive a kill, means over a window."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch

from trainer.metrics import Log, Window, drop_lines_after, norm, warnings_before, warnings_during

CHANCE = math.log(65537)
HEALTHY = {"step": 5000, "loss": 6.9, "accuracy": 0.6, "lr": 0.03}


def during(usual_wait: float = 0.02, **changes: float) -> dict[str, str]:
    return warnings_during(HEALTHY | changes, 65536, 256, usual_wait, "read", {"read": 4.0, "graph": 1.0})


def test_a_healthy_run_is_not_warned_about() -> None:
    assert during() == {}  # 6.9 against a floor of 6.2 and a chance of 11.09 is how MoCo v2 looks
    assert warnings_before(1_281_167, 256, 65536, 0.03, 0) == {}


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"loss": CHANCE}, "chance", "ln(queue_size + 1) = 11.09"),
        ({"accuracy": 0.999}, "shortcut", "shuffle_bn false"),
        (
            {"usual_wait": 0.25},
            "data",
            "25% of the time is spent waiting for data; the slowest stage is read (read 4000 ms",
        ),
    ],
)
def test_each_trouble_is_explained(changes: dict[str, float], kind: str, says: str) -> None:
    found = during(**changes)
    assert list(found) == [kind]
    assert says in found[kind]


def test_a_young_queue_may_look_like_that() -> None:
    assert during(step=500, loss=CHANCE, accuracy=1.0) == {}
    assert during(step=20, usual_wait=0.9) == {}


def test_numbers_that_are_known_to_fail_are_said_before() -> None:
    assert "queue_size 65536 is 512% of the 12800 images" in warnings_before(12800, 256, 65536, 0.03, 0)["queue"]
    assert "warmup_epochs 10" in warnings_before(10**7, 4096, 65536, 0.48, 0)["batch"]
    assert warnings_before(10**7, 4096, 65536, 0.48, 10) == {}


def test_lines_behind_the_checkpoint_and_half_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(1, 9)) + '{"step": 9, "lo')
    drop_lines_after(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the file's size stands in for the disk."""
    log = Log(tmp_path, step=0, total=10, enabled=True)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, room in ((1, 100), (2, 30), (3, 1000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
        try:
            log.write({"step": step, "knn": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]
    assert log.has("knn", 3)
    assert not log.has("loss", 3)
    assert not log.has("knn", 2)


def test_a_warning_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, step=0, total=10, enabled=True)
    for _ in range(3):
        log.warn({"kind": "trouble"})
    assert capsys.readouterr().err.count("trouble") == 1


def test_a_window_averages_over_steps_and_ranks_and_finds_the_first_bad_loss() -> None:
    window = Window(torch.device("cpu"))
    for step in range(3):
        window.add(step, [torch.tensor([float(step), 0.5, 0.2, 0.1])], torch.arange(4) + 10 * step)
    other = torch.tensor([[2.0, 0.5, 0.2, 0.1], [4.0, 0.5, 0.2, 0.1], [6.0, 0.5, 0.2, 0.1]])
    assert window.settle(lambda mine: torch.cat([mine, other[None]])) is None
    means = window.means(256, temperature=0.1)
    assert means["loss"] == pytest.approx((0 + 1 + 2 + 2 + 4 + 6) / 6)
    assert means["positive_logit"] == pytest.approx(2.0)
    assert window.means(256, temperature=0.1) == {}

    window.settled = [[2.0, 0.5, 0.2, 0.1]]  # of a checkpoint; the one step since then was skipped
    with window.waiting():
        pass
    assert window.means(256, temperature=0.1)["images_per_second"] > 0

    for step, loss in ((7, 1.0), (8, math.nan)):
        window.add(step, [torch.tensor([loss, 0.0, 0.0, 0.0])], torch.arange(4) + 10 * step)
    other = torch.tensor([[math.inf, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert window.settle(lambda mine: torch.cat([mine, other[None]])) == (7, 1, math.inf)
    assert window.sample_ids(8) == [80, 81, 82, 83]


def test_one_slow_window_is_no_usual_wait() -> None:
    window = Window(torch.device("cpu"))
    window.waits_before.extend([0.9] * 2)
    assert window.usual_wait() == 0
    window.waits_before.extend([0.02] * 7 + [0.9])
    assert window.usual_wait() == 0.02


def test_norm_is_that_of_all_as_one_vector() -> None:
    assert norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)


def test_the_bar_of_a_long_run_has_room_for_what_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    log = Log(tmp_path, step=123_456, total=1_250_000, enabled=True)
    numbers = {"step": 123_457, "epoch": 0.1, "loss": 10.98, "lr": 0.029912, "data_wait": 0.1234}
    log.write(numbers | {"images_per_second": 12345.6, "seconds_left": 5.5 * 86400})
    assert log.bar is not None
    log.bar.dynamic_ncols, log.bar.ncols = None, 80
    shown = str(log.bar)
    log.close()
    assert len(shown) == 80
    assert "123456/1250000, loss 10.980  lr 0.0299  12346 img/s  wait 12%  5 d 12 h" in shown
