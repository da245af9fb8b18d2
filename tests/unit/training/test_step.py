"""One update: the same on one rank and on two, with and without fillers, and 20 of them along a golden curve."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.optim import build_optimizer, learning_rate, set_learning_rate, warmup_steps
from eagle3_ray.training.sharding import gather_weights
from eagle3_ray.training.step import StepOutcome, Wishes, add_noise, cast_states, eval_step, sum_over_ranks, train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import (
    build_draft,
    filler,
    load_bins,
    load_ready_bins,
    load_target_head,
    ready,
    step_settings,
)

GOLDEN = Path(__file__).with_name("golden_losses.json")


def train_dealt_out(case: str, num_steps: int, noise_std: float) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Train on both bins in every step, dealt out over the ranks there are; losses [steps][P] and final weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    draft, settings, target_head = build_draft(case), step_settings(noise_std), load_target_head()
    optimizer = build_optimizer(draft.parameters(), 0.01)
    rows = load_ready_bins() + [filler()] * (-2 % world_size)
    losses = []
    for step in range(num_steps):
        set_learning_rate(optimizer, 1e-3)
        sums = train_step(draft, optimizer, target_head, rows[rank::world_size], step, settings).sums
        sums = sum_over_ranks(sums)
        losses.append((sums[0] / sums[1]).tolist())
    return losses, gather_weights(draft, torch.float32)


CASES = [("one_layer", 0.0), ("one_layer", 0.05), ("two_layers", 0.05)]
Results = dict[tuple[str, float], tuple[list[list[float]], dict[str, Tensor]]]


def train_all_cases() -> Results:
    return {(case, noise_std): train_dealt_out(case, 3, noise_std) for case, noise_std in CASES}


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """Every case on one, two and three ranks: a process group each."""
    return {size: run_on_ranks(size, train_all_cases, tmp_path_factory.mktemp("ranks")) for size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_share_the_bins_equal_one_rank(
    case: tuple[str, float], world_size: int, by_world_size: dict[int, Results]
) -> None:
    """The third rank holds no samples: it must take part in every reduction and change nothing."""
    one_losses, one_weights = by_world_size[1][case]
    losses, weights = by_world_size[world_size][case]
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)  # float32, sums in another order
    for name, weight in one_weights.items():
        # Adam divides by the gradient's own size: where that is near 0, rounding moves a weight by up to lr.
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def train_while_ranks_wish() -> tuple[list[Wishes], bool]:
    """What six updates say: the second with an order to stop on the last rank, the third with one to save on rank 0.

    The other three are without any; are the weights the same?
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    weights, said = [], []
    for has_wishes in (True, False):
        draft, settings, target_head = build_draft(), step_settings(0.05), load_target_head()
        optimizer = build_optimizer(draft.parameters(), 0.01)
        for step in range(3):
            wishes = Wishes(stop=has_wishes and rank == last and step == 1, save=has_wishes and rank == 0 and step == 2)
            bins = load_ready_bins()[rank : rank + 1]
            result = train_step(draft, optimizer, target_head, bins, step, settings, wishes)
            said.append(result.wait()[1])
        weights.append(gather_weights(draft, torch.float32))
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, said)
    assert all(other == said for other in heard)
    return said, all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_what_one_rank_wishes_all_learn_and_no_update_is_changed(tmp_path: Path) -> None:
    said, is_equal = run_on_ranks(2, train_while_ranks_wish, tmp_path)
    assert said == [(False, False), (True, False), (False, True), *[(False, False)] * 3]
    assert is_equal


def train_golden(num_steps: int) -> list[float]:
    """Total loss of each of `num_steps` updates under the real schedule and noise."""
    draft, settings, target_head = build_draft(), step_settings(0.05), load_target_head()
    optimizer = build_optimizer(draft.parameters(), 0.0)
    losses = []
    for step in range(num_steps):
        set_learning_rate(optimizer, learning_rate(step, num_steps, warmup_steps(num_steps, 0.1), 2e-3))
        sums = train_step(draft, optimizer, target_head, load_ready_bins(), step // 5, settings).sums
        losses.append(float((sums[0] / sums[1]).sum()))
    return losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds out for the tests below."""
    return run_on_ranks(1, find_out_alone, tmp_path_factory.mktemp("alone"))


def find_out_alone() -> dict[str, Any]:
    return {
        "golden": train_golden(20),
        "v1": losses_of_version(1),
        "v0": losses_of_version(0),
        "bad": train_past_a_bad_bin(),
        "bf16": train_in_bf16(),
    }


def test_twenty_steps_follow_the_golden_curve(alone: dict[str, Any]) -> None:
    """Recorded once from this code; a change of data path, model, loss, optimizer or schedule shows here."""
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(alone["golden"], golden, rtol=1e-4)  # float32, other CPUs
    assert golden[-1] < 0.5 * golden[0]


def losses_of_version(version: int) -> list[float]:
    draft = build_draft()
    head = load_target_head(is_normed=version == 0)
    bins = load_ready_bins(version)
    sums = torch.stack([eval_step(draft, head, each, step_settings()) for each in bins]).sum(0)
    return (sums[0] / sums[1]).tolist()


def test_v0_and_v1_of_the_same_samples_give_the_same_losses(alone: dict[str, Any]) -> None:
    np.testing.assert_allclose(
        alone["v0"], alone["v1"], rtol=4e-3
    )  # v0's last state was rounded to bf16 after the norm, v1's before


def whole_state(draft: Eagle3Draft, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and counts of steps, of all ranks. collective."""
    # Copies: one rank alone gets the weights themselves, which the next update changes.
    state = {name: weight.clone() for name, weight in gather_weights(draft, torch.float32).items()}
    for number, kept in enumerate(optimizer.state.values()):
        for key, tensor in kept.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[f"{number}.{key}"] = whole.clone()
    return state


def train_past_a_bad_bin() -> tuple[list[StepOutcome], Tensor, list[str]]:
    """A good update, one with a bad bin on rank 0, and a good one again.

    Returns how the latter two went, the sums of the bad one, and what of the state it has changed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    draft, head = build_draft(), load_target_head()
    optimizer = build_optimizer(draft.parameters(), 0.01)
    set_learning_rate(optimizer, 1e-3)
    good, bad = load_ready_bins()[rank::size], load_bins()
    bad[0].aux_states[3, 5] = torch.inf
    train_step(draft, optimizer, head, good, 0, step_settings())
    before = whole_state(draft, optimizer)
    result = train_step(draft, optimizer, head, [ready(packed) for packed in bad[rank::size]], 0, step_settings())
    after = whole_state(draft, optimizer)
    # Not waited for: an update may be queued behind one that is left out.
    next_outcome = train_step(draft, optimizer, head, good, 0, step_settings()).wait()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return [result.wait(), next_outcome], result.sums, changed


def test_a_gradient_that_is_not_finite_updates_nothing_and_leaves_no_trace(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    for (left_out, after), sums, changed in (alone["bad"], run_on_ranks(2, train_past_a_bad_bin, tmp_path)):
        assert left_out.is_left_out and not sums.any()  # what is logged holds no NaN
        assert changed == [] and not after.is_left_out


def train_in_bf16() -> tuple[float, float, set[torch.dtype], bool]:
    """First loss, last loss, dtypes of the trained weights, and whether a norm has moved, under bf16 compute."""
    draft = build_draft(dtype=torch.bfloat16)
    head = load_target_head()
    assert head.norm_weight is not None
    head = TargetHead(head.weight.bfloat16(), head.norm_weight.bfloat16(), head.eps)
    settings = replace(step_settings(), compute_dtype=torch.bfloat16)
    optimizer = build_optimizer(draft.parameters(), 0.0)
    losses = []
    for _ in range(6):
        set_learning_rate(optimizer, 1e-3)
        sums = train_step(draft, optimizer, head, load_ready_bins(), 0, settings).sums
        losses.append(float((sums[0] / sums[1]).sum()))
    weights = gather_weights(draft, torch.float32)
    moved = not torch.all(weights["norm.weight"] == 1)
    return losses[0], losses[-1], {p.dtype for p in draft.parameters() if p.requires_grad}, moved


def test_bf16_compute_keeps_fp32_masters_and_starts_at_the_fp32_loss(alone: dict[str, Any]) -> None:
    first, last, dtypes, norm_moved = alone["bf16"]
    assert first == pytest.approx(alone["golden"][0], rel=0.02)  # bf16 has 8 bits; the golden run has noise
    assert last < 0.5 * first and dtypes == {torch.float32} and norm_moved


def noisy_inputs(seed_epoch: int, bin_number: int) -> tuple[Tensor, Tensor, Tensor]:
    packed = load_bins()[0]
    settings = step_settings(noise_std=0.05)
    clean = cast_states(ready(packed).inputs, settings.compute_dtype)
    noisy = add_noise(clean, seed_epoch, bin_number, settings)
    assert torch.equal(noisy.last_state, clean.last_state)
    return clean.aux_states, noisy.aux_states, noisy.aux_states - clean.aux_states


def test_noise_is_uniform_bounded_and_on_auxiliary_states_only() -> None:
    _, _, noise = noisy_inputs(0, 0)
    assert noise.abs().max() <= 0.0501  # a float32 sum of a state and its noise rounds
    assert abs(float(noise.mean())) < 1e-3
    assert float(noise.std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.02)  # of a uniform distribution


def test_noise_depends_on_epoch_and_bin_and_on_nothing_else() -> None:
    assert torch.equal(noisy_inputs(1, 4)[1], noisy_inputs(1, 4)[1])
    assert not torch.equal(noisy_inputs(1, 4)[1], noisy_inputs(2, 4)[1])
    assert not torch.equal(noisy_inputs(1, 4)[1], noisy_inputs(1, 5)[1])
