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
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from eagle3_ray.model.cpu_attention import attend_pieces, cut_into_pieces, merge_diagonals

# (queries [R, Q, D], keys [T, G, D], values [T, G, D], keys and values of later steps [R, G, D]...) -> [R, Q, D]
DocumentAttention = Callable[[Tensor, Tensor, Tensor, Sequence[tuple[Tensor, Tensor]]], Tensor]
Move = Callable[[Tensor], Tensor]  # a tensor of the host -> its copy on a device

BLOCK = 128  # rows and keys of FlexAttention's blocks
BLOCK_TENSORS = tuple(
    f"{prefix}{side}_{what}" for prefix in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
)


def build_document_attention(
    documents: Sequence[tuple[int, int]],
    rows: Tensor,
    num_tokens: int,
    device: torch.device,
    move: Move,
    reach: int | None = None,
) -> DocumentAttention:
    """Return the attention of `rows` over step 0 and their own later steps, for one bin on one device.

    Args:
        documents: (start, end) of each document.
        rows: [R] int64 on the CPU, ascending query indexes.
        num_tokens: T.
        device: Where the tensors will be.
        move: Copies a tensor to that device.
        reach: Step-0 keys that a row sees, its own included, at least 1; None: all of its document up to it.
    """
    if device.type == "cpu":
        return functools.partial(attend_pieces, pieces=cut_into_pieces(documents, rows, reach))
    block_mask = build_block_mask(documents, rows, num_tokens, move, reach)
    kernel = _compiled_flex_attention()

    def attend(queries: Tensor, keys: Tensor, values: Tensor, diagonal: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        output, log_sum_exp = attend_flex(queries, keys, values, block_mask, kernel)
        return merge_diagonals(output, log_sum_exp, queries, diagonal)[0].to(output.dtype)

    return attend


def build_block_mask(
    documents: Sequence[tuple[int, int]], rows: Tensor, num_tokens: int, move: Move, reach: int | None = None
) -> BlockMask:
    """Return FlexAttention's mask of `rows` [R] over T keys: same document, not later, and within reach.

    Its blocks are found on the host from the first and the last key of each row, as `create_block_mask` would find
    them on the device from a mask of R x T (4 GiB of it for 64k tokens).
    """
    starts = torch.tensor([start for start, _ in documents])
    first, last = starts[torch.searchsorted(starts, rows, right=True) - 1], rows
    if reach is not None:
        first = first.maximum(rows - reach + 1)
    some, all_of_it = _visible_blocks(first, last, num_tokens)
    lowest, highest = move(first), move(last)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (lowest[query] <= key) & (key <= highest[query])

    mask = BlockMask.from_kv_blocks(
        *_in_order(some & ~all_of_it),
        *_in_order(all_of_it),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(rows.numel(), num_tokens),
    )
    for name in BLOCK_TENSORS:
        setattr(mask, name, move(getattr(mask, name)))
    return mask


def _visible_blocks(first: Tensor, last: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return which blocks of rows and keys hold a visible pair, and which hold nothing else: [R/128, T/128] bool.

    Args:
        first: [R] int64, the first key a row sees.
        last: [R] int64, the last; it sees all between them.
        num_tokens: T.
    """
    block_of_row = torch.arange(first.numel()) // BLOCK
    shape = (-(-first.numel() // BLOCK), -(-num_tokens // BLOCK) + 1)

    def count_rows(low: Tensor, high: Tensor) -> Tensor:
        """How many rows of a block reach each block of keys, if each row reaches low..high-1."""
        changes, one = torch.zeros(shape, dtype=torch.int32), torch.ones((), dtype=torch.int32)
        changes.index_put_((block_of_row, low), one, accumulate=True)
        changes.index_put_((block_of_row, high.maximum(low)), -one, accumulate=True)
        return changes.cumsum(1)[:, :-1]

    some = count_rows(first // BLOCK, last // BLOCK + 1) > 0
    all_of_it = count_rows((first + BLOCK - 1) // BLOCK, (last + 1) // BLOCK) == BLOCK
    return some, all_of_it


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] bool -> how many blocks each row of blocks has [1, 1, Q] int32, and their indexes first [1, 1, Q, K]."""
    indexes = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return blocks.sum(1, dtype=torch.int32)[None, None], indexes[None, None]


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
