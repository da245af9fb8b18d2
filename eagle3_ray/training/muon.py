"""Muon for matrices and AdamW for all else, as one optimizer.

Muon's update of a matrix is its momentum made orthogonal, which takes the whole matrix: ranks that hold a shard each
gather it, all make the same update, and each adds its own part.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); J. Liu et al., "Muon is
Scalable for LLM Training" (2025), for the size of the update, which lets it share AdamW's rate and weight decay.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from eagle3_ray.training.sharding import gather_whole, local_part, own_part

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Updates matrices by Muon, other weights by AdamW; its first group of weights is Muon's.

    Attributes:
        found_inf: Scalar; where it is not 0, a step changes nothing, as in torch's fused AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._adamw = torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        self.found_inf: Tensor | None = None
        of_muon = {"params": list(matrices), "weight_decay": weight_decay, "momentum": MOMENTUM}
        super().__init__([of_muon, *self._adamw.param_groups], {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update, or none. collective: every rank calls it."""
        assert closure is None
        of_muon, *of_adamw = self.param_groups
        for weight in of_muon["params"]:
            if weight.grad is not None:
                self._update(weight, of_muon["lr"], of_muon["weight_decay"], of_muon["momentum"])
        # Both are other objects once a state was loaded.
        self._adamw.param_groups, self._adamw.state = of_adamw, self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def _update(self, weight: nn.Parameter, rate: float, weight_decay: float, keep: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        assert weight.grad is not None
        own, momentum, grad = map(local_part, (weight, state["momentum_buffer"], weight.grad))
        new_momentum = momentum.lerp(grad, 1 - keep)
        change = own_part(orthogonal_change(gather_whole(grad.lerp(new_momentum, keep), weight), rate), weight)
        _replace(momentum, new_momentum, self.found_inf)
        _replace(own, own * (1 - rate * weight_decay) + change, self.found_inf)


def orthogonal_change(direction: Tensor, rate: float) -> Tensor:
    """Return what Muon adds to a matrix: [rows, columns] float32, of AdamW's root mean square at the same rate.

    It is torch's own, without momentum and without decay, on a matrix of zeros.

    Args:
        direction: [rows, columns] float32, the gradient with its momentum; may hold NaN, and the change then does.
        rate: The learning rate.
    """
    change = nn.Parameter(torch.zeros_like(direction))
    change.grad = direction
    torch.optim.Muon(
        [change], lr=rate, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return change.detach()


def _replace(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """Put new values in the place of old ones, unless the device knows better."""
    old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))
