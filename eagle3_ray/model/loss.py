"""The loss between the verifier's distribution and the draft's, over the draft vocabulary: forward KL, or another.

Logits of a bin are never held. Supervised targets go through in chunks; the target distribution of a row is
computed once and compared with all P steps; and because each position's weight is known beforehand, the
gradients with respect to the hidden states and the head, unless it is frozen, are formed on the spot, in the forward
pass.
Forward KL needs no logarithm of a distribution, and has a path of its own; `losses` has the others.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_ray.model.layout import TttLayout
from eagle3_ray.model.losses import FORWARD_KL, Distributions, Losses, weighted_sum

# Rows of the sums a bin reports, each per TTT step k.
SUM_NAMES = (
    "loss_sum",  # the loss trained on (KL in nats unless another was chosen), over valid targets
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
    """What the draft learns: the frozen part of the verifier that gives logits of the draft vocabulary, and the loss.

    Attributes:
        weight: [V, H] lm_head rows of the kept ids, compute dtype.
        norm_weight: [H] final norm, or None if the states on disk are already normed (v0).
        eps: The norm's epsilon.
        losses: Names and weights of what is added up to the loss.
        logit_cap: The bound c that logits are pressed under, c * tanh(logits / c); None if they are not.
        unsayable_weight: [W-V, H] lm_head rows of the other ids, if training leaves out the targets where one of
            them is the verifier's first choice; None if it does not, or the draft can say all.
    """

    weight: Tensor
    norm_weight: Tensor | None
    eps: float
    losses: Losses = FORWARD_KL
    logit_cap: float | None = None
    unsayable_weight: Tensor | None = None

    def project(self, last_state: Tensor) -> Tensor:
        """Return what lm_head reads: [N, H] -> [N, H], normed."""
        if self.norm_weight is None:
            return last_state
        return nn.functional.rms_norm(last_state, self.norm_weight.shape, self.norm_weight, self.eps)


def leave_out_unsayable(layout: TttLayout, last_state: Tensor, head: TargetHead) -> TttLayout:
    """Count no target where the verifier's first choice of all its tokens is one that the draft cannot say.

    Its rows and targets stay where they are, so the host need not learn how many are left; where a sayable token ranks
    level with the first of the others, it is the first choice. A cap on the logits keeps their order.

    Args:
        layout: Of a bin, on the device.
        last_state: [T, H] the verifier's last hidden state, in the dtype of the files.
        head: Its head, in the compute dtype.
    """
    if head.unsayable_weight is None:
        return layout
    states = head.project(last_state[layout.targets].to(head.weight.dtype))
    chunk = max(1, CHUNK_ELEMENTS // max(len(head.weight), len(head.unsayable_weight)))
    is_sayable = torch.cat(
        [(part @ head.weight.T).amax(-1) >= (part @ head.unsayable_weight.T).amax(-1) for part in states.split(chunk)]
    )
    is_valid = layout.is_valid & is_sayable
    return replace(layout, is_valid=is_valid, counts=is_valid.sum(1))


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """Press logits under a bound, in place; None changes nothing."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def compare_with_targets(
    states_PNH: Tensor,
    head_weight: Tensor,
    target_states: Tensor,
    target_weight: Tensor,
    is_valid: Tensor,
    weights: Tensor,
    losses: Losses = FORWARD_KL,
    target_logit_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare every step's logits with their targets.

    Args:
        states_PNH: [P, N, H] normed hidden states of the index that predicts target n in step k.
        head_weight: [V, H] the draft's lm_head; no gradient of it is made if it requires none.
        target_states: [N, H] normed last states of the verifier.
        target_weight: [V, H] frozen head of the verifier over the draft vocabulary.
        is_valid: [P, N] bool; other positions count nothing.
        weights: [P] weight of a position of step k in the loss.
        losses: Names and weights of what is added up at a position.
        target_logit_cap: See `TargetHead`.

    Returns:
        loss (scalar, differentiable in the first two arguments), loss_sums [P] float64 and
        unweighted, is_match [P, N] bool.
    """
    needs_grad = torch.is_grad_enabled() and (states_PNH.requires_grad or head_weight.requires_grad)
    loss, loss_sums, is_match = _ChunkedLoss.apply(
        states_PNH, head_weight, target_states, target_weight, is_valid, weights, losses, target_logit_cap, needs_grad
    )
    return loss, loss_sums, is_match


class _ChunkedLoss(torch.autograd.Function):
    """sum_k weights[k] * sum_n is_valid[k, n] * loss(target_n, draft_kn), with gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PNH: Tensor,
        head_weight: Tensor,
        target_states: Tensor,
        target_weight: Tensor,
        is_valid: Tensor,
        weights: Tensor,
        losses: Losses,
        target_logit_cap: float | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_steps, num_targets, _ = states_PNH.shape
        vocab_size, dtype = head_weight.shape[0], states_PNH.dtype
        accumulate = torch.promote_types(dtype, torch.float32)
        grad_states = torch.empty_like(states_PNH) if needs_grad else None
        trains_head = needs_grad and ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(head_weight, dtype=accumulate) if trains_head else None
        compare = _compare_by_kl if losses == FORWARD_KL else functools.partial(_compare_by_others, losses)
        loss_PN = states_PNH.new_empty(num_steps, num_targets, dtype=accumulate)
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
            states_PCH = states_PNH[:, part].contiguous()
            loss_PN[:, part], is_match[:, part] = compare(
                cap_logits(target_logits_CV, target_logit_cap),
                probs[: size * vocab_size].view(size, vocab_size),
                functools.partial(_project, states_PCH, head_weight, rounded_PCV, exact_PCV),
                rounded_PCV if needs_grad else None,
            )
            if grad_states is not None:
                grad_logits_MV, scale_M1 = rounded_PCV.flatten(0, 1), scale_PN1[:, part].flatten(0, 1)
                grad_states[:, part] = ((grad_logits_MV @ head_weight) * scale_M1).unflatten(0, shape[:2])
                if grad_head is not None:
                    _add_product(grad_head, grad_logits_MV.T, states_PCH.flatten(0, 1) * scale_M1)
        loss_sums = torch.where(is_valid, loss_PN, 0).sum(1, dtype=torch.float64)
        ctx.save_for_backward(grad_states, None if grad_head is None else grad_head.to(head_weight.dtype))
        ctx.mark_non_differentiable(loss_sums, is_match)
        return (loss_sums * weights).sum().to(accumulate), loss_sums, is_match

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        grad_head = None if grad_head is None else grad_head * grad_loss
        return grad_states * grad_loss, grad_head, None, None, None, None, None, None, None


def _compare_by_kl(
    target_logits_CV: Tensor, probs_CV: Tensor, project_draft: Callable[[], Tensor], grad_PCV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compare a chunk's logits with their targets by forward KL, without a tensor of logarithms.

    sum p log p - sum p log q, each by its logits and their log-sum-exp.

    Args:
        target_logits_CV: In at least fp32. Their memory is that of the draft's logits.
        probs_CV: Memory for the target distribution.
        project_draft: Computes the draft's logits [P, C, V], from when on the targets' are no more.
        grad_PCV: Where the gradient with respect to the draft's logits goes, if one is wanted.

    Returns:
        Loss [P, C], and whether the likeliest token is the same [P, C].
    """
    target_argmax_C, target_lse_C, probs_CV = _softmax(target_logits_CV, out=probs_CV)
    negative_entropy_1C = _dot(target_logits_CV.unsqueeze(0), probs_CV) - target_lse_C
    logits_PCV = project_draft()
    loss_PC = negative_entropy_1C - _dot(logits_PCV, probs_CV)
    argmax_PC, lse_PC, draft_probs_PCV = _softmax(logits_PCV, out=logits_PCV)
    if grad_PCV is not None:
        torch.sub(draft_probs_PCV, probs_CV, out=grad_PCV)
    return loss_PC + lse_PC, argmax_PC == target_argmax_C


def _compare_by_others(
    losses: Losses,
    target_logits_CV: Tensor,
    probs_CV: Tensor,
    project_draft: Callable[[], Tensor],
    grad_PCV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compare as `_compare_by_kl` does, by the sum of these losses."""
    target_argmax_C, target_lse_C, probs_CV = _softmax(target_logits_CV, out=probs_CV)
    log_probs_CV = target_logits_CV - target_lse_C.unsqueeze(-1)
    logits_PCV = project_draft()
    argmax_PC, lse_PC, draft_probs_PCV = _softmax(logits_PCV, out=torch.empty_like(logits_PCV))
    draft_log_probs_PCV = logits_PCV.sub_(lse_PC.unsqueeze(-1))
    loss_PC, found_grad_PCV = weighted_sum(
        losses, Distributions(log_probs_CV, probs_CV, draft_log_probs_PCV, draft_probs_PCV, target_argmax_C)
    )
    if grad_PCV is not None:
        grad_PCV.copy_(found_grad_PCV)
    return loss_PC, argmax_PC == target_argmax_C


def _project(states: Tensor, weight_VH: Tensor, rounded: Tensor, exact: Tensor) -> Tensor:
    """Write logits [..., V] of states [..., H] to `rounded`, and return them in at least fp32.

    In `exact`, which may be the same memory. All are contiguous.
    """
    torch.mm(states.flatten(0, -2), weight_VH.T, out=rounded.flatten(0, -2))
    return rounded if rounded.dtype == exact.dtype else exact.copy_(rounded)


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
