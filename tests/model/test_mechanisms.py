"""End-to-end and memory bank against the plainest way to write them."""

import math

import pytest
import torch
import torch.nn.functional as F
from moco_runs import BATCH, DIM, QUEUE, SAMPLES, TEMPERATURE, small_encoder, train, views

from model.batchnorm import split_batchnorm
from model.mechanisms import EndToEnd, MemoryBank


def test_end_to_end_is_the_softmax_over_the_batch() -> None:
    """Positives on the diagonal of q @ k.T, gradients into both sides."""
    encoder = small_encoder(batchnorm=False)
    mechanism = EndToEnd(encoder, temperature=TEMPERATURE)
    x, y, _ = views(0)
    loss, _ = mechanism.loss(encoder(x), mechanism.encode_keys(y, encoder))
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    logits = F.normalize(encoder(x), dim=1) @ F.normalize(encoder(y), dim=1).T / TEMPERATURE
    expected = F.cross_entropy(logits, torch.arange(BATCH))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(encoder.parameters())))


def test_end_to_end_keys_have_a_gradient_through_the_shuffle() -> None:
    encoder = split_batchnorm(small_encoder(), 4)
    mechanism = EndToEnd(encoder, temperature=TEMPERATURE)
    x, y, _ = views(0)
    keys = mechanism.encode_keys(y, encoder)
    keys.retain_grad()
    mechanism.loss(encoder(x).detach(), keys)[0].backward()
    assert keys.grad is not None and keys.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters() if p.dim() > 1)


def bank_of(samples: int = SAMPLES, **options: float) -> MemoryBank:
    return MemoryBank(samples, dim=DIM, num_negatives=24, temperature=TEMPERATURE, **options)  # type: ignore[arg-type]


def test_memory_bank_loss() -> None:
    """The positive is the sample's entry, the negatives are the entries drawn but for the sample's own."""
    bank = bank_of()
    ids = torch.tensor([3, 17, 39])
    q = torch.randn(3, DIM)
    loss, _ = bank.loss(q, ids)
    rows, expected = F.normalize(q, dim=1), []
    for row, sample in zip(rows, ids.tolist()):
        negatives = [bank.bank[j] @ row for j in bank._draw().tolist() if j != sample]
        logits = torch.stack([bank.bank[sample] @ row, *negatives]) / TEMPERATURE
        expected.append(-logits.log_softmax(dim=0)[0])
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_memory_bank_update() -> None:
    """entry = normalise(m * entry + (1 - m) * q) for the batch's samples; an id twice counts once, nan not at all."""
    bank = bank_of(momentum=0.25)
    before = bank.bank.clone()
    q = 5 * torch.randn(5, DIM)
    q[3, 2] = math.nan
    ids = torch.tensor([4, 30, 4, 11, 7])
    bank.update(q, ids)
    for row in (0, 1, 4):
        mixed = 0.25 * before[ids[row]] + 0.75 * F.normalize(q[row], dim=0)
        torch.testing.assert_close(bank.bank[ids[row]], F.normalize(mixed, dim=0))
    untouched = [i for i in range(SAMPLES) if i not in (4, 30, 7)]
    assert torch.equal(bank.bank[untouched], before[untouched])


def test_memory_bank_moves_to_the_mean_of_both_views() -> None:
    """--symmetric: the second view of an id was dropped."""
    bank = bank_of(momentum=0.25)
    before = bank.bank.clone()
    q, ids = 5 * torch.randn(6, DIM), torch.tensor([4, 30, 7])
    bank.update(q, ids)
    mean = (F.normalize(q[:3], dim=1) + F.normalize(q[3:], dim=1)) / 2
    torch.testing.assert_close(bank.bank[ids], F.normalize(0.25 * before[ids] + 0.75 * mean, dim=1))
    swapped = bank_of(momentum=0.25)
    swapped.update(q.roll(3, dims=0), ids)
    torch.testing.assert_close(swapped.bank, bank.bank)


def test_without_negatives_the_figures_are_numbers() -> None:
    """Only the own sample was drawn, or a batch of one: the mean of no cosines was nan, and nan is no JSON."""
    bank = MemoryBank(1, dim=DIM, num_negatives=3, temperature=TEMPERATURE)
    for loss, stats in (
        bank.loss(torch.randn(2, DIM), torch.zeros(2, dtype=torch.int64)),
        EndToEnd(small_encoder(), temperature=TEMPERATURE).loss(torch.randn(1, DIM), torch.randn(1, DIM)),
    ):
        assert (loss.item(), stats.negative.item(), stats.accuracy.item()) == (0, 0, 1)
        assert stats.positive.isfinite()


def test_memory_bank_s_negative_is_the_mean_cosine_of_the_others() -> None:
    bank = bank_of()
    ids = torch.tensor([3, 17])
    q = torch.randn(2, DIM)
    _, stats = bank.loss(q, ids)
    drawn = bank._draw().tolist()
    cosines = [F.normalize(q[i], dim=0) @ bank.bank[j] for i in range(2) for j in drawn if j != ids[i]]
    torch.testing.assert_close(stats.negative, torch.stack(cosines).mean())


def test_memory_bank_draws_anew_for_each_batch_and_resumes() -> None:
    bank, other = bank_of(seed=1), bank_of(seed=2)
    q, ids = torch.randn(4, DIM), torch.arange(4)
    losses = [bank.loss(q, ids)[0].item() for _ in range(3)]
    assert len(set(losses)) == 3
    other.load_state_dict(bank.state_dict())
    assert other.loss(q, ids)[0] == bank.loss(q, ids)[0]


def test_memory_bank_too_large_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"1,000,000,000 samples x 128 needs 512\.0 GB on every rank.*mechanism moco"):
        MemoryBank(1_000_000_000, dim=128, num_negatives=65536, temperature=0.07)


def test_errors() -> None:
    with pytest.raises(ValueError, match="above 0"):
        EndToEnd(small_encoder(), temperature=0)
    with pytest.raises(ValueError, match="momentum 1"):
        bank_of(momentum=1.0)


@pytest.mark.parametrize(("mechanism", "negatives"), [("moco", QUEUE), ("end_to_end", BATCH - 1), ("memory_bank", 24)])
def test_each_mechanism_learns_to_tell_the_samples_apart(mechanism: str, negatives: int) -> None:
    """The same images again and again: well below ln(1 + negatives), which is chance."""
    losses = train(mechanism, groups=4, steps=60, repeat=4)["losses"]
    assert losses[-8:].mean() < math.log(1 + negatives) - 0.5, losses
