"""MoCo against Algorithm 1 written out in the plainest way, and the queue against a list."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from moco_runs import BATCH, DIM, LR, MOMENTUM, QUEUE, SAMPLES, TEMPERATURE, small_encoder, train, views
from torch import Tensor, nn

from model.batchnorm import draw_permutation, split_batchnorm
from model.mechanisms import EndToEnd, MemoryBank
from model.moco import MoCo, contrastive_loss


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_parts(encoder: nn.Module, images: Tensor, groups: int) -> Tensor:
    """A forward for each group of samples, as if each were a GPU."""
    return torch.cat([encoder(images[rows]) for rows in torch.arange(len(images)).chunk(groups)])


def algorithm_1(groups: int, steps: int) -> list[float]:
    """The paper's pseudocode with a queue that is a list of NumPy rows, plain batch norm, and nothing of `model.moco`.

    In float64 where it is written here, so that it is the more exact of the two.
    """
    f_q = small_encoder()
    f_k = copy.deepcopy(f_q)
    optimizer = torch.optim.SGD(f_q.parameters(), lr=LR, momentum=0.9)
    random = torch.randn(DIM, QUEUE, generator=torch.Generator().manual_seed(0)).T.double().numpy()
    queue = list(unit(random))  # oldest first
    losses = []
    for step in range(steps):
        x_q, x_k, _ = views(step)
        q = torch.nn.functional.normalize(in_parts(f_q, x_q, groups), dim=1)
        with torch.no_grad():
            order = torch.from_numpy(draw_permutation(len(x_k), 0, step + 1))
            shuffled = in_parts(f_k, x_k[order], groups)
            k = torch.empty_like(shuffled)
            k[order] = shuffled
        k = unit(k.double().numpy())
        # logits and their softmax in NumPy; its gradient with respect to q is (sum of p_j k_j - k_positive) / T / N
        rows = q.detach().double().numpy()
        dictionary = np.stack(queue)
        logits = np.concatenate([(rows * k).sum(axis=1, keepdims=True), rows @ dictionary.T], axis=1) / TEMPERATURE
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        losses.append(float(-np.log(p[:, 0]).mean()))
        slope = (p[:, :1] * k + p[:, 1:] @ dictionary - k) / TEMPERATURE / len(rows)
        optimizer.zero_grad()
        q.backward(torch.from_numpy(slope).float())
        optimizer.step()
        with torch.no_grad():
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters()):
                p_k.copy_(MOMENTUM * p_k.double() + (1 - MOMENTUM) * p_q.double())
        queue = (queue + list(k))[-QUEUE:]
    return losses


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_twenty_losses_of_algorithm_1(groups: int) -> None:
    ours = train("moco", groups=groups, steps=20)["losses"]
    np.testing.assert_allclose(ours.numpy(), algorithm_1(groups, 20), rtol=0, atol=1e-5)


def test_loss_and_gradient_are_those_of_a_double_precision_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    keys, negatives = torch.randn(6, DIM, generator=generator), torch.randn(DIM, 30, generator=generator)
    keys, negatives = nn.functional.normalize(keys, dim=1), nn.functional.normalize(negatives, dim=0)
    unit_q = q / q.norm(dim=1, keepdim=True)
    logits = torch.cat([(unit_q * keys).sum(1, keepdim=True), unit_q @ negatives.double()], 1) / 0.07
    expected = -logits.log_softmax(dim=1)[:, 0].mean()
    (gradient,) = torch.autograd.grad(expected, q)
    ours = q.detach().float().requires_grad_()
    loss, stats = contrastive_loss(ours, keys, negatives, 0.07)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.grad, gradient.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.positive.double(), (unit_q * keys).sum(1).mean().detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        stats.negative.double(), (unit_q @ negatives.double()).mean().detach(), rtol=0, atol=1e-6
    )
    assert stats.accuracy == (logits.argmax(dim=1) == 0).float().mean()


def test_losses_at_the_start_are_the_known_ones() -> None:
    """Perfect positives against 65536 random negatives: 0.09 at T 0.07, 6.2 at T 0.2; chance is ln(K + 1) = 11.09."""
    negatives = nn.functional.normalize(torch.randn(128, 65536, generator=torch.Generator().manual_seed(0)), dim=0)
    q = nn.functional.normalize(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    assert contrastive_loss(q, q, negatives, 0.07)[0].item() == pytest.approx(0.09, abs=0.02)
    assert contrastive_loss(q, q, negatives, 0.2)[0].item() == pytest.approx(6.2, abs=0.05)
    assert math.log(65537) == pytest.approx(11.09, abs=0.01)


def queue_of(size: int) -> MoCo:
    return MoCo(small_encoder(), dim=DIM, queue_size=size, temperature=TEMPERATURE)


@pytest.mark.parametrize("size", [1, 7, 16, 41])
@pytest.mark.parametrize("batches", [[1, 1, 1], [5, 5, 5, 5, 5], [16, 16, 16], [3, 20, 9, 41, 100, 2]])
def test_queue_is_a_fifo_at_any_batch_size(size: int, batches: list[int]) -> None:
    moco = queue_of(size)
    expected = [math.nan] * size  # the random ones of the start
    tag, written = 1, 0
    for batch in batches:
        tags = torch.arange(tag, tag + batch, dtype=torch.float32)
        moco.enqueue(tags[:, None].expand(-1, DIM))
        for value in tags.tolist():
            expected[written % size] = value
            written += 1
        tag += batch
    ours = [v if born else math.nan for v, born in zip(moco.queue[0].tolist(), moco.queue_born.tolist())]
    np.testing.assert_array_equal(ours, expected)
    assert int(moco.queue_ptr) == written % size
    assert int(moco.queue_filled) == min(size, written)


@pytest.mark.parametrize("batch", [4, 20])
def test_keys_that_are_not_finite_are_left_out(batch: int) -> None:
    """Of any position and number, also all of them, also with more keys than the queue holds."""
    moco = queue_of(11)
    kept: list[float] = []
    for trial in range(30):
        generator = torch.Generator().manual_seed(trial)
        keys = (torch.arange(batch) + 100.0 * trial)[:, None].repeat(1, DIM)
        bad = torch.rand(batch, generator=generator) < [0.0, 0.3, 0.9, 1.0][trial % 4]
        kept += keys[~bad, 0].tolist()
        keys[bad, trial % DIM] = [torch.nan, torch.inf, -torch.inf][trial % 3]
        moco.enqueue(keys)
        ptr = int(moco.queue_ptr)
        oldest_first = torch.roll(moco.queue[0], -ptr).tolist()
        filled = int(moco.queue_filled)
        assert filled == min(11, len(kept)) and ptr == len(kept) % 11
        assert oldest_first[11 - filled :] == kept[-11:]
    assert moco.queue.isfinite().all()


def test_fill_level_and_age() -> None:
    moco = queue_of(10)
    assert moco.queue_age().isnan() and int(moco.queue_filled) == 0
    for filled, age in [(4, 0.0), (8, 0.5), (10, 1.0), (10, 1.0)]:
        moco.enqueue(torch.randn(4, DIM))
        assert int(moco.queue_filled) == filled
        assert moco.queue_age().item() == pytest.approx(age, abs=0.21)


def test_negatives_are_those_of_the_queue() -> None:
    moco = queue_of(5)
    q, keys = torch.randn(3, DIM), nn.functional.normalize(torch.randn(3, DIM), dim=1)
    assert torch.equal(moco.loss(q, keys)[0], contrastive_loss(q, keys, moco.queue, TEMPERATURE)[0])


def test_cosine_momentum_and_its_ends() -> None:
    """m is an argument of every update: 1 keeps the keys, 0 copies the queries, to the bit."""
    encoder = small_encoder(0)
    moco = MoCo(encoder, dim=DIM, queue_size=5, temperature=TEMPERATURE)
    before = [p.clone() for p in moco.encoder_k.parameters()]
    other = small_encoder(1)
    moco.momentum_update(other, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, moco.encoder_k.parameters()))
    moco.momentum_update(other, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), moco.encoder_k.parameters()))


def test_symmetric_loss_is_two_directions() -> None:
    """As train.py writes it: each view once query and once key, both losses, both key batches into the queue."""
    encoder = split_batchnorm(small_encoder(), 4)
    moco = MoCo(encoder, dim=DIM, queue_size=64, temperature=TEMPERATURE, bn_groups=4)
    a, b, _ = views(0)
    keys_b, keys_a = moco.encode_keys(b), moco.encode_keys(a)
    (there, _), (back, _) = moco.loss(encoder(a), keys_b), moco.loss(encoder(b), keys_a)
    (there + back).backward()
    moco.enqueue(torch.cat([keys_b, keys_a]))
    assert int(moco.queue_ptr) == 2 * BATCH
    torch.testing.assert_close(moco.queue[:, BATCH : 2 * BATCH].T, keys_a)


def test_state_survives_a_file_and_training_goes_on_to_the_bit() -> None:
    def step(encoder: nn.Module, moco: MoCo, optimizer: torch.optim.Optimizer, number: int) -> float:
        x, y, _ = views(number)
        keys = moco.encode_keys(y)
        loss, _ = moco.loss(encoder(x), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.momentum_update(encoder, MOMENTUM)
        moco.enqueue(keys)
        return loss.item()

    def fresh(seed: int) -> tuple[nn.Module, MoCo, torch.optim.Optimizer]:
        encoder = split_batchnorm(small_encoder(seed), 4)
        moco = MoCo(encoder, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, bn_groups=4, seed=seed)
        return encoder, moco, torch.optim.SGD(encoder.parameters(), lr=LR, momentum=0.9)

    parts = fresh(0)
    for number in range(3):
        step(*parts, number)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    expected = [step(*parts, number) for number in range(3, 6)]
    file.seek(0)
    resumed = fresh(7)
    for part, state in zip(resumed, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert [step(*resumed, number) for number in range(3, 6)] == expected
    assert torch.equal(parts[1].queue, resumed[1].queue)


@pytest.mark.slow
@pytest.mark.initial
def test_compiled_and_channels_last() -> None:
    """`torch.compile` of both encoders, on channels-last images, gives the losses of plain ones."""

    def losses(compiled: bool) -> list[float]:
        encoder = split_batchnorm(small_encoder(), 2).to(memory_format=torch.channels_last)
        moco = MoCo(encoder, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, bn_groups=2)
        run = encoder
        if compiled:
            run = torch.compile(encoder, backend="aot_eager")
            moco.encoder_k.compile(backend="aot_eager")
        optimizer = torch.optim.SGD(encoder.parameters(), lr=LR)
        result = []
        for number in range(3):
            x, y, _ = (t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in views(number))
            keys = moco.encode_keys(y)
            loss, _ = moco.loss(run(x), keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moco.momentum_update(run, MOMENTUM)
            moco.enqueue(keys)
            result.append(loss.item())
        return result

    np.testing.assert_allclose(losses(True), losses(False), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_waits_for_nothing(dtype: torch.dtype) -> None:
    """All three mechanisms, with shuffle and split batch norm: not one synchronisation of host and device."""
    encoder = split_batchnorm(small_encoder(), 4).cuda().to(memory_format=torch.channels_last)
    moco = MoCo(encoder, dim=DIM, queue_size=QUEUE, temperature=TEMPERATURE, bn_groups=4).cuda()
    end_to_end = EndToEnd(encoder, temperature=TEMPERATURE)
    bank = MemoryBank(SAMPLES, dim=DIM, num_negatives=24, temperature=TEMPERATURE, device="cuda")
    x, y, ids = (t.cuda() for t in views(0))
    x, y = (t.to(dtype).to(memory_format=torch.channels_last) for t in (x, y))

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=dtype):
            shuffled = moco.shuffle(y)
            q = encoder(x)
            keys = moco.encode_keys(shuffled)
            others = end_to_end.encode_keys(y, encoder)
        loss = moco.loss(q, keys)[0] + end_to_end.loss(q, others)[0] + bank.loss(q, ids)[0]
        loss.backward()
        moco.momentum_update(encoder, MOMENTUM)
        moco.enqueue(keys)
        bank.update(q, ids)
        return loss.detach()

    step()  # libraries choose their algorithms
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite() and int(moco.queue_filled) == 2 * BATCH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_size": 0}, "must be above 0"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"bn_groups": 4}, "call split_batchnorm"),
    ],
)
def test_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCo(small_encoder(), **({"dim": DIM, "queue_size": 8, "temperature": 0.2} | options))  # type: ignore[arg-type]


def test_momentum_update_of_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        queue_of(5).momentum_update(nn.Linear(2, 2), 0.9)


def test_parameters_in_16_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="keep them in float32"):
        MoCo(small_encoder().bfloat16(), dim=DIM, queue_size=8, temperature=0.2)
