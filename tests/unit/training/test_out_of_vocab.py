"""Targets that the draft cannot say are left out of a step: against a loop over all tokens, and cleared masks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import eagle3_ray.model.loss as loss_module
from eagle3_ray.config import TrainSettings
from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.loss import TargetHead, leave_out_unsayable
from eagle3_ray.model.verifier import load_verifier_tensors, read_verifier_config
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.rank import build_target_head
from eagle3_ray.training.sharding import gather_weights
from eagle3_ray.training.step import eval_step, sum_over_ranks, train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import CPU, PARITY, build_draft, load_bins, load_mapping, ready, step_settings


def make_head(version: int = 1, *, masks: bool = True, kept_ids: Tensor | None = None) -> TargetHead:
    settings = TrainSettings(
        verifier_name_or_path="v", data_format_version=version, mask_out_of_vocab_targets=masks, precision="fp32"
    )
    info = read_verifier_config(str(PARITY / "verifier"))
    kept_ids = load_mapping().kept_ids if kept_ids is None else kept_ids
    return build_target_head(settings, info, kept_ids, load_verifier_tensors(info), CPU, torch.float32)


def find_unsayable(packed: PackedBin, version: int) -> list[int]:
    """Supervised indexes whose likeliest token of all is not kept, one after the other in float64."""
    info = read_verifier_config(str(PARITY / "verifier"))
    tensors, found = load_verifier_tensors(info), []
    kept = set(load_mapping().kept_ids.tolist())
    for index in packed.loss_mask.nonzero().flatten().tolist():
        state = packed.last_state[index].double()
        if version == 1:
            state = state / (state.square().mean() + info.rms_norm_eps).sqrt() * tensors.final_norm.double()
        logits = [float(row @ state) for row in tensors.lm_head.double()]
        if logits.index(max(logits)) not in kept:
            found.append(index)
    return found


def with_cleared_masks(version: int) -> list[PackedBin]:
    """The recorded bins, without supervision where the draft cannot say the first choice."""
    cleared = []
    for packed in load_bins(version):
        mask = packed.loss_mask.clone()
        mask[find_unsayable(packed, version)] = False
        cleared.append(replace(packed, loss_mask=mask))
    return cleared


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("chunk_elements", [1, 2**22])
def test_the_targets_that_count_are_those_of_a_loop_over_all_tokens(
    version: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    for packed in load_bins(version):
        inputs = ready(packed).inputs
        found = leave_out_unsayable(inputs.layout, inputs.last_state, make_head(version))
        unsayable = torch.tensor(find_unsayable(packed, version))
        assert 0 < len(unsayable) < len(found.targets)
        expected = inputs.layout.is_valid & ~torch.isin(inputs.layout.targets, unsayable)
        assert torch.equal(found.is_valid, expected) and torch.equal(found.counts, expected.sum(1))


def train(version: int, *, by_hand: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the first of three steps over all ranks, and the weights after them. collective."""
    draft, head = build_draft(), make_head(version, masks=not by_hand)
    optimizer = build_optimizer(draft.parameters(), 0.0)
    set_learning_rate(optimizer, 1e-3)
    bins = [ready(packed) for packed in (with_cleared_masks(version) if by_hand else load_bins(version))]
    bins = bins[dist.get_rank() :: dist.get_world_size()]
    first, *_ = [train_step(draft, optimizer, head, bins, 0, step_settings()).sums for _ in range(3)]
    return sum_over_ranks(first), gather_weights(draft, torch.float32)


def train_both_ways() -> dict[int, list[tuple[Tensor, dict[str, Tensor]]]]:
    return {version: [train(version, by_hand=by_hand) for by_hand in (False, True)] for version in (0, 1)}


@pytest.fixture(scope="module")
def by_world_size(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, dict[int, list[tuple[Tensor, dict[str, Tensor]]]]]:
    return {size: run_on_ranks(size, train_both_ways, tmp_path_factory.mktemp("ranks")) for size in (1, 2)}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_is_that_of_bins_whose_masks_were_cleared_by_hand(
    version: int, world_size: int, by_world_size: dict[int, dict[int, list[tuple[Tensor, dict[str, Tensor]]]]]
) -> None:
    found_sums, found = by_world_size[world_size][version][0]
    for sums, weights in (by_world_size[world_size][version][1], by_world_size[1][version][0]):
        assert torch.equal(found_sums[1:], sums[1:])  # counts of all kinds
        torch.testing.assert_close(found_sums[0], sums[0], rtol=1e-5, atol=0)  # float32, sums in another order
        for name, weight in weights.items():
            # Adam divides by the gradient's own size: where that is near 0, rounding moves a weight by up to lr.
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_heads_hold_all_rows_only_where_they_are_asked_for() -> None:
    whole = load_verifier_tensors(read_verifier_config(str(PARITY / "verifier"))).lm_head.float()
    head, mapping = make_head(), load_mapping()
    assert head.unsayable_weight is not None
    assert torch.equal(head.unsayable_weight, whole[~mapping.in_draft_vocab])
    assert make_head(masks=False).unsayable_weight is None
    assert make_head(kept_ids=torch.arange(len(whole))).unsayable_weight is None  # it can say everything
    layout = ready(load_bins()[0]).inputs.layout
    assert leave_out_unsayable(layout, load_bins()[0].last_state, make_head(masks=False)) is layout


def validate() -> list[Tensor]:
    draft, packed = build_draft(), ready(load_bins()[0])
    return [eval_step(draft, make_head(masks=masks), packed, step_settings()) for masks in (False, True)]


def test_validation_counts_every_target(tmp_path: Path) -> None:
    without, with_mask = run_on_ranks(1, validate, tmp_path)
    assert torch.equal(without, with_mask)


def step_with_nothing_left() -> tuple[Tensor, float]:
    """Sums and gradient norm where the draft cannot say any target."""
    draft, head = build_draft(), make_head()
    assert head.unsayable_weight is not None
    # Both signs of a row far longer than any other: one of the two is everywhere ahead.
    row = 1e4 * torch.ones_like(head.unsayable_weight[:1])
    head = replace(head, unsayable_weight=torch.cat((row, -row)))
    optimizer = build_optimizer(draft.parameters(), 0.0)
    result = train_step(draft, optimizer, head, [ready(load_bins()[0])], 0, step_settings())
    return result.sums, result.wait().grad_norm


def test_a_step_of_which_nothing_is_left_changes_nothing(tmp_path: Path) -> None:
    sums, grad_norm = run_on_ranks(1, step_with_nothing_left, tmp_path)
    assert not sums.any() and grad_norm == 0
