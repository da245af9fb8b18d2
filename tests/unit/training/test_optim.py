"""The schedule against its picture, and the optimizer's step against torch's own."""

import pytest
import torch
from torch import nn

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.training.optim import build_optimizer, learning_rate, scheduled_rate, warmup_steps

SCHEDULES = ("linear", "cosine", "none", "constant-then-decay")


def rates_of(num_steps: int, **settings: object) -> list[float]:
    chosen = OptimizerSettings.model_validate({"lr": 1.0, **settings})
    return [scheduled_rate(chosen, step, num_steps) for step in range(num_steps)]


def test_the_rate_rises_linearly_then_falls_to_one_share_above_zero() -> None:
    rates = [learning_rate(step, 10, 2, 1.0) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_warm_up_of_zero_begins_at_the_peak() -> None:
    assert warmup_steps(1000, 0.0) == 0
    assert learning_rate(0, 1000, 0, 3e-4) == 3e-4


def test_one_percent_of_few_steps_is_still_a_step() -> None:
    assert [warmup_steps(total, 0.01) for total in (1, 50, 100, 101, 1000)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_update_has_a_positive_rate_however_short_the_run(schedule: str) -> None:
    for total in range(1, 30):
        for frac in (0.0, 0.01, 0.5, 0.99):
            rates = rates_of(total, warmup_frac=frac, lr_schedule=schedule, decay_frac=0.3)
            assert min(rates) > 0 and max(rates) <= 1.0, (total, frac)


def test_cosine_is_torchs_own() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates_of(45, warmup_steps=5, lr_schedule="cosine")[5:] == pytest.approx(expected, rel=1e-9)


def test_a_constant_rate_stays_and_one_that_decays_at_last_falls_linearly() -> None:
    assert rates_of(10, warmup_steps=2, lr_schedule="none") == [0.5] + [1.0] * 9
    falling = rates_of(10, warmup_steps=0, lr_schedule="constant-then-decay", decay_frac=0.4)
    assert falling == pytest.approx([1.0] * 6 + [1.0, 0.75, 0.5, 0.25])
    whole = rates_of(10, warmup_steps=0, lr_schedule="constant-then-decay", decay_frac=1)
    assert whole == pytest.approx(rates_of(10, warmup_steps=0))
    # A warm-up that reaches into the decay: no sudden drop between the two.
    for decay_frac in (0.8, 1):
        both = rates_of(10, warmup_steps=6, lr_schedule="constant-then-decay", decay_frac=decay_frac)
        assert both == pytest.approx(rates_of(10, warmup_steps=6))


def test_a_warm_up_in_steps_wins_over_a_share_and_may_be_longer_than_the_run() -> None:
    assert rates_of(10, warmup_frac=0.5, warmup_steps=2) == [learning_rate(step, 10, 2, 1.0) for step in range(10)]
    assert rates_of(10, warmup_frac=0.5, warmup_steps=0)[0] == 1.0
    assert rates_of(4, warmup_steps=8) == [1 / 8, 2 / 8, 3 / 8, 4 / 8]


def test_betas_are_those_of_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    weight = nn.Parameter(start.clone())
    optimizer = build_optimizer([weight], weight_decay=0.1, betas=(0.8, 0.95))
    expected, mean, square = start.double(), torch.zeros(5).double(), torch.zeros(5).double()
    for number, grad in enumerate(grads, start=1):
        optimizer.param_groups[0]["lr"] = 0.01
        weight.grad = grad.clone()
        optimizer.step()
        mean, square = 0.8 * mean + 0.2 * grad, 0.95 * square + 0.05 * grad**2
        step = (mean / (1 - 0.8**number)) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * step
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)
