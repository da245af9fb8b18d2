"""Every loss against a few lines of float64 that hold all logits, and its gradient against torch's own."""

import math

import pytest
import torch
from torch import Tensor

from eagle3_ray.config import LOSS_NAMES
from eagle3_ray.model.loss import compare_with_targets
from eagle3_ray.model.losses import FORWARD_KL, LOSSES, Distributions, Losses
from tests.unit.model.test_loss import STEPS, VOCAB, random_case

CASES: list[Losses] = [*(((name, 1.0),) for name in LOSSES), (("ce", 0.1), ("tv", 0.9)), (("kl", 0.5),)]


def test_the_schema_knows_each_loss() -> None:
    assert tuple(LOSSES) == LOSS_NAMES


def brute_force(name: str, z: Tensor, target: Tensor) -> Tensor:
    """One loss [P, N] of draft logits [P, N, V] and the verifier's [N, V]."""
    p, q = target.softmax(-1).expand_as(z), z.softmax(-1)
    accepted = torch.minimum(p, q).sum(-1)
    kl, middle = (p * (p / q).log()).sum(-1), (p + q) / 2
    weight = torch.exp(-3 * accepted.detach())
    return {
        "kl": kl,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2,
        "ce": -q.log().gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1),
        "tv": (p - q).abs().sum(-1) / 2,
        "nla": -accepted.log(),
        "lk": weight * kl + (1 - weight) * (1 - accepted),
    }[name]


@pytest.mark.parametrize("losses", CASES, ids=str)
@pytest.mark.parametrize("chunk_elements", [1, STEPS * VOCAB * 4, 2**24])
def test_loss_and_gradients_equal_the_brute_force(
    losses: Losses, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_ray.model.loss.CHUNK_ELEMENTS", chunk_elements)
    states, head, target_states, target_head, is_valid, weights = random_case()
    logits, target = states @ head.T, target_states @ target_head.T
    each = sum(weight * brute_force(name, logits, target) for name, weight in losses) * is_valid
    assert isinstance(each, Tensor)
    expected = (each.sum(1) * weights).sum()
    loss, loss_sums, _ = compare_with_targets(states, head, target_states, target_head, is_valid, weights, losses)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_sums, each.sum(1), rtol=1e-12, atol=0)
    expected_grads = torch.autograd.grad(3 * expected, (states, head))
    for found, wanted in zip(torch.autograd.grad(3 * loss, (states, head)), expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("losses", CASES, ids=str)
def test_a_bf16_loss_is_that_of_an_fp32_softmax(losses: Losses) -> None:
    states, head, target_states, target_head, is_valid, weights = random_case(torch.bfloat16)
    logits, target = (states @ head.T).double(), (target_states @ target_head.T).double()
    each = sum(weight * brute_force(name, logits, target) for name, weight in losses) * is_valid
    assert isinstance(each, Tensor)
    _, loss_sums, _ = compare_with_targets(states, head, target_states, target_head, is_valid, weights.float(), losses)
    torch.testing.assert_close(loss_sums, each.sum(1).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("losses", CASES, ids=str)
def test_distributions_that_share_nothing_give_finite_gradients(losses: Losses) -> None:
    states = torch.tensor([[[200.0, 0.0]]], requires_grad=True)
    head = torch.eye(2)
    loss, _, _ = compare_with_targets(
        states, head, torch.tensor([[0.0, 200.0]]), head, torch.ones(1, 1, dtype=torch.bool), torch.ones(1), losses
    )
    loss.backward()
    assert math.isfinite(loss.item()) and states.grad is not None and bool(states.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", [1.0, 15.0, 30.0])
def test_an_fp32_gradient_keeps_its_digits_where_the_draft_is_far_off(name: str, distance: float) -> None:
    generator = torch.Generator().manual_seed(5)
    z, target = torch.randn(2, 1, 1, 4000, generator=generator, dtype=torch.float64).unbind(0)
    z[..., :2000] += distance
    target[..., 2000:] += distance
    exact = z.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(brute_force(name, exact, target[0]).sum(), exact)
    p, q = target[0].float(), z.float()
    _, found = LOSSES[name](
        Distributions(p.log_softmax(-1), p.softmax(-1), q.log_softmax(-1), q.softmax(-1), p.argmax(-1))
    )
    # Those of total variation and Jensen-Shannon fade there; nothing divides by what is left of them.
    assert (found.double() - wanted).norm() < 1e-4 * wanted.norm() + 1e-6


@pytest.mark.parametrize("losses", CASES, ids=str)
def test_each_loss_brings_the_draft_to_the_verifier(losses: Losses) -> None:
    states, _, target_states, target_head, is_valid, weights = random_case()
    found = states.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=0.05)
    before = None
    for _ in range(200):
        optimizer.zero_grad()
        loss, _, is_match = compare_with_targets(
            found, target_head, target_states, target_head, is_valid, weights, losses
        )
        before = loss.item() if before is None else before
        loss.backward()
        optimizer.step()
    assert before is not None and loss.item() < before / 2
    assert bool(is_match[is_valid].float().mean() > 0.9)


def test_the_default_is_forward_kl() -> None:
    case = random_case()
    torch.testing.assert_close(compare_with_targets(*case)[1], compare_with_targets(*case, FORWARD_KL)[1])
