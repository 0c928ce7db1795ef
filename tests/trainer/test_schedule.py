"""Learning rates against the reference code's own formulas, and IG-1B's in steps."""

import math

import pytest

from trainer.schedule import key_momentum, learning_rate


def reference(epoch: int, lr: float, epochs: int, cos: bool, milestones: tuple[int, ...]) -> float:
    """`adjust_learning_rate` of the reference code, which is called once an epoch."""
    if cos:
        return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
    for milestone in milestones:
        lr *= 0.1 if epoch >= milestone else 1.0
    return lr


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_every_step_of_every_epoch_as_in_the_reference(schedule: str) -> None:
    for epoch in range(200):
        want = reference(epoch, 0.03, 200, schedule == "cosine", (120, 160))
        for step in (epoch * 5004, epoch * 5004 + 2500, epoch * 5004 + 5003):
            got = learning_rate(
                step, lr=0.03, schedule=schedule, steps_per_epoch=5004, epochs=200, milestones=(120, 160)
            )
            assert got == pytest.approx(want, rel=1e-12)


def test_the_cifar_demo_counts_epochs_from_1() -> None:
    """`for epoch in range(1, epochs + 1)` around its adjust_learning_rate: the last epoch's rate is 0."""
    for number in range(1, 201):
        want = reference(number, 0.06, 200, True, ())
        for step in ((number - 1) * 97, (number - 1) * 97 + 96):
            got = learning_rate(step, lr=0.06, schedule="cosine_from_1", steps_per_epoch=97, epochs=200)
            assert got == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_ig1b_decays_every_62500_steps() -> None:
    def rate(step: int) -> float:
        return learning_rate(
            step, lr=0.12, schedule="exponential", steps_per_epoch=918_000, decay=0.9, decay_steps=62_500
        )

    assert rate(0) == rate(62_499) == 0.12
    assert rate(62_500) == pytest.approx(0.12 * 0.9)
    assert rate(1_249_999) == pytest.approx(0.12 * 0.9**19)  # 0.0162, as the last of 1.25M


def test_warm_up_is_a_line_to_one() -> None:
    rates = [
        learning_rate(step, lr=1.0, schedule="constant", steps_per_epoch=10, warmup_epochs=2) for step in range(25)
    ]
    assert rates[:3] == pytest.approx([0.05, 0.10, 0.15])
    assert rates[19:] == [1.0] * 6


def test_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of step, cosine"):
        learning_rate(0, lr=1.0, schedule="linear", steps_per_epoch=1)


def test_momentum_is_constant_or_rises_to_one() -> None:
    def momentum(step: int, schedule: str) -> float:
        return key_momentum(step, momentum=0.99, schedule=schedule, total_steps=1000)

    assert [momentum(step, "constant") for step in (0, 500, 999)] == [0.99] * 3
    assert momentum(0, "cosine") == pytest.approx(0.99)
    assert momentum(500, "cosine") == pytest.approx(0.995)
    assert momentum(1000, "cosine") == pytest.approx(1.0)
    with pytest.raises(ValueError, match="none of constant, cosine"):
        momentum(0, "linear")
