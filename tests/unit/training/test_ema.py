"""The moving average against its one line, past an update that is left out, and in the draft's place."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.training.ema import Ema, build_ema
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.sharding import gather_weights, gather_whole, local_part
from eagle3_ray.training.step import eval_step, sum_over_ranks, train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import build_draft, filler, load_bins, load_ready_bins, load_target_head, ready
from tests.unit.training.world import step_settings as settings

DECAY = 0.9


def whole(ema: Ema) -> dict[str, Tensor]:
    """A copy of the average in full. collective."""
    return {name: gather_whole(local_part(tensor), tensor).clone() for name, tensor in ema.weights.items()}


def train_averaged(num_steps: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The average after some updates; what it differs in from its one line, and what a bad bin changes of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    draft, head = build_draft(), load_target_head()
    optimizer, ema = build_optimizer(draft.parameters(), 0.01), Ema(draft, DECAY)
    set_learning_rate(optimizer, 1e-2)
    good, bad = load_ready_bins()[rank::size], load_bins()
    bad[0].aux_states[3, 5] = torch.inf
    expected = whole(ema)
    for _ in range(num_steps):
        train_step(draft, optimizer, head, good, 0, settings(), ema=ema)
        weights = gather_weights(draft, torch.float32)
        for name in expected:
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weights[name]
    found = whole(ema)
    wrong = [name for name in expected if not torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-8)]
    train_step(draft, optimizer, head, [ready(packed) for packed in bad[rank::size]], 0, settings(), ema=ema)
    after = whole(ema)
    return found, wrong, [n for n in found if not torch.equal(found[n].view(torch.int32), after[n].view(torch.int32))]


def test_the_average_is_its_one_line_on_any_number_of_ranks_and_stays_where_an_update_is_left_out(
    tmp_path: Path,
) -> None:
    one, *problems = run_on_ranks(1, train_averaged, tmp_path, 3)
    two, *problems_of_two = run_on_ranks(2, train_averaged, tmp_path, 3)
    assert problems == problems_of_two == [[], []]
    assert "embed_tokens.weight" not in one and {tensor.dtype for tensor in one.values()} == {torch.float32}
    for name, tensor in one.items():
        # As in test_step: where a gradient is near 0, rounding moves a weight by up to lr, here 0.01.
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-4, msg=name)


def validate_in_place() -> tuple[list[float], list[float], list[str], bool]:
    """Validation sums by the average in the draft's place and by a draft of the average's own weights.

    And what the visit has changed of weights and average; whether the next update is that of a run without it.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, head, ends, sums, changed = [*load_ready_bins(), filler()], load_target_head(), [], [], []
    for visits in (True, False):
        draft = build_draft()
        optimizer, ema = build_optimizer(draft.parameters(), 0.01), Ema(draft, DECAY)
        set_learning_rate(optimizer, 1e-2)

        def train(draft: object = draft, optimizer: object = optimizer, ema: Ema = ema) -> None:
            train_step(draft, optimizer, head, load_ready_bins()[rank::size], 0, settings(), ema=ema)  # type: ignore[arg-type]

        train()
        if visits:
            # By the weights first: the shards that FSDP gathers for that must not be those of the average.
            eval_step(draft, head, rows[rank], settings())
            before = gather_weights(draft, torch.float32) | {f"ema.{n}": x for n, x in whole(ema).items()}
            before = {name: tensor.clone() for name, tensor in before.items()}
            with ema.in_place():
                sums.append(sum_over_ranks(eval_step(draft, head, rows[rank], settings())).flatten().tolist())
            after = gather_weights(draft, torch.float32) | {f"ema.{n}": x for n, x in whole(ema).items()}
            changed = [name for name in before if not torch.equal(before[name], after[name])]
            other = build_draft()
            for name, weight in other.named_parameters():
                if weight.requires_grad:
                    local_part(weight.detach()).copy_(local_part(ema.weights[name]))
            sums.append(sum_over_ranks(eval_step(other, head, rows[rank], settings())).flatten().tolist())
        train()
        ends.append({name: tensor.clone() for name, tensor in gather_weights(draft, torch.float32).items()})
    return sums[0], sums[1], changed, all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_draft_computes_with_the_average_for_a_while_and_goes_on_as_if_it_had_not(
    num_ranks: int, tmp_path: Path
) -> None:
    found, expected, changed, is_same_end = run_on_ranks(num_ranks, validate_in_place, tmp_path)
    assert found == expected and changed == [] and is_same_end


def test_there_is_no_average_without_a_decay(tmp_path: Path) -> None:
    assert run_on_ranks(1, is_built_without_a_decay, tmp_path) is False


def is_built_without_a_decay() -> bool:
    return build_ema(build_draft(), 0.0) is not None
