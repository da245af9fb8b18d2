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

On GPUs FlexAttention does the left block and autograd the merge. On CPUs, where FlexAttention has no backward,
`cpu_attention` does both in one function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from eagle3_ray.model.cpu_attention import attend_pieces, cut_into_pieces, merge_diagonals

# (queries [R, Q, D], keys [T, G, D], values [T, G, D], keys and values of later steps [R, G, D]...) -> [R, Q, D]
DocumentAttention = Callable[[Tensor, Tensor, Tensor, Sequence[tuple[Tensor, Tensor]]], Tensor]


def build_document_attention(
    documents: Sequence[tuple[int, int]], rows: Tensor, num_tokens: int, device: torch.device
) -> DocumentAttention:
    """Return the attention of `rows` over step 0 and their own later steps, for one bin on one device.

    Args:
        documents: (start, end) of each document.
        rows: [R] int64 on the CPU, ascending query indexes.
        num_tokens: T.
        device: Where the tensors will be.
    """
    if device.type == "cpu":
        pieces = cut_into_pieces(documents, rows)
        return functools.partial(attend_pieces, pieces=pieces)
    block_mask = build_block_mask(documents, rows, num_tokens, device)
    kernel = _compiled_flex_attention()

    def attend(queries: Tensor, keys: Tensor, values: Tensor, diagonal: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        output, log_sum_exp = attend_flex(queries, keys, values, block_mask, kernel)
        return merge_diagonals(output, log_sum_exp, queries, diagonal)[0].to(output.dtype)

    return attend


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
