"""Which rows of a bin are computed, and which hidden state meets which target: host arithmetic, once a bin.

In TTT step k the logits of index i are compared with the target of index i+k, if i+k lies in i's document
and is supervised. So an index needs queries, MLP and later steps only if one of its P targets counts:

    document      0 0 0 0 0 0 0 1 1 1 1
    loss mask     . . . . # # # . . # #
    rows (P=3)    . . r r r r r r r r r        step-0 keys and values are computed for every index

Everything here is known on the host before the bin travels, so the device never waits to learn a shape.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TttLayout:
    """Index tensors of one bin; `R` and `N` are at least 1, so that every parameter has a gradient on every rank.

    Attributes:
        num_tokens: T, the bin's tokens without its tail padding (at least 1).
        documents: [(start, end), ...] of the documents, in order, covering 0..T.
        rows: [R] int64, ascending indexes whose output is needed in some step.
        targets: [N] int64, ascending supervised indexes.
        row_of_target: [P, N] int64, position in `rows` of the index that predicts target n in step k (any if invalid).
        is_valid: [P, N] bool, that index lies in the target's document; and, if those that the draft cannot say are
            left out, the target is none of them.
        counts: [P] int64, valid targets of each step.
        tokens: [U] int64, ascending indexes whose token some row reads in some step.
        token_of_row: [P, R] int64, position in `tokens` of what each row reads in step k.
    """

    num_tokens: int
    documents: tuple[tuple[int, int], ...]
    rows: Tensor
    targets: Tensor
    row_of_target: Tensor
    is_valid: Tensor
    counts: Tensor
    tokens: Tensor
    token_of_row: Tensor

    def move(self, move: Callable[[Tensor], Tensor]) -> "TttLayout":
        """Return the same layout with its tensors as `move` returns them."""
        return replace(
            self,
            rows=move(self.rows),
            targets=move(self.targets),
            row_of_target=move(self.row_of_target),
            is_valid=move(self.is_valid),
            counts=move(self.counts),
            tokens=move(self.tokens),
            token_of_row=move(self.token_of_row),
        )


def build_layout(document_ids: Tensor, loss_mask: Tensor, num_tokens: int, num_ttt_steps: int) -> TttLayout:
    """Derive the layout of a bin.

    Args:
        document_ids: [>= num_tokens] int64 on the CPU; a document's tokens are contiguous; padding is the tail.
        loss_mask: [>= num_tokens] bool on the CPU, True where the target of that index is supervised.
        num_tokens: Tokens before the padding; 0 for an empty bin, which is laid out as one unsupervised token.
        num_ttt_steps: P.
    """
    num_tokens = max(1, num_tokens)
    document_ids, loss_mask = document_ids[:num_tokens], loss_mask[:num_tokens] & (document_ids[:num_tokens] >= 0)
    starts = torch.nonzero(document_ids[1:] != document_ids[:-1]).flatten() + 1
    bounds = [0, *starts.tolist(), num_tokens]
    document_start = torch.zeros(num_tokens, dtype=torch.int64)
    for start, end in itertools.pairwise(bounds):
        document_start[start:end] = start

    targets = torch.nonzero(loss_mask).flatten()
    steps = torch.arange(num_ttt_steps).unsqueeze(1)
    if targets.numel() == 0:
        targets = torch.zeros(1, dtype=torch.int64)
        is_valid = torch.zeros(num_ttt_steps, 1, dtype=torch.bool)
    else:
        is_valid = targets - steps >= document_start[targets]
    sources = torch.where(is_valid, targets - steps, targets[0])
    is_needed = torch.zeros(num_tokens, dtype=torch.bool)
    is_needed[sources.flatten()] = True
    rows = torch.nonzero(is_needed).flatten()
    row_of_index = torch.cumsum(is_needed, 0) - 1
    # Past a document's end the token is another document's; such an index has no valid target there.
    tokens, token_of_row = torch.unique((rows + steps).clamp(max=num_tokens - 1), return_inverse=True)
    return TttLayout(
        num_tokens=num_tokens,
        documents=tuple(itertools.pairwise(bounds)),
        rows=rows,
        targets=targets,
        row_of_target=torch.where(is_valid, row_of_index[sources], 0),
        is_valid=is_valid,
        counts=is_valid.sum(1),
        tokens=tokens,
        token_of_row=token_of_row,
    )
