"""The optimizer and its schedule. The rate is a function of the step alone, so resuming has nothing to restore."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eagle3_ray.training.muon import MuonWithAdamW

if TYPE_CHECKING:  # a benchmark of the step needs torch and numpy alone
    from eagle3_ray.config import OptimizerSettings


def build_draft_optimizer(draft: nn.Module, settings: "OptimizerSettings") -> torch.optim.Optimizer:
    """Return the optimizer asked for, over a draft's trained parameters; the rate is set before every update."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optimizer == "adamw":
        return build_optimizer(draft.parameters(), settings.weight_decay, betas)
    trained = [(name, weight) for name, weight in draft.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in trained if suits_muon(name, weight)]
    others = [weight for name, weight in trained if not suits_muon(name, weight)]
    return MuonWithAdamW(matrices, others, settings.weight_decay, betas)


def suits_muon(name: str, weight: Tensor) -> bool:
    """Tell whether a draft's weight of this name is a matrix from state to state, and no norm, embedding or head."""
    return weight.ndim == 2 and name.startswith(("fc.", "layers."))


def build_optimizer(
    parameters: Iterable[nn.Parameter], weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters; the rate is set before every update."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)


def warmup_steps(total_steps: int, warmup_frac: float) -> int:
    """Return how many steps the rate rises: the share of all steps, rounded up; 0 if the share is 0."""
    return math.ceil(total_steps * warmup_frac)


def scheduled_rate(settings: "OptimizerSettings", step: int, total_steps: int) -> float:
    """Return the rate of update `step` (0-based) of a run with these settings. As `learning_rate`."""
    num_warmup = settings.warmup_steps
    if num_warmup is None:
        num_warmup = warmup_steps(total_steps, settings.warmup_frac)
    num_decay = math.ceil(total_steps * settings.decay_frac)
    return learning_rate(step, total_steps, num_warmup, settings.lr, settings.lr_schedule, num_decay)


def learning_rate(
    step: int,
    total_steps: int,
    num_warmup_steps: int,
    peak: float,
    schedule: str = "linear",
    num_decay_steps: int = 1,
) -> float:
    """Return the rate of update `step` (0-based): linear rise to `peak`, then down to 0 at `total_steps`, or not.

    The first update of a warm-up already moves (rate peak/n, not 0), and the last update still does. A warm-up longer
    than the run is still rising at its end.

    Args:
        step: In [0, total_steps).
        total_steps: Of the whole run.
        num_warmup_steps: Over which it rises.
        peak: The largest rate.
        schedule: `linear`, `cosine`, `none` or `constant-then-decay`.
        num_decay_steps: Over which the last of them falls.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    num_left = total_steps - step
    if schedule == "none":
        return peak
    if schedule == "constant-then-decay":
        # A warm-up that reaches into the decay ends at the peak all the same; the decay is what is left.
        return peak * min(1.0, num_left / min(num_decay_steps, total_steps - num_warmup_steps))
    if schedule == "cosine":
        return peak * (1 - math.cos(math.pi * num_left / (total_steps - num_warmup_steps))) / 2
    assert schedule == "linear", schedule
    return peak * num_left / (total_steps - num_warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
