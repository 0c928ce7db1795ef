"""Ways in which implementations of MoCo went wrong, a test for each that the model can commit.

The numbers are those of a list of 24; the others are the training loop's and the data path's and have tests there
(4 in part, 16, 20, 21, 24). `python tests/model/mutations.py` puts every fault in and sees its test fail.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from moco_runs import BATCH, DIM, MOMENTUM, QUEUE, TEMPERATURE, of_ranks, small_encoder, train, views
from torch import Tensor, nn

from model.batchnorm import ShuffleBN, Shuffled, SplitBatchNorm, arrive, split_batchnorm
from model.encoders import Encoder
from model.moco import MoCo, contrastive_loss


def start(groups: int = 4, queue_size: int = QUEUE) -> tuple[Encoder, MoCo]:
    encoder = split_batchnorm(small_encoder(), groups)
    return encoder, MoCo(encoder, dim=DIM, queue_size=queue_size, temperature=TEMPERATURE, bn_groups=groups)


def one_step(encoder: Encoder, moco: MoCo, number: int = 0) -> tuple[Tensor, Tensor]:
    x, y, _ = views(number)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    keys = moco.encode_keys(y)
    loss, _ = moco.loss(encoder(x), keys)
    loss.backward()
    optimizer.step()
    moco.momentum_update(encoder, MOMENTUM)
    moco.enqueue(keys)
    return loss.detach(), keys


def test_point_01_key_statistics_are_its_own() -> None:
    """Neither averaged nor copied, and the key encoder normalises by its batch, as in training."""
    encoder, moco = start()
    one_step(encoder, moco)
    assert all(module.training for module in moco.encoder_k.modules())
    own, others = dict(moco.encoder_k.named_buffers()), dict(encoder.named_buffers())
    assert not any(torch.equal(own[name], others[name]) for name in own if name.endswith(("mean", "var")))
    before = {name: b.clone() for name, b in own.items()}
    moco.momentum_update(encoder, 0.5)
    assert all(torch.equal(before[name], b) for name, b in moco.encoder_k.named_buffers())


def test_point_02_no_gradient_on_the_key_path() -> None:
    encoder, moco = start()
    _, keys = one_step(encoder, moco)
    assert not keys.requires_grad and not moco.queue.requires_grad
    assert all(not p.requires_grad and p.grad is None for p in moco.encoder_k.parameters())
    shared = {id(p) for p in encoder.parameters()} & {id(p) for p in moco.parameters()}
    assert not shared, "an optimiser of the query encoder must not see the key encoder"


def test_point_03_key_encoder_starts_as_a_copy() -> None:
    """All of it, the head included."""
    encoder, moco = start()
    for (name, q), (_, k) in zip(encoder.named_parameters(), moco.encoder_k.named_parameters(), strict=True):
        assert torch.equal(q, k), name


def test_point_04_momentum_update_is_equation_2_and_nothing_else_moves_the_keys() -> None:
    encoder, moco = start()
    before = [p.clone() for p in moco.encoder_k.parameters()]
    other = small_encoder(1)
    x, y, _ = views(0)
    for _ in range(4):  # micro-batches of one step
        keys = moco.encode_keys(y)
        moco.loss(encoder(x), keys)
        moco.enqueue(keys)
    assert all(torch.equal(a, b) for a, b in zip(before, moco.encoder_k.parameters()))
    moco.momentum_update(other, 0.99)
    for k, old, q in zip(moco.encoder_k.parameters(), before, other.parameters()):
        torch.testing.assert_close(k.double(), 0.99 * old.double() + 0.01 * q.double(), rtol=1e-6, atol=1e-8)


def test_point_05_momentum_update_in_fp32() -> None:
    """From 1.0 towards 1.3, 5000 updates at 0.999: 1.298. In 16 bits it would still be at 1.0."""
    encoder, moco = start()
    for q, k in zip(encoder.parameters(), moco.encoder_k.parameters()):
        nn.init.constant_(q, 1.3)
        nn.init.constant_(k, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5000):
            moco.momentum_update(encoder, 0.999)
    for k in moco.encoder_k.parameters():
        torch.testing.assert_close(k, torch.full_like(k, 1.3 - 0.3 * 0.999**5000), rtol=0, atol=2e-4)


def test_point_06_queries_and_keys_are_normalised() -> None:
    encoder, moco = start()
    loss, keys = one_step(encoder, moco)
    moco.encode_keys(views(1)[1])
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(BATCH), rtol=0, atol=1e-5)
    torch.testing.assert_close(moco.queue.norm(dim=0), torch.ones(QUEUE), rtol=0, atol=1e-5)
    larger, larger_moco = start()
    for net in (larger, larger_moco.encoder_k):
        net.head[2].weight.data.mul_(10)  # type: ignore[index, union-attr, operator]
        net.head[2].bias.data.mul_(10)  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(one_step(larger, larger_moco)[0], loss, rtol=0, atol=1e-5)


def test_point_07_own_keys_are_no_negatives() -> None:
    """K = B: the loss of step 2 is against exactly the keys of step 1."""
    encoder, moco = start(queue_size=BATCH)
    _, first = one_step(encoder, moco, 0)
    x, y, _ = views(1)
    keys = moco.encode_keys(y)
    q = encoder(x).detach()
    rows = F.normalize(q, dim=1)
    logits = torch.cat([(rows * keys).sum(1, keepdim=True), rows @ first.T], dim=1) / TEMPERATURE
    torch.testing.assert_close(moco.loss(q, keys)[0], -logits.log_softmax(dim=1)[:, 0].mean())


def test_point_08_wrapping_keeps_every_key() -> None:
    moco = start(queue_size=10)[1]
    for batch in range(5):
        moco.enqueue((torch.arange(4.0) + 4 * batch)[:, None].expand(-1, DIM))
    assert int(moco.queue_ptr) == 0
    assert moco.queue[0].tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_09_queue_holds_the_keys_of_all_ranks(world: int) -> None:
    results = [r["non_finite"] for r in of_ranks(world)]
    assert {r["ptr"] for r in results} == {4 * world - 1}  # one of them is not finite
    assert all(torch.equal(r["queue"], results[0]["queue"]) for r in results)
    tens = [int(tag) // 10 for tag in results[0]["queue"][: 4 * world - 1]]
    assert tens == sorted(tens) and set(tens) == set(range(world))


def test_point_10_queue_starts_the_same_on_all_ranks() -> None:
    """By its own seed, whatever the rank's random state; in the buffers, so that it moves and is saved."""
    queues = []
    encoder = small_encoder()
    for rank in range(2):
        torch.manual_seed(rank)
        queues.append(MoCo(encoder, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, seed=3))
    assert torch.equal(queues[0].queue, queues[1].queue)
    assert {"queue", "queue_ptr"} <= {name for name, _ in queues[0].named_buffers()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_10_a_difference_is_noticed(world: int) -> None:
    for r in of_ranks(world):
        assert f"rank {world - 1}: queue" in r["check"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_11_permutation_is_the_same_on_all_ranks(world: int) -> None:
    """Unshuffle after shuffle is the identity, though the ranks' random states differ."""
    assert all(r["shuffles"]["back"] for r in of_ranks(world))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_12_shuffle_mixes_across_ranks(world: int) -> None:
    """1 / W of the samples stay on their rank; a permutation inside each rank would keep all."""
    for r in of_ranks(world):
        assert r["shuffles"]["stayed"] == pytest.approx(1 / world, abs=0.06)


def test_point_12_shuffle_mixes_across_groups() -> None:
    """The same for the groups of one device, and a sample's companions are others each time."""
    shuffler, groups, n = ShuffleBN(seed=0), 4, 32
    stayed = []
    for _ in range(100):
        moved = shuffler(torch.arange(float(n))[:, None, None, None])
        assert isinstance(moved, Shuffled)
        there = arrive(moved).flatten().long()
        stayed.append((there * groups // n == torch.arange(n) * groups // n).float().mean())
    assert torch.stack(stayed).mean() == pytest.approx(1 / groups, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_13_query_gradients_are_those_of_one_process(world: int) -> None:
    one = train("moco", groups=world, steps=1)["gradients"]
    assert len(one) == len(list(small_encoder().parameters()))
    for r in of_ranks(world):
        torch.testing.assert_close(r["moco"]["gradients"], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_point_14_loss_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    """bf16 logits near 1 / T = 14.3 would be 0.0625 apart."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(32, 128, generator=generator).to(dtype)
    keys = F.normalize(q.float() + 2 * torch.randn(32, 128, generator=generator), dim=1)
    negatives = F.normalize(torch.randn(128, 512, generator=generator), dim=0)
    rows = F.normalize(q.double(), dim=1)
    logits = torch.cat([(rows * keys).sum(1, keepdim=True), rows @ negatives.double()], dim=1) / 0.07
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = contrastive_loss(q, keys, negatives, 0.07)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), -logits.log_softmax(dim=1)[:, 0].mean(), rtol=0, atol=1e-5)


def test_point_15_weight_decay_reaches_everything() -> None:
    """The paper decays batch norm and biases too: nothing of the encoder is left out of its parameters by the split."""
    names = {name for name, p in start()[0].named_parameters() if p.requires_grad}
    assert names == {name for name, _ in small_encoder().named_parameters()}
    assert {"backbone.1.weight", "backbone.1.bias", "head.0.bias", "head.2.bias"} <= names


def test_point_17_queue_is_in_the_checkpoint() -> None:
    """With its pointer and the count of shuffles: the step after a restart is the step that would have come."""
    encoder, moco = start()
    one_step(encoder, moco, 0)
    file = io.BytesIO()
    torch.save({"encoder": encoder.state_dict(), "moco": moco.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = split_batchnorm(small_encoder(9), 4)
    other = MoCo(again, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, bn_groups=4, seed=5)
    again.load_state_dict(state["encoder"])
    other.load_state_dict(state["moco"])
    for net in (encoder, again):
        net.zero_grad()
    assert torch.equal(one_step(encoder, moco, 1)[0], one_step(again, other, 1)[0])
    assert torch.equal(moco.queue, other.queue) and moco.queue_ptr == other.queue_ptr
    assert moco.queue_filled == other.queue_filled == 2 * BATCH


def test_point_18_queue_stays_fp32() -> None:
    encoder, moco = start()
    x, y, _ = views(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = moco.encode_keys(y)
        loss, _ = moco.loss(encoder(x), keys)
    assert keys.dtype == loss.dtype == torch.float32
    moco.enqueue(keys.bfloat16())
    moco.load_state_dict(copy.deepcopy(moco.state_dict()))
    moco.to(memory_format=torch.channels_last)
    assert moco.queue.dtype == torch.float32


def test_point_19_channels_last_changes_nothing() -> None:
    """Neither the numbers of split batch norm, nor is a layout changed on the way; one group is plain batch norm."""
    images = torch.randn(16, 8, 5, 5)
    plain = nn.BatchNorm2d(8)
    torch.testing.assert_close(SplitBatchNorm(plain, 1)(images), nn.BatchNorm2d(8)(images))
    split = SplitBatchNorm(plain, 4)
    contiguous, last = split(images), split(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(contiguous, last)
    assert contiguous.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        encoder, moco = start()
        x, y, _ = (t.to(memory_format=layout) if t.dim() == 4 else t for t in views(0))
        loss, _ = moco.loss(encoder(x), moco.encode_keys(y))
        torch.testing.assert_close(loss.detach(), one_step(*start())[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.process
def test_point_22_parameters_are_equal_across_ranks(world: int) -> None:
    """After every step through DDP: a forward past it would leave each rank with its own gradients."""
    first, *others = (r["moco"]["parameters"] for r in of_ranks(world))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_point_23_evaluation_leaves_everything_as_it_was() -> None:
    """kNN puts the query encoder into eval and back: no statistic moves, and the key encoder keeps training."""
    encoder, moco = start()
    before = copy.deepcopy(encoder.state_dict())
    encoder.eval()
    with torch.no_grad():
        encoder(torch.randn(7, 3, 8, 8))  # a batch that does not divide into groups either
    encoder.train()
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert moco.encoder_k.training
