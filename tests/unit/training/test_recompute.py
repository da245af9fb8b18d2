"""Gradients are the same whether the backward pass keeps or recomputes, and what is kept is less."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.sharding import gather_whole, local_part, run_draft
from eagle3_ray.training.step import cast_states
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import build_draft, filler, load_ready_bins, load_target_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Found = tuple[dict[str, Tensor], int]


def differentiate(case: str, dtype: torch.dtype, parts: dict[str, bool], *, recomputes: bool) -> Found:
    """Whole gradients by name, and the bytes that the forward pass keeps for the backward one."""
    draft = build_draft(case, dtype, **parts)
    draft.recomputes_layers = recomputes
    head = load_target_head()
    assert head.norm_weight is not None
    head = TargetHead(head.weight.to(dtype), head.norm_weight.to(dtype), head.eps)
    rank, size = dist.get_rank(), dist.get_world_size()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for ready in (load_ready_bins() + [filler()] * (-2 % size))[rank::size]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run_draft(draft, cast_states(ready.inputs, dtype), head, torch.ones(3), dtype)
        output.loss.backward()
    grads = {name: weight.grad for name, weight in draft.named_parameters() if weight.requires_grad}
    return {n: gather_whole(local_part(g), g) for n, g in grads.items() if g is not None}, sum(kept.values())


def differentiate_both(case: str, dtype: torch.dtype, parts: dict[str, bool]) -> tuple[Found, Found]:
    return differentiate(case, dtype, parts, recomputes=False), differentiate(case, dtype, parts, recomputes=True)


EMBEDDING = {"embed_requires_grad": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "num_ranks", "parts"), [("one_layer", 1, {}), ("two_layers", 1, EMBEDDING), ("one_layer", 2, EMBEDDING)]
)
def test_recomputed_gradients_are_equal_and_less_is_kept(
    case: str, num_ranks: int, parts: dict[str, bool], dtype: str, tmp_path: Path
) -> None:
    (grads, kept_bytes), (found, found_bytes) = run_on_ranks(
        num_ranks, differentiate_both, tmp_path, case, DTYPES[dtype], parts
    )
    assert found.keys() == grads.keys() and len(grads) > 10 and (("embed_tokens.weight" in grads) == bool(parts))
    assert [name for name in grads if not torch.equal(found[name], grads[name])] == []
    assert found_bytes < 0.75 * kept_bytes
