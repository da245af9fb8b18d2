"""The loss: forward KL from the verifier's distribution to the draft's, over the draft vocabulary.

Logits of a bin are never held. Supervised targets go through in chunks; the target distribution of a row is
computed once and compared with all P steps; and because each position's weight is known beforehand, the
gradients with respect to the hidden states and the head are formed on the spot, in the forward pass.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_ray.model.layout import TttLayout

# Rows of the sums a bin reports, each per TTT step k.
SUM_NAMES = (
    "loss_sum",  # KL in nats, over valid targets
    "count",  # valid targets
    "correct",  # draft's argmax is the verifier's
    "prefix_right",  # indexes right in all of steps 0..k
    "prefix_count",  # indexes whose targets of steps 0..k all count
    "cond_count",  # those among them that were right in steps 0..k-1
)

# Elements of one fp32 logits chunk [P, chunk, V]: 64 MiB each, and a handful live at a time.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class TargetHead:
    """Frozen part of the verifier that turns its last hidden state into logits of the draft vocabulary.

    Attributes:
        weight: [V, H] lm_head rows of the kept ids, compute dtype.
        norm_weight: [H] final norm, or None if the states on disk are already normed (v0).
        eps: The norm's epsilon.
    """

    weight: Tensor
    norm_weight: Tensor | None
    eps: float

    def project(self, last_state: Tensor) -> Tensor:
        """Return what lm_head reads: [N, H] -> [N, H], normed."""
        if self.norm_weight is None:
            return last_state
        return nn.functional.rms_norm(last_state, self.norm_weight.shape, self.norm_weight, self.eps)


def compare_with_targets(
    states_PNH: Tensor,
    head_weight: Tensor,
    target_states: Tensor,
    target_weight: Tensor,
    is_valid: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare every step's logits with their targets.

    Args:
        states_PNH: [P, N, H] normed hidden states of the index that predicts target n in step k.
        head_weight: [V, H] the draft's lm_head.
        target_states: [N, H] normed last states of the verifier.
        target_weight: [V, H] frozen head of the verifier over the draft vocabulary.
        is_valid: [P, N] bool; other positions count nothing.
        weights: [P] weight of a position of step k in the loss.

    Returns:
        loss (scalar, differentiable in the first two arguments), loss_sums [P] float64 in nats and
        unweighted, is_match [P, N] bool.
    """
    needs_grad = torch.is_grad_enabled() and (states_PNH.requires_grad or head_weight.requires_grad)
    loss, loss_sums, is_match = _ChunkedForwardKl.apply(
        states_PNH, head_weight, target_states, target_weight, is_valid, weights, needs_grad
    )
    return loss, loss_sums, is_match


class _ChunkedForwardKl(torch.autograd.Function):
    """sum_k weights[k] * sum_n is_valid[k, n] * KL(target_n || draft_kn), with gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PNH: Tensor,
        head_weight: Tensor,
        target_states: Tensor,
        target_weight: Tensor,
        is_valid: Tensor,
        weights: Tensor,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_steps, num_targets, _ = states_PNH.shape
        vocab_size, dtype = head_weight.shape[0], states_PNH.dtype
        accumulate = torch.promote_types(dtype, torch.float32)
        grad_states = torch.empty_like(states_PNH) if needs_grad else None
        grad_head = torch.zeros_like(head_weight, dtype=accumulate) if needs_grad else None
        kl_PN = states_PNH.new_empty(num_steps, num_targets, dtype=accumulate)
        is_match = torch.empty_like(is_valid)
        # A position's weight is put on H numbers of its gradients rather than on V.
        scale_PN1 = (is_valid * weights.unsqueeze(1)).unsqueeze(-1).to(dtype)
        chunk = min(num_targets, max(1, CHUNK_ELEMENTS // (num_steps * vocab_size)))
        # The same memory for every chunk: on a CPU fresh pages cost more than the arithmetic on them.
        rounded = head_weight.new_empty(num_steps * chunk * vocab_size, dtype=dtype)
        exact = rounded if dtype == accumulate else torch.empty_like(rounded, dtype=accumulate)
        probs = torch.empty_like(exact[: chunk * vocab_size])
        for start in range(0, num_targets, chunk):
            part = slice(start, min(start + chunk, num_targets))
            size = part.stop - start
            shape = (num_steps, size, vocab_size)
            rounded_PCV, exact_PCV = (buffer[: math.prod(shape)].view(shape) for buffer in (rounded, exact))
            target_logits_CV = _project(target_states[part], target_weight, rounded_PCV[0], exact_PCV[0])
            target_argmax_C, target_lse_C, target_probs_CV = _softmax(
                target_logits_CV, out=probs[: size * vocab_size].view(size, vocab_size)
            )
            # KL = sum p log p - sum p log q, each by its logits and their log-sum-exp: no tensor of logarithms.
            kl_PN[:, part] = _dot(target_logits_CV.unsqueeze(0), target_probs_CV) - target_lse_C
            states_MH = states_PNH[:, part].flatten(0, 1)
            logits_PCV = _project(states_MH, head_weight, rounded_PCV.flatten(0, 1), exact_PCV.flatten(0, 1)).view(
                shape
            )
            kl_PN[:, part] -= _dot(logits_PCV, target_probs_CV)
            argmax_PC, lse_PC, probs_PCV = _softmax(logits_PCV, out=logits_PCV)
            kl_PN[:, part] += lse_PC
            is_match[:, part] = argmax_PC == target_argmax_C
            if grad_states is not None and grad_head is not None:
                torch.sub(probs_PCV, target_probs_CV, out=rounded_PCV)
                grad_logits_MV, scale_M1 = rounded_PCV.flatten(0, 1), scale_PN1[:, part].flatten(0, 1)
                grad_states[:, part] = ((grad_logits_MV @ head_weight) * scale_M1).unflatten(0, shape[:2])
                _add_product(grad_head, grad_logits_MV.T, states_MH * scale_M1)
        loss_sums = torch.where(is_valid, kl_PN, 0).sum(1, dtype=torch.float64)
        if grad_states is not None and grad_head is not None:
            ctx.save_for_backward(grad_states, grad_head.to(head_weight.dtype))
        ctx.mark_non_differentiable(loss_sums, is_match)
        return (loss_sums * weights).sum().to(accumulate), loss_sums, is_match

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grad_loss, grad_head * grad_loss, None, None, None, None, None


def _project(states_MH: Tensor, weight_VH: Tensor, rounded_MV: Tensor, exact_MV: Tensor) -> Tensor:
    """Write logits to `rounded_MV`, and return them in at least fp32, in `exact_MV` (which may be the same memory)."""
    torch.mm(states_MH, weight_VH.T, out=rounded_MV)
    return rounded_MV if rounded_MV.dtype == exact_MV.dtype else exact_MV.copy_(rounded_MV)


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return argmax [...], log-sum-exp [...] and softmax [..., V] of logits [..., V], the last in `out`."""
    peak, argmax = logits.max(-1)
    torch.softmax(logits, -1, out=out)
    # The largest probability, at least 1/V, is exp(peak - log-sum-exp).
    return argmax, peak - out.gather(-1, argmax.unsqueeze(-1)).squeeze(-1).log(), out


def _dot(logits_PCV: Tensor, probs_CV: Tensor) -> Tensor:
    """[P, C]: sum of each row of the logits, weighted by that target's probabilities."""
    return (logits_PCV.movedim(0, 1) @ probs_CV.unsqueeze(-1)).squeeze(-1).T


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a total of at least fp32, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def sum_matches(loss_sums: Tensor, is_match: Tensor, layout: TttLayout) -> Tensor:
    """Return [6, P] float64 sums in the order of `SUM_NAMES`.

    "Right so far" belongs to an index: step k of index i speaks of target i+k, so matches are first put back
    from targets to rows.
    """
    num_steps = is_match.shape[0]
    is_match = is_match & layout.is_valid
    # One extra column takes what belongs to no row.
    row = torch.where(layout.is_valid, layout.row_of_target, layout.rows.numel())
    empty = torch.zeros(num_steps, layout.rows.numel() + 1, dtype=torch.bool, device=is_match.device)
    match_PR = empty.scatter(1, row, is_match)[:, :-1]
    valid_PR = empty.scatter(1, row, layout.is_valid)[:, :-1]
    prefix_right = match_PR.cumprod(0)
    prefix_valid = valid_PR.cumprod(0)
    was_right = torch.cat((prefix_valid[:1], prefix_right[:-1]))
    return torch.stack(
        [
            loss_sums,
            layout.is_valid.sum(1).double(),
            is_match.sum(1).double(),
            prefix_right.sum(1).double(),
            prefix_valid.sum(1).double(),
            (was_right * prefix_valid).sum(1).double(),
        ]
    )
