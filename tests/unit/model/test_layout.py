"""Which indexes count in which TTT step: drawn out, and against a brute force over every (index, step)."""

import pytest
import torch

from eagle3_ray.model.layout import build_layout


def brute_force(
    document_ids: list[int], mask: list[bool], num_steps: int
) -> tuple[set[tuple[int, int, int]], set[int]]:
    """All (step, index, target) that count, and the indexes among them."""
    counted = {
        (step, index, index + step)
        for step in range(num_steps)
        for index in range(len(mask) - step)
        if mask[index + step] and document_ids[index] == document_ids[index + step] >= 0
    }
    return counted, {index for _, index, _ in counted}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_layout_equals_the_brute_force(seed: int, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    num_tokens = len(documents)
    mask = torch.rand(num_tokens, generator=generator) < 0.4
    padded_ids = torch.tensor([*documents, -1, -1, -1])
    padded_mask = torch.cat((mask, torch.tensor([True, True, True])))  # a mask in padding counts nothing
    layout = build_layout(padded_ids, padded_mask, num_tokens, num_steps)
    counted, indexes = brute_force(documents, mask.tolist(), num_steps)
    found = {
        (step, int(layout.rows[layout.row_of_target[step, n]]), int(target))
        for step in range(num_steps)
        for n, target in enumerate(layout.targets)
        if layout.is_valid[step, n]
    }
    assert found == counted
    assert set(layout.rows.tolist()) >= indexes
    assert layout.counts.tolist() == [sum(step == s for s, _, _ in counted) for step in range(num_steps)]
    assert [end - start for start, end in layout.documents] == lengths
    read = [[min(row + step, num_tokens - 1) for row in layout.rows.tolist()] for step in range(num_steps)]
    assert layout.tokens[layout.token_of_row].tolist() == read
    assert layout.tokens.tolist() == sorted({token for tokens in read for token in tokens})


def test_later_steps_do_not_cross_into_the_next_document() -> None:
    layout = build_layout(torch.tensor([0, 0, 1, 1]), torch.tensor([True] * 4), 4, 3)
    assert layout.counts.tolist() == [4, 2, 0]


def test_an_empty_bin_is_one_row_that_counts_nothing() -> None:
    layout = build_layout(torch.full((8,), -1), torch.zeros(8, dtype=torch.bool), 0, 3)
    assert (layout.num_tokens, layout.rows.tolist(), layout.targets.tolist()) == (1, [0], [0])
    assert layout.counts.tolist() == [0, 0, 0] and not layout.is_valid.any()


def test_rows_leave_out_what_no_step_needs() -> None:
    mask = torch.tensor([False] * 6 + [True] * 2 + [False] * 4)
    layout = build_layout(torch.zeros(12, dtype=torch.int64), mask, 12, 3)
    assert layout.rows.tolist() == [4, 5, 6, 7]
