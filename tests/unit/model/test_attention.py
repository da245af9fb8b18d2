"""The attention rule, both devices' implementations against one dense brute force with the mask written out."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from eagle3_ray.model import cpu_attention
from eagle3_ray.model.attention import BLOCK, BLOCK_TENSORS, attend_flex, build_block_mask, build_document_attention
from eagle3_ray.model.cpu_attention import cut_into_pieces, merge_diagonals

CPU = torch.device("cpu")
DOCUMENTS = ((0, 5), (5, 6), (6, 14), (14, 17))
NUM_TOKENS, HEADS, GROUPS, HEAD_DIM = 17, 4, 2, 8
ROWS = torch.tensor([0, 3, 4, 5, 6, 7, 12, 13, 16])


def keep(tensor: Tensor) -> Tensor:
    """What `move` is where the tensors stay on the CPU."""
    return tensor


def dense_mask(rows: Tensor, num_later_steps: int, reach: int = NUM_TOKENS) -> Tensor:
    """[R, T + steps*T] bool: the rule as a picture, step-0 keys first, then each later step's own keys."""
    document = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(DOCUMENTS)])
    index = torch.arange(NUM_TOKENS)
    distance = index[:, None] - index[None, :]
    causal = (distance >= 0) & (distance < reach) & (document[:, None] == document[None, :])
    diagonal = torch.eye(NUM_TOKENS, dtype=torch.bool)
    return torch.cat([causal, *[diagonal] * num_later_steps], dim=1)[rows]


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax over everything at once: queries [R, Q, D], keys and values [K, G, D], mask [R, K]."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = torch.einsum("rhd,khd->hrk", queries, keys) / queries.shape[-1] ** 0.5
    return torch.einsum("hrk,khd->rhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)


def random_inputs(num_later_steps: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(len(ROWS), HEADS, HEAD_DIM), *[(NUM_TOKENS, GROUPS, HEAD_DIM)] * (2 + 2 * num_later_steps)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def ours(queries: Tensor, keys: Tensor, values: Tensor, *later: Tensor, reach: int | None = None) -> Tensor:
    attend = build_document_attention(DOCUMENTS, ROWS, NUM_TOKENS, CPU, keep, reach)
    return attend(queries, keys, values, [(later[i][ROWS], later[i + 1][ROWS]) for i in range(0, len(later), 2)])


def oracle(queries: Tensor, keys: Tensor, values: Tensor, *later: Tensor, reach: int = NUM_TOKENS) -> Tensor:
    mask = dense_mask(ROWS, len(later) // 2, reach)
    return dense_attention(queries, torch.cat([keys, *later[0::2]]), torch.cat([values, *later[1::2]]), mask)


@pytest.mark.parametrize("num_later_steps", [0, 1, 3])
@pytest.mark.parametrize("reach", [None, 1, 2, 3, 5])
def test_output_and_gradients_equal_the_dense_brute_force(num_later_steps: int, reach: int | None) -> None:
    inputs = random_inputs(num_later_steps, torch.float64)
    weight = torch.randn(len(ROWS), HEADS, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = ours(*inputs, reach=reach), oracle(*inputs, reach=reach or NUM_TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64 throughout
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_rows_see_a_rectangle_and_a_triangle_of_their_document() -> None:
    """ROWS make seven runs; those that begin within their document have keys before them."""
    seen = torch.zeros(len(ROWS), NUM_TOKENS, dtype=torch.int64)
    for piece in cut_into_pieces(DOCUMENTS, ROWS):
        assert piece.mask(torch.float32) is None
        part = torch.ones(piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start, dtype=torch.int64)
        seen[piece.rows, piece.keys] += part.tril() if piece.is_causal else part
    assert torch.equal(seen, dense_mask(ROWS, 0).long())


@pytest.mark.parametrize("reach", [1, 2, 7, 40, 200])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 16), (64, 512)])
def test_within_reach_every_pair_is_seen_once(
    reach: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_BLOCK_ROWS", sizes[0])
    monkeypatch.setattr(cpu_attention, "MAX_BLOCK_ROWS", sizes[1])
    documents = [(0, 3), (3, 90), (90, 91), (91, 180)]
    rows = torch.cat((torch.arange(2, 60), torch.arange(70, 75), torch.arange(91, 180)))
    seen, own = torch.zeros(len(rows), 180, dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64)
    for piece in cut_into_pieces(documents, rows, reach):
        part = torch.ones(piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start)
        mask = piece.mask(torch.float32)
        assert piece.rows.stop - piece.rows.start <= sizes[1]
        part = part.tril() if piece.is_causal else part if mask is None else mask.exp()
        assert part.any(1).all()  # a softmax over nothing would be NaN
        seen[piece.rows, piece.keys] += part.long()
        own[piece.rows] += piece.has_own_keys
        assert own[piece.rows].all()  # what comes later is merged into it
    document = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(documents)])
    distance = rows[:, None] - torch.arange(180)
    expected = (distance >= 0) & (distance < reach) & (document[rows][:, None] == document)
    assert torch.equal(seen, expected.long()) and (own == 1).all()


@pytest.mark.parametrize("reach", [1, 63, 64, 300, 700])
def test_windows_across_the_kernels_own_blocks_equal_the_dense_brute_force(reach: int) -> None:
    documents, num_tokens = [(0, 20), (20, 1100), (1100, 1300)], 1300
    generator = torch.Generator().manual_seed(2)
    rows = torch.arange(num_tokens)[torch.arange(num_tokens) % 700 > 30]
    shapes = [(len(rows), HEADS, HEAD_DIM), *[(num_tokens, GROUPS, HEAD_DIM)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    document = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(documents)])
    distance = rows[:, None] - torch.arange(num_tokens)
    mask = (distance >= 0) & (distance < reach) & (document[rows][:, None] == document)
    queries, keys, values = inputs
    found = build_document_attention(documents, rows, num_tokens, CPU, keep, reach)(queries, keys, values, [])
    expected = dense_attention(queries, keys, values, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64 throughout
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    grads = (torch.autograd.grad((output * weight).sum(), inputs) for output in (found, expected))
    for found_grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_bf16_output_is_within_bf16_rounding_of_float64() -> None:
    exact = random_inputs(2, torch.float64)
    rounded = [x.detach().to(torch.bfloat16) for x in exact]
    expected = oracle(*[x.double() for x in rounded])
    found = ours(*rounded)
    assert found.dtype == torch.bfloat16
    # Scores and sums are fp32; only the two outputs are rounded to bf16's 8 bits.
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_token_of_another_document_or_of_the_future_changes_nothing() -> None:
    queries, keys, values = random_inputs(0, torch.float64)
    before = ours(queries, keys, values)
    changed = keys.detach().clone()
    changed[5] += 100.0  # the only token of document 1, which is row 3 of ROWS
    after = ours(queries, changed, values)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    assert torch.equal(before[kept], after[kept])
    changed = keys.detach().clone()
    changed[13] += 100.0  # the last token of document 2: only its own query may see it
    after = ours(queries, changed, values)
    assert torch.equal(before[:7], after[:7]) and not torch.equal(before[7], after[7])


@pytest.mark.parametrize("num_later_steps", [0, 2])
@pytest.mark.parametrize("reach", [None, 3])
def test_flex_attention_with_the_merge_equals_the_cpu_implementation(num_later_steps: int, reach: int | None) -> None:
    """FlexAttention has no backward on CPUs; its gradients are compared in tests/gpu."""
    queries, keys, values, *later = (x.detach() for x in random_inputs(num_later_steps, torch.float32))
    diagonal = [(later[i][ROWS], later[i + 1][ROWS]) for i in range(0, len(later), 2)]
    block_mask = build_block_mask(DOCUMENTS, ROWS, NUM_TOKENS, keep, reach)
    output, log_sum_exp = attend_flex(queries, keys, values, block_mask, flex_attention)
    found, _ = merge_diagonals(output, log_sum_exp, queries, diagonal)
    expected = build_document_attention(DOCUMENTS, ROWS, NUM_TOKENS, CPU, keep, reach)(queries, keys, values, diagonal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # two orders of float32 sums


def random_documents(seed: int) -> tuple[list[tuple[int, int]], Tensor, int]:
    """Documents shorter and longer than a block of 128, and a share of their indexes as rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 700, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    ends = lengths.cumsum(0).tolist()
    num_tokens, share = ends[-1], torch.rand((), generator=generator)
    is_row = torch.rand(num_tokens, generator=generator) < share
    is_row[-ends[0] :] |= seed % 2 == 0  # half of them with blocks that are seen in full
    is_row[-1] = True
    return list(zip([0, *ends[:-1]], ends, strict=True)), torch.arange(num_tokens)[is_row], num_tokens


@pytest.mark.parametrize("reach", [None, 1, 200])
@pytest.mark.parametrize("seed", range(12))
def test_the_block_mask_equals_the_one_made_of_a_mask_of_every_pair(seed: int, reach: int | None) -> None:
    documents, rows, num_tokens = random_documents(seed)
    document = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(documents)])
    found = build_block_mask(documents, rows, num_tokens, keep, reach)
    within = num_tokens if reach is None else reach
    expected = create_block_mask(
        lambda _batch, _head, query, key: (rows[query] >= key)
        & (rows[query] - key < within)
        & (document[rows[query]] == document[key]),
        B=None, H=None, Q_LEN=len(rows), KV_LEN=num_tokens, device="cpu",
    )  # fmt: skip
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in BLOCK_TENSORS:
        tensor, wanted = getattr(found, name), getattr(expected, name)
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    pairs = (torch.arange(len(rows))[:, None], torch.arange(num_tokens)[None, :])
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(found.mask_mod(zero, zero, *pairs), expected.mask_mod(zero, zero, *pairs))


def test_some_of_these_masks_have_blocks_that_are_seen_in_full_and_some_have_none() -> None:
    """So that the test above compares both."""
    masks = [build_block_mask(*random_documents(seed), keep) for seed in range(12)]
    num_full = [0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum()) for mask in masks]
    assert max(num_full) > 0 and min(num_full) == 0


def test_bins_of_other_lengths_and_steps_of_other_reach_compile_nothing_anew() -> None:
    """Once for any number of rows, tokens and blocks but one, which is a case of its own; here without a backward."""
    counter = CompileCounter()
    kernel = torch.compile(flex_attention, dynamic=True, backend=counter)
    num_compiled = []
    for documents, rows, num_tokens in filter(lambda made: len(made[1]) > BLOCK, map(random_documents, range(12))):
        shapes = [(len(rows), HEADS, 16), (num_tokens, GROUPS, 16), (num_tokens, GROUPS, 16)]
        queries, keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes)
        for reach in (None, 300):
            attend_flex(queries, keys, values, build_block_mask(documents, rows, num_tokens, keep, reach), kernel)
            num_compiled.append(counter.frame_count)
    assert len(num_compiled) > 10 and set(num_compiled) == {1}


def test_gradients_through_the_merge_equal_the_dense_brute_force() -> None:
    """As GPUs go: autograd through the merge, here of a dense step 0 whose log-sum-exp is differentiated too."""
    inputs = random_inputs(2, torch.float64)
    queries, keys, values, *later = inputs
    repeats = HEADS // GROUPS
    scores = torch.einsum("rhd,khd->rhk", queries, keys.repeat_interleave(repeats, 1)) / HEAD_DIM**0.5
    scores = scores.masked_fill(~dense_mask(ROWS, 0)[:, None], -torch.inf)
    output = torch.einsum("rhk,khd->rhd", scores.softmax(-1), values.repeat_interleave(repeats, 1))
    diagonal = [(later[i][ROWS], later[i + 1][ROWS]) for i in range(0, len(later), 2)]
    found, _ = merge_diagonals(output, scores.logsumexp(-1), queries, diagonal)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad((oracle(*inputs) * weight).sum(), inputs)
    for found_grad, expected_grad in zip(
        torch.autograd.grad((found * weight).sum(), inputs), expected_grads, strict=True
    ):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)
