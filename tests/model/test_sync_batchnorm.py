"""Synchronised batch norm: two ranks equal one process with the whole batch, and precise statistics are means."""

import pytest
import torch
from moco_runs import of_ranks
from sync_runs import PARTS, after_steps, images, net
from torch import nn

from model.sync_batchnorm import SyncedBatchNorm, precise_statistics, synchronise


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_equal_one_with_the_whole_batch() -> None:
    """Parts of unlike sizes, one of them empty: gradients, statistics, precise statistics, outputs."""
    first, second = (rank["synchronised"] for rank in of_ranks(2))
    one = after_steps(net(), [(0, 8)] * len(PARTS), 1.0)  # torch's own batch norm
    for name in ("gradients", "statistics", "precise", "outputs"):  # rank 0 has the whole batch in the last step
        assert first[name] == pytest.approx(one[name], rel=2e-4, abs=2e-5), name
    assert first["statistics"] == second["statistics"] and first["precise"] == second["precise"]


def test_alone_it_is_torchs_own_and_keeps_the_names() -> None:
    plain, ours = net(), synchronise(net())
    assert isinstance(ours[1], SyncedBatchNorm) and list(ours.state_dict()) == list(plain.state_dict())
    assert torch.equal(plain(images(0)), ours(images(0)))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers()))
    assert isinstance(synchronise(nn.BatchNorm2d(3)), SyncedBatchNorm)


@pytest.mark.parametrize("training", [True, False])
def test_precise_statistics_are_the_mean_over_batches(training: bool) -> None:
    model = synchronise(net()).train(training)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(images(9))
    precise_statistics(model, [(images(step),) for step in range(3)])
    first = model[0](torch.stack([images(step) for step in range(3)]).flatten(0, 1)).view(3, 8, 4, 5, 4)
    torch.testing.assert_close(model[1].running_mean, first.mean(dim=(0, 1, 3, 4)))
    torch.testing.assert_close(model[1].running_var, first.var(dim=(1, 3, 4)).mean(dim=0))
    assert model.training == training and model[1].momentum == 0.1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
