"""What a rank remembers of the orders that its steps carried."""

from types import SimpleNamespace
from typing import Any

from eagle3_ray.training.outcome import learn_outcome
from eagle3_ray.training.rank import PendingStep
from eagle3_ray.training.step import StepOutcome, Wishes


def test_a_wish_to_save_is_kept_until_it_is_granted_though_the_next_step_has_none() -> None:
    """A preemption notice is wished for in one step alone, and the step after it may be learnt of before the save."""
    rank: Any = SimpleNamespace(pending=None, is_stopping=False, is_saving=False, grad_norm=0.0)
    for step, wishes in enumerate([Wishes(), Wishes(save=True), Wishes()]):
        outcome = StepOutcome(1.0, wishes)
        result: Any = SimpleNamespace(wait=lambda outcome=outcome: outcome)
        rank.pending = PendingStep(step, result)
        learn_outcome(rank)
        assert rank.is_saving == (step > 0) and not rank.is_stopping
