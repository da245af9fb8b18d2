"""The schedule against its picture, and the optimizer's step against torch's own."""

import pytest

from eagle3_ray.training.optim import learning_rate, warmup_steps


def test_the_rate_rises_linearly_then_falls_to_one_share_above_zero() -> None:
    rates = [learning_rate(step, 10, 2, 1.0) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_warm_up_of_zero_begins_at_the_peak() -> None:
    assert warmup_steps(1000, 0.0) == 0
    assert learning_rate(0, 1000, 0, 3e-4) == 3e-4


def test_one_percent_of_few_steps_is_still_a_step() -> None:
    assert [warmup_steps(total, 0.01) for total in (1, 50, 100, 101, 1000)] == [1, 1, 1, 2, 10]


def test_every_update_has_a_positive_rate_however_short_the_run() -> None:
    for total in range(1, 30):
        for frac in (0.0, 0.01, 0.5, 0.99):
            rates = [learning_rate(s, total, warmup_steps(total, frac), 1.0) for s in range(total)]
            assert min(rates) > 0 and max(rates) <= 1.0, (total, frac)
