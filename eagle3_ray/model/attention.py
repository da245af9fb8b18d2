"""EAGLE-3's attention rule, once for CPUs and once for GPUs.

In TTT step k, index i attends to the step-0 keys at j <= i of its own document, and to its own index's keys
of steps 1..k, nothing else. Seen by the queries of step 2 over a document of four:

    keys of step 0      step 1     step 2
    1 . . .             1 . . .    1 . . .
    1 1 . .             . 1 . .    . 1 . .
    1 1 1 .             . . 1 .    . . 1 .
    1 1 1 1             . . . 1    . . . 1

The left block is ordinary causal attention; the diagonals are one score a query and step. Both softmaxes are
merged exactly by their log-sum-exps, so no mask of T x (P*T) exists anywhere.

A device's part is `attend_documents`: causal attention of chosen rows over step 0, with its log-sum-exp, both
differentiable. FlexAttention has no backward on CPUs, so there a blockwise attention with recomputation does it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

# (queries [R, Q, D], keys [T, G, D], values [T, G, D]) -> (output [R, Q, D], log-sum-exp [R, Q])
DocumentAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Rows of queries per block on CPUs: bounds the scores held at once to [Q, 256, document].
QUERY_BLOCK = 256


def merge_diagonals(
    output: Tensor, log_sum_exp: Tensor, queries: Tensor, diagonal: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Extend a finished softmax by each row's own keys and values of later steps.

    Args:
        output: [R, Q, D] attention over step 0.
        log_sum_exp: [R, Q] of its scores.
        queries: [R, Q, D].
        diagonal: Per later step its keys and values, each [R, G, D].

    Returns:
        [R, Q, D] in the dtype of `output`.
    """
    if not diagonal:
        return output
    num_rows, num_heads, head_dim = queries.shape
    keys_SRGD = torch.stack([k for k, _ in diagonal])
    values_SRGD = torch.stack([v for _, v in diagonal])
    num_groups = keys_SRGD.shape[2]
    grouped = queries.view(num_rows, num_groups, num_heads // num_groups, head_dim)
    accumulate = torch.promote_types(queries.dtype, torch.float32)
    scores_SRGM = torch.einsum("rgmd,srgd->srgm", grouped.to(accumulate), keys_SRGD.to(accumulate)) * head_dim**-0.5
    lse_RGM = log_sum_exp.view(num_rows, num_groups, -1).to(accumulate)
    total_RGM = torch.logaddexp(lse_RGM, torch.logsumexp(scores_SRGM, 0))
    causal_share = torch.exp(lse_RGM - total_RGM).unsqueeze(-1)
    diagonal_share = torch.exp(scores_SRGM - total_RGM)
    merged = causal_share * output.view_as(grouped).to(accumulate)
    merged = merged + torch.einsum("srgm,srgd->rgmd", diagonal_share, values_SRGD.to(accumulate))
    return merged.reshape(num_rows, num_heads, head_dim).to(output.dtype)


def build_document_attention(
    documents: Sequence[tuple[int, int]], rows: Tensor, num_tokens: int, device: torch.device
) -> DocumentAttention:
    """Return the attention of `rows` over step 0 for one bin on one device.

    Args:
        documents: (start, end) of each document.
        rows: [R] int64 on the CPU, ascending query indexes.
        num_tokens: T.
        device: Where the tensors will be.
    """
    if device.type == "cpu":
        blocks = _plan_blocks(documents, rows)
        return lambda queries, keys, values: _BlockwiseAttention.apply(queries, keys, values, blocks)
    block_mask = build_block_mask(documents, rows, num_tokens, device)
    compiled = _compiled_flex_attention()
    return lambda queries, keys, values: attend_flex(queries, keys, values, block_mask, compiled)


# ---------------------------------------------------------------------------------------------- CPU


@dataclass(frozen=True)
class _Block:
    """A run of query rows of one document and the keys they may see."""

    row_start: int
    row_end: int
    key_start: int
    key_end: int
    is_visible: Tensor  # [row_end - row_start, key_end - key_start] bool


def _plan_blocks(documents: Sequence[tuple[int, int]], rows: Tensor) -> list[_Block]:
    blocks = []
    for start, end in documents:
        first, last = torch.searchsorted(rows, torch.tensor([start, end])).tolist()
        for row_start in range(first, last, QUERY_BLOCK):
            row_end = min(row_start + QUERY_BLOCK, last)
            indexes = rows[row_start:row_end]
            key_end = int(indexes[-1]) + 1
            is_visible = indexes.unsqueeze(1) >= torch.arange(start, key_end)
            blocks.append(_Block(row_start, row_end, start, key_end, is_visible))
    return blocks


class _BlockwiseAttention(torch.autograd.Function):
    """Exact causal document attention whose backward recomputes the probabilities block by block.

    Memory is linear in tokens. With P = exp(S - lse), the gradient of the scores is
    P * (dP - rowsum(dO * O) + dlse): the last term is what lets the log-sum-exp be differentiated.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, blocks: list[_Block]) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(queries)
        log_sum_exp = queries.new_empty(queries.shape[:2], dtype=torch.promote_types(queries.dtype, torch.float32))
        for block in blocks:
            scores_GMRK, _, _, values_GKD = _score_block(queries, keys, values, block)
            lse_GMR = torch.logsumexp(scores_GMRK, -1)
            probs = torch.exp(scores_GMRK - lse_GMR.unsqueeze(-1))
            rows = slice(block.row_start, block.row_end)
            output[rows] = _heads_last(probs @ values_GKD.unsqueeze(1)).to(output.dtype)
            log_sum_exp[rows] = lse_GMR.flatten(0, 1).T
        ctx.save_for_backward(queries, keys, values, output, log_sum_exp)
        ctx.blocks = blocks
        return output, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, log_sum_exp = ctx.saved_tensors
        accumulate = log_sum_exp.dtype
        scale = queries.shape[-1] ** -0.5
        num_groups = keys.shape[1]
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys, dtype=accumulate), torch.zeros_like(values, dtype=accumulate)
        # d(score) = P * (dP - shift), one shift a row and head
        shift = (grad_output.to(accumulate) * output.to(accumulate)).sum(-1) - grad_lse
        for block in ctx.blocks:
            rows, cols = slice(block.row_start, block.row_end), slice(block.key_start, block.key_end)
            scores_GMRK, queries_GMRD, keys_GKD, values_GKD = _score_block(queries, keys, values, block)
            probs = torch.exp(scores_GMRK - _heads_first(log_sum_exp[rows].unsqueeze(-1), num_groups))
            grad_GMRD = _heads_first(grad_output[rows].to(accumulate), num_groups)
            grad_values[cols] += (probs.transpose(-1, -2) @ grad_GMRD).sum(1).transpose(0, 1)
            grad_probs = grad_GMRD @ values_GKD.unsqueeze(1).transpose(-1, -2)
            grad_scores = probs * (grad_probs - _heads_first(shift[rows].unsqueeze(-1), num_groups)) * scale
            grad_queries[rows] = _heads_last(grad_scores @ keys_GKD.unsqueeze(1)).to(queries.dtype)
            grad_keys[cols] += (grad_scores.transpose(-1, -2) @ queries_GMRD).sum(1).transpose(0, 1)
        return grad_queries, grad_keys.to(keys.dtype), grad_values.to(values.dtype), None


def _score_block(queries: Tensor, keys: Tensor, values: Tensor, block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return masked scores [G, M, rows, keys] and the block's operands, all in at least fp32."""
    accumulate = torch.promote_types(queries.dtype, torch.float32)
    cols = slice(block.key_start, block.key_end)
    queries_GMRD = _heads_first(queries[block.row_start : block.row_end].to(accumulate), keys.shape[1])
    keys_GKD = keys[cols].to(accumulate).transpose(0, 1)
    scores = (queries_GMRD @ keys_GKD.unsqueeze(1).transpose(-1, -2)) * queries.shape[-1] ** -0.5
    scores.masked_fill_(~block.is_visible, float("-inf"))
    return scores, queries_GMRD, keys_GKD, values[cols].to(accumulate).transpose(0, 1)


def _heads_first(x_RQD: Tensor, num_groups: int) -> Tensor:
    """[R, Q, D] -> [G, Q/G, R, D]."""
    return x_RQD.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def _heads_last(x_GMRD: Tensor) -> Tensor:
    """[G, Q/G, R, D] -> [R, Q, D]."""
    return x_GMRD.permute(2, 0, 1, 3).flatten(1, 2)


# ---------------------------------------------------------------------------------------------- GPU


def build_block_mask(
    documents: Sequence[tuple[int, int]], rows: Tensor, num_tokens: int, device: torch.device
) -> BlockMask:
    """Return FlexAttention's mask of `rows` [R] over T keys: same document and not later."""
    lengths = torch.tensor([end - start for start, end in documents])
    document = torch.repeat_interleave(torch.arange(len(documents)), lengths).to(device, non_blocking=True)
    index = rows.to(device, non_blocking=True)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (index[query] >= key) & (document[index[query]] == document[key])

    return create_block_mask(is_visible, B=None, H=None, Q_LEN=rows.numel(), KV_LEN=num_tokens, device=device)


def attend_flex(
    queries: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask, kernel: Callable[..., Any] = flex_attention
) -> tuple[Tensor, Tensor]:
    """Attend with FlexAttention, which differentiates both its output and its log-sum-exp on GPUs."""
    output, extra = kernel(
        _as_batch(queries),
        _as_batch(keys),
        _as_batch(values),
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return output[0].transpose(0, 1), extra.lse[0].transpose(0, 1)


def _as_batch(x_RQD: Tensor) -> Tensor:
    """[R, Q, D] -> [1, Q, R, D]."""
    return x_RQD.transpose(0, 1).unsqueeze(0)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention compiled once a process, for any number of rows and tokens."""
    return torch.compile(flex_attention, dynamic=True)
