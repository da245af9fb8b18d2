"""A moving average of the trained weights, which is validated and served in their place.

average = decay * average + (1 - decay) * weights        after every update that was made
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.training.sharding import local_part, trained_state


class Ema:
    """The average of a draft's trained weights, which begins as they are.

    Attributes:
        weights: By name, fp32, dealt out over the ranks as the draft's own.
    """

    def __init__(self, draft: Eagle3Draft, decay: float) -> None:
        """Copy the weights.

        Args:
            draft: This rank's part of it.
            decay: In (0, 1): how much of the average an update keeps.
        """
        self._draft, self._decay = draft, decay
        self.weights = {name: weight.clone() for name, weight in trained_state(draft).items()}

    @torch.no_grad()
    def update(self, is_made: Tensor) -> None:
        """Move towards the weights after an update, unless it was left out.

        Args:
            is_made: Scalar bool, on the device, where it stays.
        """
        for name, weight in trained_state(self._draft).items():
            average = local_part(self.weights[name])
            moved = average.lerp(local_part(weight), 1 - self._decay)
            average.copy_(torch.where(is_made, moved, average))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the draft compute with the average for the length of a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # A state is of shards: for it FSDP drops the weights it has gathered, and gathers them anew in the next pass.
        for name, weight in trained_state(self._draft).items():
            average, own = local_part(self.weights[name]), local_part(weight)
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def build_ema(draft: Eagle3Draft, decay: float) -> Ema | None:
    """Return the average of a draft's weights; none for a decay of 0."""
    return Ema(draft, decay) if decay > 0 else None
