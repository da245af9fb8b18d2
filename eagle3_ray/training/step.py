"""One optimizer update, and one validation pass over a bin. No Ray, no files.

A step covers the bins of all ranks. The counts of valid targets are summed over ranks before the first backward
pass, so the loss is a sum over positions divided by one global count, never a mean of means, and does not depend
on how the bins were dealt out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.model.draft import DraftInputs, Eagle3Draft
from eagle3_ray.model.loss import TargetHead, leave_out_unsayable
from eagle3_ray.training.ema import Ema
from eagle3_ray.training.ready import ReadyBin
from eagle3_ray.training.sharding import clip_grad_norm, run_draft


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know beside the model.

    Attributes:
        num_ttt_steps: P.
        loss_decay: Step k is weighted by loss_decay**k.
        noise_std: Half-width of the uniform noise on auxiliary states; training only.
        seed: Seed of the noise, together with the epoch and the bin's number.
        max_grad_norm: Global norm gradients are clipped to.
        device: Where to compute.
        compute_dtype: dtype of states and activations.
    """

    num_ttt_steps: int
    loss_decay: float
    noise_std: float
    seed: int
    max_grad_norm: float
    device: torch.device
    compute_dtype: torch.dtype


class Wishes(NamedTuple):
    """What a rank wants of the run after a step, and so what all ranks do once they know."""

    stop: bool = False
    save: bool = False


NO_WISHES = Wishes()


class StepOutcome(NamedTuple):
    """What the host learns of an update; the same on all ranks.

    Attributes:
        grad_norm: Global norm before clipping; NaN or Inf if the update was left out.
        wishes: What some rank wants.
    """

    grad_norm: float
    wishes: Wishes

    @property
    def is_left_out(self) -> bool:
        """A gradient was NaN or Inf, and nothing was updated."""
        return not math.isfinite(self.grad_norm)


class StepResult:
    """What an update tells: sums for the next logged point, and what the host must know soon, on its way there.

    Attributes:
        sums: This rank's sums [6, P] float64 (`loss.SUM_NAMES`); zeros if the update was left out.
    """

    def __init__(self, sums: Tensor, grad_norm: Tensor, num_wishing: Tensor) -> None:
        self.sums = torch.where(torch.isfinite(grad_norm), sums, torch.zeros_like(sums))
        self._numbers = torch.cat((grad_norm.double().view(1), num_wishing.double())).to("cpu", non_blocking=True)
        self._done = torch.cuda.Event() if sums.is_cuda else None
        if self._done is not None:
            self._done.record()

    def wait(self) -> StepOutcome:
        """Wait until the device has made the update, not for what was queued behind it."""
        if self._done is not None:
            self._done.synchronize()
        grad_norm, *num_wishing = self._numbers.tolist()
        return StepOutcome(grad_norm, Wishes(*map(bool, num_wishing)))


def train_step(
    draft: Eagle3Draft,
    optimizer: torch.optim.Optimizer,
    target_head: TargetHead,
    bins: Sequence[ReadyBin],
    epoch: int,
    settings: StepSettings,
    wishes: Wishes = NO_WISHES,
    ema: Ema | None = None,
) -> StepResult:
    """Update the draft once from this rank's bins of one step. collective: every rank calls it.

    An update whose gradient norm is NaN or Inf leaves the weights and the optimizer as they are; `wait` of the result
    tells. The host only queues work: it never waits for the device here.

    Args:
        draft: This rank's part of it.
        optimizer: Of the draft's trained weights.
        target_head: What it learns to guess.
        bins: This rank's.
        epoch: Seeds the noise.
        settings: The same on all ranks.
        wishes: This rank's; the update is made all the same, and all ranks learn of them.
        ema: Moves with the weights.
    """
    bins = [count_sayable(ready, target_head) for ready in bins]
    weights, num_wishing = agree_on_step(bins, settings, wishes)
    sums = torch.zeros(6, settings.num_ttt_steps, dtype=torch.float64, device=settings.device)
    for ready in bins:
        inputs = add_noise(cast_states(ready.inputs, settings.compute_dtype), epoch, ready.number, settings)
        output = run_draft(draft, inputs, target_head, weights, settings.compute_dtype)
        output.loss.backward()
        sums += output.sums
    trained = [p for p in draft.parameters() if p.requires_grad]
    grad_norm = clip_grad_norm(trained, settings.max_grad_norm)
    update_if_finite(optimizer, grad_norm)
    if ema is not None:
        ema.update(torch.isfinite(grad_norm))
    optimizer.zero_grad()
    return StepResult(sums, grad_norm, num_wishing)


def update_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Make the optimizer's update unless the norm is NaN or Inf, which the device decides by itself.

    As `torch.amp.GradScaler` does with a fused optimizer, which both of ours are: where `found_inf` is not 0, it
    changes neither weights nor moments nor its count of steps.
    """
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def eval_step(draft: Eagle3Draft, target_head: TargetHead, ready: ReadyBin, settings: StepSettings) -> Tensor:
    """Return this rank's sums [6, P] float64 of one bin, without noise. collective: every rank calls it."""
    weights = torch.ones(settings.num_ttt_steps, device=settings.device)
    inputs = cast_states(ready.inputs, settings.compute_dtype)
    return run_draft(draft, inputs, target_head, weights, settings.compute_dtype).sums


def agree_on_step(bins: Sequence[ReadyBin], settings: StepSettings, wishes: Wishes) -> tuple[Tensor, Tensor]:
    """Sum over ranks what a step must agree on, in one reduction. collective.

    Returns:
        Weights [P] fp32: decay**k divided by the valid targets of step k over all ranks; and the number of ranks
        that have each wish.
    """
    counts = torch.stack([ready.inputs.layout.counts for ready in bins]).sum(0)
    # Filled on the device: a tensor made of a list would be a copy from the host in every step.
    totals = sum_over_ranks(torch.cat((counts, *(counts.new_full((1,), int(wish)) for wish in wishes))))
    decay = settings.loss_decay ** torch.arange(settings.num_ttt_steps, device=settings.device)
    targets, num_wishing = totals[: -len(wishes)], totals[-len(wishes) :]
    return (decay / targets.clamp(min=1)).float(), num_wishing


def count_sayable(ready: ReadyBin, target_head: TargetHead) -> ReadyBin:
    """Return the bin without the targets that training leaves out."""
    layout = leave_out_unsayable(ready.inputs.layout, ready.inputs.last_state, target_head)
    return replace(ready, inputs=replace(ready.inputs, layout=layout))


def cast_states(inputs: DraftInputs, dtype: torch.dtype) -> DraftInputs:
    """Return the inputs with states in the compute dtype; they cross to the device in that of the files."""
    return replace(inputs, aux_states=inputs.aux_states.to(dtype), last_state=inputs.last_state.to(dtype))


def add_noise(inputs: DraftInputs, epoch: int, bin_number: int, settings: StepSettings) -> DraftInputs:
    """Add uniform noise to the auxiliary states, never to the targets.

    The generator is seeded by (seed, epoch, bin), so the noise of a bin is the same on whichever rank it lands and
    a resumed run needs no generator state.
    """
    if settings.noise_std == 0 or bin_number < 0:
        return inputs
    seed = np.random.SeedSequence([settings.seed, epoch, bin_number]).generate_state(2)
    generator = torch.Generator(settings.device).manual_seed(int(seed[0]) << 31 ^ int(seed[1]))
    noise = torch.empty_like(inputs.aux_states).uniform_(-settings.noise_std, settings.noise_std, generator=generator)
    return replace(inputs, aux_states=inputs.aux_states + noise)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """Return the sums of all ranks. collective."""
    if dist.is_initialized():
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums
