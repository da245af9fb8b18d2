"""What a draft can be trained on: distances of its distribution q from the verifier's p, each with its gradient.

Both are over the draft vocabulary, in at least fp32. A gradient with respect to the logits z of q = softmax(z) is
q * (g - sum(q * g)) where g is that with respect to q; where g would divide by q, the closed form stands instead.

`accepted` is the chance that speculative sampling accepts a token of the draft, sum(min(p, q)), which is 1 minus the
total variation (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Losses = tuple[tuple[str, float], ...]

FORWARD_KL: Losses = (("kl", 1.0),)
LK_DECAY = 3.0  # the hybrid leaves the divergence for the total variation as acceptance rises


@dataclass(frozen=True)
class Distributions:
    """The verifier's distribution and the draft's of C targets in P steps, whose gradients a loss gives.

    Attributes:
        log_p: [C, V]; p is its exponential.
        log_q: [P, C, V]; q is its exponential.
        likeliest: [C] argmax of p.
    """

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor
    likeliest: Tensor


# Value [P, C], gradient with respect to the draft's logits [P, C, V].
ValueAndGrad = tuple[Tensor, Tensor]


def forward_kl(d: Distributions) -> ValueAndGrad:
    """The sum of p log(p / q): the draft must cover all that the verifier may say."""
    return (d.p * (d.log_p - d.log_q)).sum(-1), d.q - d.p


def reverse_kl(d: Distributions) -> ValueAndGrad:
    """The sum of q log(q / p): the draft must say nothing that the verifier would not."""
    gap = d.log_q - d.log_p
    value = (d.q * gap).sum(-1)
    return value, d.q * (gap - value.unsqueeze(-1))


def jensen_shannon(d: Distributions) -> ValueAndGrad:
    """Mean of the divergences of p and of q from their middle."""
    log_middle = ((d.p + d.q) / 2).clamp(min=torch.finfo(d.q.dtype).tiny).log()
    gap = d.log_q - log_middle
    value = ((d.p * (d.log_p - log_middle)).sum(-1) + (d.q * gap).sum(-1)) / 2
    return value, _through_softmax(d.q, gap / 2)


def cross_entropy(d: Distributions) -> ValueAndGrad:
    """-log q of the token that the verifier ranks first: what greedy decoding asks for."""
    index = d.likeliest.expand(d.q.shape[:-1]).unsqueeze(-1)
    grad = d.q.scatter_add(-1, index, -torch.ones_like(index, dtype=d.q.dtype))
    return -d.log_q.gather(-1, index).squeeze(-1), grad


def total_variation(d: Distributions) -> ValueAndGrad:
    """Half the sum of |p - q|: the chance that a drafted token is refused."""
    gap = d.q - d.p
    # sign(gap) / 2 less a half, which a softmax does not see: so digits are kept where q shares next to nothing with p.
    return gap.abs().sum(-1) / 2, _through_softmax(d.q, -(gap < 0).to(gap.dtype))


def negative_log_acceptance(d: Distributions) -> ValueAndGrad:
    """-log sum min(p, q): total variation, with a gradient that does not fade where the draft is far off."""
    accepted = _accepted(d)
    return -accepted.log(), total_variation(d)[1] / accepted.unsqueeze(-1)


def lk_hybrid(d: Distributions) -> ValueAndGrad:
    """KL times w and TV times 1 - w, w = exp(-3 * accepted) a constant to the gradient: KL first, then acceptance."""
    weight = torch.exp(-LK_DECAY * _accepted(d))
    (kl, grad_kl), (tv, grad_tv) = forward_kl(d), total_variation(d)
    return weight * kl + (1 - weight) * tv, torch.lerp(grad_tv, grad_kl, weight.unsqueeze(-1))


LOSSES: dict[str, Callable[[Distributions], ValueAndGrad]] = {
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "ce": cross_entropy,
    "tv": total_variation,
    "nla": negative_log_acceptance,
    "lk": lk_hybrid,
}


def weighted_sum(losses: Losses, distributions: Distributions) -> ValueAndGrad:
    """Return the sum of some losses, each by its name times its weight."""
    (name, weight), *others = losses
    value, grad = LOSSES[name](distributions)
    value, grad = weight * value, weight * grad
    for name, weight in others:
        more_value, more_grad = LOSSES[name](distributions)
        value.add_(more_value, alpha=weight)
        grad.add_(more_grad, alpha=weight)
    return value, grad


def _accepted(d: Distributions) -> Tensor:
    return torch.minimum(d.p, d.q).sum(-1).clamp(min=torch.finfo(d.q.dtype).tiny)


def _through_softmax(q: Tensor, grad_q: Tensor) -> Tensor:
    return q * (grad_q - (q * grad_q).sum(-1, keepdim=True))
