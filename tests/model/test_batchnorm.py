"""Split batch norm against separate batch norms, shuffling on one device, and the warning of the shortcut."""

import copy

import numpy as np
import pytest
import torch
from moco_runs import BATCH, small_encoder
from torch import Tensor, nn

from model.batchnorm import (
    ShuffleBN,
    Shuffled,
    SplitBatchNorm,
    arrive,
    batchnorm_shortcut,
    draw_permutation,
    plan_route,
    split_batchnorm,
    unshuffle,
)
from model.encoders import build_encoder
from model.ranks import check_equal, checksum


def separate(norm: nn.BatchNorm2d, images: Tensor, groups: int) -> tuple[Tensor, nn.BatchNorm2d]:
    """Each part through its own copy, as on `groups` GPUs; running statistics averaged over the copies."""
    copies = [copy.deepcopy(norm) for _ in range(groups)]
    out = torch.cat([c(x) for c, x in zip(copies, images.chunk(groups))])
    mean = copy.deepcopy(norm)
    mean.running_mean = torch.stack([c.running_mean for c in copies if c.running_mean is not None]).mean(dim=0)
    mean.running_var = torch.stack([c.running_var for c in copies if c.running_var is not None]).mean(dim=0)
    return out, mean


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "compiled"), [(1, False), (2, False), (8, False), (4, True)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_is_separate_batchnorms(groups: int, compiled: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    split = SplitBatchNorm(norm, groups)
    if compiled:
        split.compile(backend="aot_eager")
    for _ in range(3):
        images = (3 * torch.randn(16, 6, 5, 5) + 1).to(memory_format=layout)
        x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
        expected, norm = separate(norm, x, groups)
        ours = split(y)
        assert ours.is_contiguous(memory_format=layout), "the layout must not change"
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (ours * weight).sum().backward()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(y.grad, x.grad)
        torch.testing.assert_close(split.running_mean, norm.running_mean)
        torch.testing.assert_close(split.running_var, norm.running_var)
    assert int(split.num_batches_tracked) == 3  # type: ignore[arg-type]
    torch.testing.assert_close(split.eval()(images), norm.eval()(images))


def test_split_keeps_the_state_dict() -> None:
    plain = build_encoder("resnet18", small_stem=True)
    split = split_batchnorm(copy.deepcopy(plain), 4)
    assert list(split.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(split.state_dict().values(), plain.state_dict().values()))
    assert sum(isinstance(m, SplitBatchNorm) for m in split.modules()) == 20
    plain.load_state_dict(split.state_dict())


@pytest.mark.slow
def test_split_reaches_timms_batchnorm_with_its_activation() -> None:
    pytest.importorskip("timm")
    plain = build_encoder("timm:mobilenetv3_small_050", dim=8)
    split = split_batchnorm(copy.deepcopy(plain), 2)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(split.eval()(images), plain.eval()(images))
    expected = torch.cat([copy.deepcopy(plain).train()(part) for part in images.chunk(2)])
    torch.testing.assert_close(split.train()(images), expected)


def test_split_errors() -> None:
    with pytest.raises(ValueError, match="10 does not divide into bn_groups 4"):
        split_batchnorm(small_encoder(), 4)(torch.randn(10, 3, 8, 8))
    with pytest.raises(ValueError, match="1 or more"):
        split_batchnorm(small_encoder(), 0)
    with pytest.raises(ValueError, match="cannot split a SyncBatchNorm"):
        split_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(small_encoder()), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shuffle_on_one_device(dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = torch.randn(BATCH, 3, 4, 4).to(dtype).to(memory_format=layout)
    shuffler = ShuffleBN(seed=1)
    moved = shuffler(images)
    assert isinstance(moved, Shuffled)
    there = arrive(moved)
    assert there.dtype == dtype and there.is_contiguous(memory_format=layout)
    assert torch.equal(there, images[torch.from_numpy(draw_permutation(BATCH, 1, 1))])
    assert torch.equal(unshuffle(there.flatten(1), moved.route), images.flatten(1))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_routes_of_all_ranks_fit_together(world: int) -> None:
    """Played through in one process: what leaves and arrives, by the plan alone."""
    n = 6
    permutation = draw_permutation(world * n, 3, 7)
    routes = [plan_route(permutation, rank, world, torch.device("cpu")) for rank in range(world)]
    leaving = [torch.arange(n)[r.send] + rank * n for rank, r in enumerate(routes)]
    parcels = [rows.split(r.send_counts) for rows, r in zip(leaving, routes)]
    for rank, route in enumerate(routes):
        received = torch.cat([parcels[source][rank] for source in range(world)])
        assert [len(parcels[source][rank]) for source in range(world)] == route.receive_counts
        assert received[route.place].tolist() == permutation[rank * n : (rank + 1) * n].tolist()


def test_permutations_follow_seed_and_count_and_resume() -> None:
    drawn = [tuple(draw_permutation(12, seed, count)) for seed in range(3) for count in range(20)]
    assert len(set(drawn)) == 60
    first, second = ShuffleBN(seed=4), ShuffleBN(seed=9)
    images = torch.randn(12, 3, 2, 2)
    first(images)
    second.load_state_dict(first.state_dict())
    assert torch.equal(arrive(first(images)), arrive(second(images)))


def test_no_shuffle_where_there_is_nothing_to_hide() -> None:
    images = torch.randn(4, 3, 2, 2)
    assert ShuffleBN(seed=0, enabled=False)(images) is images


@pytest.mark.parametrize(
    ("world", "groups", "shuffle", "batchnorm", "says"),
    [
        (1, 1, True, True, "set bn_groups to 8"),
        (1, 8, True, True, ""),
        (2, 1, True, True, ""),
        (2, 1, False, True, "set shuffle_bn true"),
        (1, 1, False, False, ""),
    ],
)
def test_shortcut_is_told(world: int, groups: int, shuffle: bool, batchnorm: bool, says: str) -> None:
    encoder = small_encoder(batchnorm=batchnorm)
    text = batchnorm_shortcut(encoder, world_size=world, bn_groups=groups, shuffle_bn=shuffle)
    assert says in text and bool(text) == bool(says)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_checksum_sees_every_bit_and_place(dtype: torch.dtype) -> None:
    values = torch.randint(-1000, 1000, (37,), generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped = values.clone()
    swapped[[3, 20]] = values[[20, 3]]
    changed = values.clone()
    changed[-1] += 8
    assert len({int(checksum(t)) for t in (values, swapped, changed)}) == 3
    assert int(checksum(values)) == int(checksum(values.clone()))


def test_checksum_in_chunks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = checksum(values)
    monkeypatch.setattr("model.ranks.CHUNK", 64)
    assert checksum(values) == whole
    check_equal({"values": values})  # one process: nothing to compare with
    assert np.isfinite(int(whole))
