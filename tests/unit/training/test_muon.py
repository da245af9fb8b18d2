"""Muon against ten lines of it and against torch's own, on any number of ranks, and where a gradient is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.training.muon import MuonWithAdamW
from eagle3_ray.training.optim import build_draft_optimizer, set_learning_rate
from eagle3_ray.training.sharding import gather_weights, gather_whole, local_part
from eagle3_ray.training.step import train_step, update_if_finite
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.test_step import whole_state
from tests.unit.training.world import (
    build_draft,
    filler,
    load_bins,
    load_ready_bins,
    load_target_head,
    load_weights,
    ready,
    step_settings,
)

MUON = OptimizerSettings(optimizer="muon", weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95)
SHAPES = [(7, 20), (20, 7), (16, 16)]


def orthogonalize(x: Tensor) -> Tensor:
    """Newton and Schulz's iteration of Muon in double precision, on the side that is shorter."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def update_all(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for number, grads_of_step in enumerate(grads):
        set_learning_rate(optimizer, 0.01 * (number + 1))
        for weight, grad in zip(weights, grads_of_step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()


def make_weights() -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (*SHAPES, (5,))]
    grads = [[torch.randn(weight.shape, generator=generator) for weight in weights] for _ in range(4)]
    return weights, grads


def test_matrices_move_as_ten_lines_of_muon_say() -> None:
    weights, grads = make_weights()
    expected = [weight.detach().double() for weight in weights[:-1]]
    momenta = [torch.zeros_like(matrix) for matrix in expected]
    update_all(MuonWithAdamW(weights[:-1], weights[-1:], 0.1, (0.9, 0.999)), weights, grads)
    for number, grads_of_step in enumerate(grads):
        rate = 0.01 * (number + 1)
        for place, grad in enumerate(grads_of_step[:-1]):
            momenta[place] = 0.95 * momenta[place] + 0.05 * grad
            update = orthogonalize(0.05 * grad + 0.95 * momenta[place])
            size = 0.2 * max(grad.shape) ** 0.5
            expected[place] = expected[place] * (1 - rate * 0.1) - rate * size * update
    for weight, matrix in zip(weights[:-1], expected, strict=True):
        # An entry moves by up to 0.1 * 0.2 * sqrt(20); torch iterates in bfloat16, of 8 bits.
        torch.testing.assert_close(weight.detach().double(), matrix, rtol=0, atol=2e-3)


def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_its_adamw() -> None:
    weights, grads = make_weights()
    theirs, _ = make_weights()
    update_all(MuonWithAdamW(weights[:-1], weights[-1:], 0.1, (0.8, 0.95)), weights, grads)
    of_torch = torch.optim.Muon(theirs[:-1], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    update_all(of_torch, theirs[:-1], [grads_of_step[:-1] for grads_of_step in grads])
    adamw = torch.optim.AdamW(theirs[-1:], betas=(0.8, 0.95), weight_decay=0.1, fused=True)
    update_all(adamw, theirs[-1:], [grads_of_step[-1:] for grads_of_step in grads])
    for weight, expected in zip(weights[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)  # the same, added in another order
    assert torch.equal(weights[-1], theirs[-1])


def names_by_optimizer(**parts: bool) -> tuple[set[str], set[str], set[int]]:
    """What is Muon's and what AdamW's, and the dimensions of Muon's."""
    draft = build_draft("two_layers", torch.float32, **parts)
    optimizer = build_draft_optimizer(draft, MUON)
    names = {id(weight): name for name, weight in draft.named_parameters()}
    of_muon, of_adamw = ({names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups)
    return of_muon, of_adamw, {weight.ndim for weight in optimizer.param_groups[0]["params"]}


def names_with_embedding() -> tuple[set[str], set[str], set[int]]:
    return names_by_optimizer(embed_requires_grad=True)


def test_muon_has_the_projections_and_adamw_the_norms_and_the_head(tmp_path: Path) -> None:
    of_muon, of_adamw, dims = run_on_ranks(1, names_by_optimizer, tmp_path)
    projections = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert of_muon == {"fc.weight"} | {f"layers.{i}.{name}.weight" for i in (0, 1) for name in projections}
    assert {"norm.weight", "lm_head.weight", "layers.0.hidden_norm.weight"} <= of_adamw and dims == {2}
    assert not any("embed" in name for name in of_adamw)
    with_embedding = run_on_ranks(1, names_with_embedding, tmp_path)
    assert with_embedding == (of_muon, of_adamw | {"embed_tokens.weight"}, dims)


def train(num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and final weights of updates from both bins, dealt out over the ranks there are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    draft, head = build_draft(), load_target_head()
    optimizer = build_draft_optimizer(draft, MUON)
    rows = load_ready_bins() + [filler()] * (-2 % size)
    norms = []
    for step in range(num_steps):
        set_learning_rate(optimizer, 2e-3)
        result = train_step(draft, optimizer, head, rows[rank::size], step, step_settings())
        norms.append(result.wait().grad_norm)
    return norms, gather_weights(draft, torch.float32)


def update_shards() -> list[Tensor]:
    """The matrices of `make_weights` after its updates, dealt out over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def deal_out(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)])

    weights, grads = make_weights()
    shards = [nn.Parameter(deal_out(weight)) for weight in weights]
    optimizer = MuonWithAdamW(shards[:-1], shards[-1:], 0.1, (0.9, 0.999))
    update_all(optimizer, shards, [[deal_out(grad) for grad in grads_of_step] for grads_of_step in grads])
    return [gather_whole(local_part(shard.detach()), shard) for shard in shards]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_of_the_same_gradients_shards_become_what_whole_matrices_do_bit_for_bit(num_ranks: int, tmp_path: Path) -> None:
    weights, grads = make_weights()
    update_all(MuonWithAdamW(weights[:-1], weights[-1:], 0.1, (0.9, 0.999)), weights, grads)
    found = run_on_ranks(num_ranks, update_shards, tmp_path)
    assert all(map(torch.equal, found[:-1], weights[:-1]))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_hold_shards_move_each_matrix_as_one_rank_does(num_ranks: int, tmp_path: Path) -> None:
    """Three ranks do not divide the matrices evenly."""
    one_norms, one = run_on_ranks(1, train, tmp_path, 3)
    norms, weights = run_on_ranks(num_ranks, train, tmp_path, 3)
    assert norms == pytest.approx(one_norms, rel=1e-3)
    start = load_weights()
    for name, weight in one.items():
        # Gradients differ by float32 rounding, which tips some bfloat16 of the iteration (8 bits). Shards made
        # orthogonal on their own would be off by about the whole way.
        assert (weights[name] - weight).norm() <= 0.03 * (weight - start[name].float()).norm(), name


def pass_a_bad_bin() -> tuple[bool, list[str], list[str]]:
    """A good update, one with a bad bin on rank 0, a good one: what the second has changed, and what the third."""
    rank, size = dist.get_rank(), dist.get_world_size()
    draft, head = build_draft(), load_target_head()
    optimizer = build_draft_optimizer(draft, MUON)
    set_learning_rate(optimizer, 1e-3)
    good, bad = load_ready_bins()[rank::size], load_bins()
    bad[0].aux_states[3, 5] = torch.inf
    states = []
    for bins in (good, [ready(packed) for packed in bad[rank::size]], good):
        outcome = train_step(draft, optimizer, head, bins, 0, step_settings()).wait()
        states.append((outcome.is_left_out, whole_state(draft, optimizer)))
    (_, first), (is_left_out, second), (_, third) = states
    assert any("momentum_buffer" in name for name in first)
    return is_left_out, differing(first, second), differing(second, third)


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_update_that_is_left_out_changes_no_bit(num_ranks: int, tmp_path: Path) -> None:
    is_left_out, changed, changed_next = run_on_ranks(num_ranks, pass_a_bad_bin, tmp_path)
    assert is_left_out and changed == [] and len(changed_next) > 30


def test_the_first_update_may_be_the_one_that_is_left_out() -> None:
    weights, _ = make_weights()
    before = [weight.detach().clone() for weight in weights]
    optimizer = MuonWithAdamW(weights[:-1], weights[-1:], 0.1, (0.9, 0.999))
    set_learning_rate(optimizer, 0.1)
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.nan)
    update_if_finite(optimizer, torch.tensor(torch.nan))
    kept: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    assert all(map(torch.equal, weights, before)) and not any(value.any() for value in kept)
