import pytest
import torch
from torch import nn

from eagle3_ray.demo.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_update_has_the_directions_of_the_svd_and_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    in_svd_basis = u.mT @ orthogonalize(matrices) @ vt.mT
    singular = in_svd_basis.diagonal(dim1=1, dim2=2)
    assert singular.min() > 0.3 and singular.max() < 1.3  # five iterations bring small values up, not fully
    # float32 products of five iterations
    torch.testing.assert_close(in_svd_basis, torch.diag_embed(singular), atol=1e-4, rtol=0)


def test_matrices_of_one_shape_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(2)]

    def updated(numbers: list[int]) -> list[torch.Tensor]:
        matrices = [nn.Parameter(torch.zeros(6, 4)) for _ in numbers]
        for matrix, number in zip(matrices, numbers, strict=True):
            matrix.grad = gradients[number]
        Muon(matrices).step(rate=0.1)
        return [matrix.detach() for matrix in matrices]

    together = updated([0, 1])
    for number in (0, 1):
        torch.testing.assert_close(together[number], updated([number])[0])


def test_first_update_is_the_orthogonalised_gradient_times_the_rate() -> None:
    gradient = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(2))
    matrix = nn.Parameter(torch.zeros(8, 4))
    matrix.grad = gradient[0]
    Muon([matrix]).step(rate=0.1)
    expected = -0.1 * 2**0.5 * orthogonalize(gradient)[0]  # momentum scales the gradient, which does not matter
    torch.testing.assert_close(matrix.detach(), expected, atol=1e-5, rtol=1e-4)
