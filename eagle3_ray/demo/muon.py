"""Muon for small matrices: momentum, then the nearest orthogonal matrix as the update.

Matrices of one shape go through as a batch, in float32. (torch.optim.Muon takes one matrix at a time and computes
in bfloat16, which is slow on CPUs without such instructions.)

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic whose iteration drives singular values towards 1, fast rather than exactly: they end in about 0.7..1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


class Muon:
    """Updates matrices by their orthogonalised momentum."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups = list(by_shape.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix from its gradient.

        Args:
            rate: size of the update: about the root mean square of what it does to a vector.
        """
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            gradients = torch.stack([_gradient(matrix) for matrix in group])
            momentum.lerp_(gradients, 1 - self._momentum)
            updates = orthogonalize(gradients.lerp(momentum, self._momentum))
            rows, columns = group[0].shape
            scale = rate * max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(group, updates, strict=True):
                matrix.add_(update, alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about U V^T of each matrix U S V^T: [N, rows, columns] float32, singular values in about 0.7..1.2."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def _gradient(matrix: nn.Parameter) -> Tensor:
    assert matrix.grad is not None
    return matrix.grad
