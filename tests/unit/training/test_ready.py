"""What the reading thread makes of a packed bin: everything but its padding, and on a CPU nothing of it twice."""

import torch
from torch import Tensor

from eagle3_ray.model.layout import build_layout
from eagle3_ray.training.ready import make_ready
from tests.unit.training.world import CPU, filler, load_bins


def test_a_ready_bin_is_the_packed_one_without_its_padding_and_without_a_copy() -> None:
    packed = load_bins()[0]
    assert packed.num_tokens < len(packed.input_ids)
    ready = make_ready(packed, 3, 1, CPU)
    assert (ready.number, ready.num_tokens) == (packed.number, packed.num_tokens)
    for name in ("input_ids", "aux_states", "last_state", "position_ids"):
        found, whole = getattr(ready.inputs, name), getattr(packed, name)
        assert torch.equal(found, whole[: packed.num_tokens]) and found.data_ptr() == whole.data_ptr(), name


def test_its_layout_is_that_of_the_bin() -> None:
    packed = load_bins()[0]
    found = make_ready(packed, 3, 1, CPU).inputs.layout
    expected = build_layout(packed.document_ids, packed.loss_mask, packed.num_tokens, 3)
    for name, wanted in vars(expected).items():
        tensor = getattr(found, name)
        assert torch.equal(tensor, wanted) if isinstance(wanted, Tensor) else tensor == wanted, name


def test_layers_but_the_last_attend_from_every_index() -> None:
    packed = load_bins()[0]
    one, two = make_ready(packed, 3, 1, CPU).inputs, make_ready(packed, 3, 2, CPU).inputs
    queries = torch.randn(packed.num_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    everywhere = two.attend_all(queries, queries, queries, [])
    assert len(one.layout.rows) < packed.num_tokens == len(everywhere)
    rows = one.layout.rows
    torch.testing.assert_close(one.attend_rows[0](queries[rows], queries, queries, []), everywhere[rows])


def test_a_filler_is_one_token_that_counts_nothing() -> None:
    ready = filler()
    assert (ready.number, ready.num_tokens) == (-1, 0)
    assert ready.inputs.layout.num_tokens == 1 and not ready.inputs.layout.counts.any()
