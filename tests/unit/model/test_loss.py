"""The chunked loss against a brute force that holds every logit, in float64."""

import pytest
import torch
from torch import Tensor

from eagle3_ray.model.layout import build_layout
from eagle3_ray.model.loss import TargetHead, compare_with_targets, sum_matches

STEPS, TARGETS, HIDDEN, VOCAB = 3, 11, 6, 20


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    is_valid = torch.rand(STEPS, TARGETS, generator=generator) < 0.7
    return (
        normal(STEPS, TARGETS, HIDDEN).requires_grad_(),
        normal(VOCAB, HIDDEN).requires_grad_(),
        normal(TARGETS, HIDDEN),
        normal(VOCAB, HIDDEN),
        is_valid,
        torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64),
    )


def brute_force(
    states: Tensor, head: Tensor, target_states: Tensor, target_head: Tensor, cap: float | None = None
) -> Tensor:
    """KL [P, N] by torch's own."""
    logits = target_states @ target_head.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    target = logits.log_softmax(-1).expand(STEPS, -1, -1)
    draft = (states @ head.T).log_softmax(-1)
    return torch.nn.functional.kl_div(draft, target, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk_elements", [1, STEPS * VOCAB * 4, 2**24])
def test_loss_and_gradients_equal_the_brute_force(
    chunk_elements: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_ray.model.loss.CHUNK_ELEMENTS", chunk_elements)
    states, head, target_states, target_head, is_valid, weights = random_case()
    kl = brute_force(states, head, target_states, target_head, cap) * is_valid
    expected = (kl.sum(1) * weights).sum()
    loss, loss_sums, _ = compare_with_targets(
        states, head, target_states, target_head, is_valid, weights, target_logit_cap=cap
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_sums, kl.sum(1), rtol=1e-12, atol=0)
    expected_grads = torch.autograd.grad(3 * expected, (states, head))
    for found, wanted in zip(torch.autograd.grad(3 * loss, (states, head)), expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("losses", [(("kl", 1.0),), (("ce", 0.1), ("tv", 0.9))], ids=["kl", "ce+tv"])
def test_a_frozen_head_gets_no_gradient_and_the_states_the_same(losses: tuple[tuple[str, float], ...]) -> None:
    states, head, target_states, target_head, is_valid, weights = random_case()
    kept = []
    for given in (head, head.detach()):
        loss, _, _ = compare_with_targets(states, given, target_states, target_head, is_valid, weights, losses)
        assert loss.grad_fn is not None
        kept.append(loss.grad_fn.saved_tensors)  # type: ignore[attr-defined]  # of a Function in Python
        (grad,) = torch.autograd.grad(loss, states)
        assert torch.equal(grad, kept[0][0])
    assert kept[0][1].shape == head.shape and kept[1][1] is None


def test_no_gradient_is_made_when_none_is_wanted() -> None:
    with torch.no_grad():
        loss, _, _ = compare_with_targets(*random_case())
    assert not loss.requires_grad


def test_bf16_states_are_compared_by_an_fp32_softmax() -> None:
    states, head, target_states, target_head, is_valid, weights = random_case(torch.bfloat16)
    logits = (states @ head.T).float()
    target = (target_states @ target_head.T).float().log_softmax(-1)
    expected = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
    _, loss_sums, _ = compare_with_targets(states, head, target_states, target_head, is_valid, weights.float())
    torch.testing.assert_close(loss_sums, (expected * is_valid).sum(1).double(), rtol=1e-5, atol=1e-5)  # order of sums


def test_v1_states_are_normed_and_v0_states_are_left_alone() -> None:
    y = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2.0, HIDDEN)
    normed = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(TargetHead(torch.empty(0), weight, 1e-5).project(y), normed)
    assert TargetHead(torch.empty(0), None, 1e-5).project(normed) is normed


@pytest.mark.parametrize("seed", range(4))
def test_prefix_sums_follow_each_index_through_its_own_targets(seed: int) -> None:
    """Right so far belongs to an index: step k of index i speaks of target i+k, not of target i."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.tensor([0] * 7 + [1] * 5)
    mask = torch.rand(12, generator=generator) < 0.7
    layout = build_layout(documents, mask, 12, STEPS)
    is_match = torch.rand(STEPS, len(layout.targets), generator=generator) < 0.6
    right: dict[tuple[int, int], bool] = {}
    for step in range(STEPS):
        for n in range(len(layout.targets)):
            if layout.is_valid[step, n]:
                right[step, int(layout.targets[n]) - step] = bool(is_match[step, n])
    expected = []
    for step in range(STEPS):
        chains = [i for i in range(12) if all((j, i) in right for j in range(step + 1))]
        expected.append(
            [
                sum(1 for j, _ in right if j == step),
                sum(hit for (j, _), hit in right.items() if j == step),
                sum(all(right[j, i] for j in range(step + 1)) for i in chains),
                len(chains),
                sum(all(right[j, i] for j in range(step)) for i in chains),
            ]
        )
    found = sum_matches(torch.zeros(STEPS, dtype=torch.float64), is_match, layout)[1:].T
    assert found.tolist() == expected
