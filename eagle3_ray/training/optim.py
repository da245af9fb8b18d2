"""The optimizer and its schedule. The rate is a function of the step alone, so resuming has nothing to restore."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW (betas 0.9/0.999) over the trained parameters; the rate is set before every update."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=weight_decay, fused=True)


def warmup_steps(total_steps: int, warmup_frac: float) -> int:
    """Return how many steps the rate rises: the share of all steps, rounded up; 0 if the share is 0."""
    return math.ceil(total_steps * warmup_frac)


def learning_rate(step: int, total_steps: int, num_warmup_steps: int, peak: float) -> float:
    """Return the rate of update `step` (0-based): linear rise to `peak`, then linear decay towards 0 at `total_steps`.

    The first update of a warm-up already moves (rate peak/n, not 0), and the last update still does.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    return peak * (total_steps - step) / (total_steps - num_warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
