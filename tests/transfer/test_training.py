"""The loop that every training of transfer shares: stopped, killed and continued it comes to the same end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from stopping import StopAfter
from torch import Tensor, nn

import checkpoint
from transfer import training
from transfer.training import Session, continue_from, evaluations, plain, train

SETTINGS = plain({"protocol": "toy", "numbers": (1, 2)})
TOTAL = 9


class Batch(NamedTuple):
    x: Tensor  # [n, 4]
    sample_ids: Tensor


def batches(start: int, broken: int = -1) -> Iterator[Batch]:
    step = start
    while True:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        yield Batch(x * float("nan") if step == broken else x, torch.arange(6) + 6 * step)
        step += 1


def forward(model: nn.Module, batch: Batch) -> Tensor:
    x = model(batch.x + 0.1 * torch.randn(6, 4))  # draws from the generator that goes into the checkpoint
    loss = ((x - batch.x.sum(dim=1, keepdim=True)) ** 2).mean()
    return torch.stack([loss, x.detach().mean()])


def run(out: Path, stop: int = 1000, broken: int = -1, **how: Any) -> tuple[int, nn.Module, list[int]]:
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).train()
    optimizer = torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[3].parameters()}], 1.0, momentum=0.9)
    state = continue_from(out, SETTINGS, training.ALONE, "toy")
    judged = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.randn(3)  # what judging draws must not reach training
        judged.append(1)
        return {"AP": float(model(torch.ones(2, 4)).sum())}

    at = Session(out, stop=StopAfter(stop))  # type: ignore[arg-type]
    given = batches(state["step"] if state else 0, broken)
    schedule: dict[str, Any] = {"total": TOTAL, "steps_per_epoch": 3, "batch_size": 6, "log_every": 2, "save_every": 2}
    schedule |= {"evaluate_every": 4, "fields": ("loss", "mean"), "judged_by": "AP"} | how

    def rates(step: int) -> list[float]:
        return [0.01 / (1 + step), 0.02]

    step = train(at, net, optimizer, given, forward, rates, evaluate, state=state, settings=SETTINGS, **schedule)
    return step, net, judged


def lines(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "data_wait", "seconds_left", "memory_gb"}
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on_to_the_same_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "cut"
    assert run(whole)[0] == TOTAL
    assert (whole / "finished").read_text() == "9\n" and (whole / "curves.png").is_file()
    assert [row["step"] for row in evaluations(whole, "AP")] == [4, 8, 9]
    assert run(alone, stop=3)[0] == 3 and not (alone / "finished").exists()
    assert "SIGTERM: saved at step 3 of 9; the same command continues" in capsys.readouterr().out
    step, net, _ = run(alone)
    assert step == TOTAL and lines(alone) == lines(whole)
    expected = checkpoint.load_newest(whole)
    assert expected is not None and expected["step"] == TOTAL
    assert all(torch.equal(expected["net"][name], tensor) for name, tensor in net.state_dict().items())
    assert run(alone)[::2] == (TOTAL, [])  # nothing is left to do, and nothing is judged again


@pytest.mark.slow
def test_an_evaluation_that_a_kill_lost_is_made_up_for(tmp_path: Path) -> None:
    run(tmp_path, stop=4)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "AP" in json.loads(before[-1])
    (tmp_path / "metrics.jsonl").write_text("\n".join(before[:-1]) + "\n")
    assert run(tmp_path, stop=0)[::2] == (4, [1])
    assert [row["step"] for row in evaluations(tmp_path, "AP")] == [4]


def test_no_checkpoint_holds_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 5 on rank 0 \(sample ids 30, 31.*last good.*4.pt"
    ):
        run(tmp_path, broken=5)
    assert checkpoint.list_steps(tmp_path) == [4]


def test_each_parameter_group_has_its_rate(tmp_path: Path) -> None:
    run(tmp_path, stop=1, log_every=1)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [0.01, 0.02]
    assert lines(tmp_path)[0]["lr"] == 0.01


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop=1)
    with pytest.raises(ValueError, match=r"holds another experiment: numbers was \[1, 2\] and is \[3\]; take another"):
        continue_from(tmp_path, SETTINGS | {"numbers": [3]}, training.ALONE, "toy")
    assert continue_from(tmp_path / "new", SETTINGS, training.ALONE, "toy") is None


def test_fp16_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU take bf16 or fp32"):
        run(tmp_path, precision="fp16")
