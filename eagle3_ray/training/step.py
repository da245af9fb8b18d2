"""One optimizer update, and one validation pass over a bin. No Ray, no files.

A step covers the bins of all ranks. The counts of valid targets are summed over ranks before the first backward
pass, so the loss is a sum over positions divided by one global count, never a mean of means, and does not depend
on how the bins were dealt out.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.errors import NonFiniteError
from eagle3_ray.model.attention import DocumentAttention, build_document_attention
from eagle3_ray.model.draft import DraftInputs, Eagle3Draft
from eagle3_ray.model.layout import TttLayout, build_layout
from eagle3_ray.model.loss import TargetHead
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


class StepResult(NamedTuple):
    """What an update tells.

    Attributes:
        sums: This rank's sums [6, P] float64 (`loss.SUM_NAMES`).
        grad_norm: The global gradient norm before clipping.
        is_stopping: Some rank wants to stop after this step; the same on all ranks.
    """

    sums: Tensor
    grad_norm: float
    is_stopping: bool


def train_step(
    draft: Eagle3Draft,
    optimizer: torch.optim.Optimizer,
    target_head: TargetHead,
    bins: Sequence[PackedBin],
    epoch: int,
    settings: StepSettings,
    wants_stop: bool = False,
) -> StepResult:
    """Update the draft once from this rank's bins of one step. collective: every rank calls it.

    Args:
        draft: This rank's part of it.
        optimizer: Of the draft's trained weights.
        target_head: What it learns to guess.
        bins: This rank's.
        epoch: Seeds the noise.
        settings: The same on all ranks.
        wants_stop: This rank was told to stop; the update is made all the same, and all ranks learn of it.

    Raises:
        NonFiniteError: The norm is NaN or Inf, on all ranks alike; nothing is updated.
    """
    layouts = [build_layout(b.document_ids, b.loss_mask, b.num_tokens, settings.num_ttt_steps) for b in bins]
    weights, num_stopping = agree_on_step(layouts, settings, wants_stop)
    sums = torch.zeros(6, settings.num_ttt_steps, dtype=torch.float64, device=settings.device)
    for packed, layout in zip(bins, layouts, strict=True):
        inputs = prepare_inputs(packed, layout, settings)
        inputs = add_noise(inputs, epoch, packed.number, settings)
        output = run_draft(draft, inputs, target_head, weights, settings.compute_dtype)
        output.loss.backward()
        sums += output.sums
    trained = [p for p in draft.parameters() if p.requires_grad]
    # sync: an update that spoils the weights is never made, so the host must know.
    grad_norm = float(clip_grad_norm(trained, settings.max_grad_norm))
    if not math.isfinite(grad_norm):
        optimizer.zero_grad()
        raise NonFiniteError(f"the gradient norm is {grad_norm}.")
    optimizer.step()
    optimizer.zero_grad()
    # sync: costs nothing here, the device has just been waited for.
    return StepResult(sums, grad_norm, is_stopping=bool(num_stopping))


@torch.no_grad()
def eval_step(draft: Eagle3Draft, target_head: TargetHead, packed: PackedBin, settings: StepSettings) -> Tensor:
    """Return this rank's sums [6, P] float64 of one bin, without noise. collective: every rank calls it."""
    layout = build_layout(packed.document_ids, packed.loss_mask, packed.num_tokens, settings.num_ttt_steps)
    weights = torch.ones(settings.num_ttt_steps, device=settings.device)
    inputs = prepare_inputs(packed, layout, settings)
    return run_draft(draft, inputs, target_head, weights, settings.compute_dtype).sums


def agree_on_step(layouts: Sequence[TttLayout], settings: StepSettings, wants_stop: bool) -> tuple[Tensor, Tensor]:
    """Sum over ranks what a step must agree on, in one reduction. collective.

    Returns:
        Weights [P] fp32: decay**k divided by the valid targets of step k over all ranks; and the number of ranks
        that want to stop.
    """
    counts = torch.stack([layout.counts for layout in layouts]).sum(0)
    totals = sum_over_ranks(torch.cat((counts, counts.new_tensor([wants_stop]))).to(settings.device))
    decay = settings.loss_decay ** torch.arange(settings.num_ttt_steps, device=settings.device)
    return (decay / totals[:-1].clamp(min=1)).float(), totals[-1]


def prepare_inputs(packed: PackedBin, layout: TttLayout, settings: StepSettings) -> DraftInputs:
    """Move a bin without its padding to the device; states cross in the dtype of the files and are cast there."""
    device, tokens = settings.device, slice(0, layout.num_tokens)

    def move(tensor: Tensor) -> Tensor:
        return tensor[tokens].to(device, non_blocking=True)

    attend_rows = build_document_attention(layout.documents, layout.rows, layout.num_tokens, device)

    @functools.cache
    def build_attend_all() -> DocumentAttention:
        return build_document_attention(layout.documents, torch.arange(layout.num_tokens), layout.num_tokens, device)

    return DraftInputs(
        input_ids=move(packed.input_ids),
        aux_states=move(packed.aux_states).to(settings.compute_dtype),
        last_state=move(packed.last_state).to(settings.compute_dtype),
        position_ids=move(packed.position_ids),
        layout=replace(
            layout,
            rows=layout.rows.to(device, non_blocking=True),
            targets=layout.targets.to(device, non_blocking=True),
            row_of_target=layout.row_of_target.to(device, non_blocking=True),
            is_valid=layout.is_valid.to(device, non_blocking=True),
            tokens=layout.tokens.to(device, non_blocking=True),
            token_of_row=layout.token_of_row.to(device, non_blocking=True),
        ),
        attend_rows=attend_rows,
        attend_all=lambda queries, keys, values, diagonal: build_attend_all()(queries, keys, values, diagonal),
    )


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
