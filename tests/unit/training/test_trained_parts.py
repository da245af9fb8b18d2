"""Which parts of a draft are trained: the others stay bit for bit, on any number of ranks and through a restart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from eagle3_ray.training.checkpoint import HostState, restore_checkpoint, write_checkpoint
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.rank import share_head
from eagle3_ray.training.sharding import gather_weights
from eagle3_ray.training.step import train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.test_checkpoint import BOTH, Training, differing, whole_state
from tests.unit.training.world import (
    build_draft,
    load_mapping,
    load_ready_bins,
    load_target_head,
    load_weights,
    step_settings,
)

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# What is asked for, and what then stays as it was.
PARTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "freeze-lm-head": ({"freeze_lm_head": True}, {EMBEDDING, HEAD}),
    "train-embedding": ({"embed_requires_grad": True}, set()),
    "both": ({"embed_requires_grad": True, "freeze_lm_head": True}, {HEAD}),
}


def train_each() -> dict[str, dict[str, Tensor]]:
    """All weights after three updates from both bins, dealt out over the ranks there are."""
    weights = {}
    for name, (parts, _) in PARTS.items():
        training = Training(**parts)
        training.update(3)
        weights[name] = gather_weights(training.draft, torch.float32)
    return weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    """Of each number of ranks."""
    return {size: run_on_ranks(size, train_each, tmp_path_factory.mktemp("ranks")) for size in (1, 2)}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_frozen_stays_bit_for_bit_and_all_else_moves_alike_on_any_number_of_ranks(
    name: str, trained: dict[int, dict[str, dict[str, Tensor]]]
) -> None:
    initial, frozen = load_weights(), PARTS[name][1]
    one, two = trained[1][name], trained[2][name]
    for weights in (one, two):
        assert {weight for weight in initial if torch.equal(weights[weight], initial[weight])} == frozen
    for weight, tensor in one.items():
        # Adam divides by the gradient's own size: where that is near 0, rounding moves a weight by up to lr.
        torch.testing.assert_close(two[weight], tensor, rtol=1e-4, atol=2e-5, msg=weight)


def sums_with_a_shared_head(dtype: torch.dtype) -> tuple[bool, bool, Tensor, Tensor]:
    """Whether a frozen head equals the targets' and then is theirs, and three steps' sums without and with that."""
    head, sums = load_target_head(), []
    assert head.norm_weight is not None
    head = replace(head, weight=head.weight.to(dtype), norm_weight=head.norm_weight.to(dtype))
    for shares in (False, True):
        draft = build_draft("one_layer", dtype, freeze_lm_head=True)
        is_equal = torch.equal(draft.lm_head.weight, head.weight)
        if shares:
            share_head(draft, head)
        optimizer = build_optimizer(draft.parameters(), 0.01)
        set_learning_rate(optimizer, 1e-3)
        settings, bins = replace(step_settings(), compute_dtype=dtype), load_ready_bins()[dist.get_rank() :: 2]
        sums.append(torch.stack([train_step(draft, optimizer, head, bins, 0, settings).sums for _ in range(3)]))
    return is_equal, draft.lm_head.weight.data_ptr() == head.weight.data_ptr(), sums[0], sums[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_head_is_that_of_the_targets_and_held_once(
    world_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    is_equal, is_shared, alone, shared = run_on_ranks(world_size, sums_with_a_shared_head, tmp_path, dtype)
    assert is_equal and is_shared and torch.equal(alone, shared) and not torch.equal(shared[0], shared[2])


def dtypes_under_bf16() -> dict[str, dict[torch.dtype, set[str]]]:
    """Names of each dtype."""
    found: dict[str, dict[torch.dtype, set[str]]] = {}
    for name, (parts, _) in PARTS.items():
        weights = build_draft("one_layer", torch.bfloat16, **parts).named_parameters()
        found[name] = {}
        for weight_name, weight in weights:
            found[name].setdefault(weight.dtype, set()).add(weight_name)
    return found


def test_what_is_trained_has_fp32_masters_and_the_rest_is_of_the_compute_dtype(tmp_path: Path) -> None:
    names = load_weights().keys()
    for found in (run_on_ranks(size, dtypes_under_bf16, tmp_path) for size in (1, 2)):
        for name, (_, frozen) in PARTS.items():
            assert found[name].get(torch.bfloat16, set()) == frozen and found[name][torch.float32] == names - frozen


def go_on_after_restores(folder: str) -> dict[str, tuple[list[str], list[str], set[str]]]:
    """One update, a checkpoint, and two more of a fresh draft, with Muon and an average.

    Returns what differs from three updates on end, what of the servable draft is not the average in bf16 (or the
    weight, where that is frozen), and the names the average has.
    """
    seen = {}
    for name, (parts, _) in PARTS.items():
        training, path = Training(BOTH, **parts), Path(folder) / name
        assert training.ema is not None
        training.update(1)
        host = HostState(training.draft, training.optimizer, training.ema)
        host.copy()
        write_checkpoint(path, host, load_mapping(), {})
        saved, served = whole_state(training), load_file(path / "model.safetensors")
        expected = {each: saved.get(f"ema.{each}", saved[f"model.{each}"]).bfloat16() for each in load_weights()}
        wrong = [each for each in expected if not torch.equal(served[each], expected[each])]
        fresh = Training(BOTH, **parts)
        restore_checkpoint(path / "state", fresh.draft, fresh.optimizer, fresh.ema)
        for each_training in (training, fresh):
            each_training.update(2)
        seen[name] = differing(whole_state(fresh), whole_state(training)), wrong, set(training.ema.weights)
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_bit_for_bit_and_serves_all_of_its_draft(world_size: int, tmp_path: Path) -> None:
    seen = run_on_ranks(world_size, go_on_after_restores, tmp_path, str(tmp_path / "run"))
    names = load_weights().keys()
    assert seen == {name: ([], [], names - frozen) for name, (_, frozen) in PARTS.items()}
