"""The attention rule on CPUs: torch's flash kernel over what the rows may see, and the diagonals merged in.

Rows that follow one another make a run, and what a run sees of its document is a rectangle and a triangle, both
of which the kernel knows without a mask and without computing a score in vain:

    document  s . . . a . . b        rows a..b-1: keys s..a-1 are seen by all of them,
                      r r r          keys a..b-1 causally

With a window a row sees only as many keys as it reaches. Runs are then cut into blocks of rows, and what a block sees
before its triangle is a rectangle that all of its rows reach and a corner, which alone takes a mask:

    rows a..b-1   c c r r r r t . .
                  . c r r r r t t .
                  . . r r r r t t t

Where the reach is shorter than a block, all of it is one band under a mask, or a call of the kernel would do next to
nothing:

    rows a..b-1   b b b . . .
                  . b b b . .
                  . . b b b .

A softmax over parts is the sum of the parts' outputs, each weighted by exp(its log-sum-exp - that of the whole).
Backward needs no derivative of that merge: given the whole's output and log-sum-exp, P = exp(S - lse) are the
true probabilities of each part, so the kernel's own backward gives each part's share of the gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Behind scaled_dot_product_attention, which keeps the log-sum-exp to itself.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 512  # of a block under a window; the largest mask, a corner's, is its square


class Piece(NamedTuple):
    """Rows and step-0 keys: the r-th row sees the c-th key if lowest <= c - r <= highest; None bounds nothing."""

    rows: slice
    keys: slice
    lowest: int | None = None
    highest: int | None = None

    @property
    def has_own_keys(self) -> bool:
        """Whether its rows see their own keys here, which each row does in one piece: a triangle or a band."""
        return self.highest is not None

    @property
    def is_causal(self) -> bool:
        """Whether it is a triangle."""
        return self.lowest is None and self.has_own_keys

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to a corner's or a band's scores, [rows, keys], or None."""
        if self.lowest is None:
            return None
        shape = [part.stop - part.start for part in (self.rows, self.keys)]
        is_visible = torch.ones(shape, dtype=torch.bool).triu(self.lowest)
        if self.highest is not None:
            is_visible = is_visible.tril(self.highest)
        return torch.zeros(shape, dtype=dtype).masked_fill_(~is_visible, -torch.inf)


def cut_into_pieces(documents: Sequence[tuple[int, int]], rows: Tensor, reach: int | None = None) -> list[Piece]:
    """Return what `rows` [R] (ascending) see of their documents, first what holds their own keys.

    Args:
        documents: (start, end) of each document.
        rows: [R] int64.
        reach: Keys that a row sees, its own included; None: all of its document up to it.
    """
    pieces = []
    for start, end in documents:
        first, last = torch.searchsorted(rows, torch.tensor([start, end])).tolist()
        indexes = rows[first:last].tolist()
        bounds = [i for i in range(1, len(indexes)) if indexes[i] != indexes[i - 1] + 1]
        for low, high in zip([0, *bounds], [*bounds, len(indexes)], strict=True):
            if low == high:
                continue  # a document without rows
            size = high - low if reach is None else min(max(reach, MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
            for begin in range(low, high, size):
                block = slice(first + begin, first + min(begin + size, high))
                pieces += _cut_block(block, start, indexes[begin], reach)
    return sorted(pieces, key=lambda piece: not piece.has_own_keys)


def _cut_block(rows: slice, start: int, here: int, reach: int | None) -> list[Piece]:
    """Return what rows of the indexes from `here` on see of a document that begins at `start`."""
    num_rows = rows.stop - rows.start
    triangle = Piece(rows, slice(here, here + num_rows), highest=0)
    if reach is None:
        return [triangle, Piece(rows, slice(start, here))] if here > start else [triangle]
    first_reaches, all_reach = max(start, here - reach + 1), max(start, here + num_rows - reach)
    if all_reach > here:
        own = here - first_reaches  # c - r of a row's own key
        return [Piece(rows, slice(first_reaches, here + num_rows), own - reach + 1, own)]
    pieces = [triangle]
    if here > all_reach:
        pieces.append(Piece(rows, slice(all_reach, here)))
    if (num_keys := all_reach - first_reaches) > 0:
        others = slice(rows.start, rows.stop - 1)  # the last row reaches none of them
        pieces.append(Piece(others, slice(first_reaches, all_reach), lowest=num_keys - (num_rows - 1)))
    return pieces


def attend_pieces(
    queries: Tensor, keys: Tensor, values: Tensor, diagonal: Sequence[tuple[Tensor, Tensor]], pieces: list[Piece]
) -> Tensor:
    """Attend to what the pieces say of step 0, and to the rows' own keys of later steps.

    Computes in fp32 at least (bf16 would be slower here, too); memory is linear in tokens.

    Args:
        queries: [R, Q, D].
        keys: [T, G, D] of step 0.
        values: [T, G, D] of step 0.
        diagonal: Per later step its keys and values, each [R, G, D].
        pieces: From `cut_into_pieces`, for these rows.

    Returns:
        [R, Q, D] in the dtype of `queries`.
    """
    output: Tensor = _PieceAttention.apply(queries, keys, values, pieces, *[x for pair in diagonal for x in pair])
    return output


class _PieceAttention(torch.autograd.Function):
    """See `attend_pieces`."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, pieces: list[Piece], *diagonal: Tensor
    ) -> Tensor:
        exact = torch.promote_types(queries.dtype, torch.float32)
        q_GMRD = _heads_first(queries.to(exact), keys.shape[1])
        k_GMTD, v_GMTD = (_share_heads(x.to(exact), q_GMRD.shape[1]) for x in (keys, values))
        output = torch.empty(queries.shape, dtype=exact)
        lse_RQ = torch.empty(queries.shape[:2], dtype=exact)
        o_GMRD, lse_GMR = _heads_first(output, keys.shape[1]), _heads_first(lse_RQ, keys.shape[1])
        for piece in pieces:
            rows, cols = piece.rows, piece.keys
            of_piece = (q_GMRD[:, :, rows], k_GMTD[:, :, cols], v_GMTD[:, :, cols])
            part, lse = _flash(*of_piece, 0.0, piece.is_causal, attn_mask=piece.mask(exact))
            if not piece.has_own_keys:
                part, lse = _merge(o_GMRD[:, :, rows], lse_GMR[:, :, rows], part, lse)
            o_GMRD[:, :, rows], lse_GMR[:, :, rows] = part, lse
        pairs = list(zip(diagonal[::2], diagonal[1::2], strict=True))
        output, lse_RQ = merge_diagonals(output, lse_RQ, queries, pairs)
        output = output.to(queries.dtype)
        ctx.save_for_backward(queries, keys, values, output, lse_RQ, *diagonal)
        ctx.pieces = pieces
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, lse_RQ, *diagonal = ctx.saved_tensors
        exact, num_groups = lse_RQ.dtype, keys.shape[1]
        q_GMRD, o_GMRD, grad_GMRD = (_heads_first(x.to(exact), num_groups) for x in (queries, output, grad_output))
        k_GMTD, v_GMTD = (_share_heads(x.to(exact), q_GMRD.shape[1]) for x in (keys, values))
        lse_GMR = _heads_first(lse_RQ, num_groups)
        grad_queries = torch.empty(queries.shape, dtype=exact)
        grad_keys, grad_values = torch.zeros(keys.shape, dtype=exact), torch.zeros(values.shape, dtype=exact)
        grad_q_GMRD = _heads_first(grad_queries, num_groups)
        for piece in ctx.pieces:
            rows, cols = piece.rows, piece.keys
            of_rows = (x[:, :, rows] for x in (o_GMRD, lse_GMR))
            grad_q, grad_k, grad_v = _flash_backward(
                grad_GMRD[:, :, rows],
                q_GMRD[:, :, rows],
                k_GMTD[:, :, cols],
                v_GMTD[:, :, cols],
                *of_rows,
                0.0,
                piece.is_causal,
                attn_mask=piece.mask(exact),
            )
            grad_q_GMRD[:, :, rows] = grad_q if piece.has_own_keys else grad_q_GMRD[:, :, rows] + grad_q
            grad_keys[cols] += grad_k.sum(1).transpose(0, 1)
            grad_values[cols] += grad_v.sum(1).transpose(0, 1)
        shift_RGM = (grad_GMRD * o_GMRD).sum(-1).permute(2, 0, 1)
        grad_diagonal = []
        for key_RGD, value_RGD in zip(diagonal[::2], diagonal[1::2], strict=True):
            grads = _diagonal_backward(q_GMRD, grad_GMRD, lse_GMR, shift_RGM, key_RGD.to(exact), value_RGD.to(exact))
            grad_q_RGMD, grad_k, grad_v = grads
            grad_queries += grad_q_RGMD.flatten(1, 2)
            grad_diagonal += [grad_k.to(key_RGD.dtype), grad_v.to(value_RGD.dtype)]
        grad_keys, grad_values = grad_keys.to(keys.dtype), grad_values.to(values.dtype)
        return grad_queries.to(queries.dtype), grad_keys, grad_values, None, *grad_diagonal


def _diagonal_backward(
    q_GMRD: Tensor, grad_GMRD: Tensor, lse_GMR: Tensor, shift_RGM: Tensor, key_RGD: Tensor, value_RGD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of queries [R, G, M, D], and of one later step's keys and values [R, G, D].

    With one score s a row: p = exp(s - lse), ds = p * (dO . v - dO . O).
    """
    q_RGMD, grad_RGMD = q_GMRD.permute(2, 0, 1, 3), grad_GMRD.permute(2, 0, 1, 3)
    scale = key_RGD.shape[-1] ** -0.5
    probs_RGM1 = torch.exp((q_RGMD @ key_RGD.unsqueeze(-1)) * scale - lse_GMR.permute(2, 0, 1).unsqueeze(-1))
    grad_scores_RGM1 = probs_RGM1 * (grad_RGMD @ value_RGD.unsqueeze(-1) - shift_RGM.unsqueeze(-1)) * scale
    return (
        grad_scores_RGM1 * key_RGD.unsqueeze(2),
        (grad_scores_RGM1.transpose(-1, -2) @ q_RGMD).squeeze(2),
        (probs_RGM1.transpose(-1, -2) @ grad_RGMD).squeeze(2),
    )


def merge_diagonals(
    output: Tensor, log_sum_exp: Tensor, queries: Tensor, diagonal: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Extend a finished softmax by each row's own keys and values of later steps; on any device, differentiable.

    Args:
        output: [R, Q, D] attention over step 0.
        log_sum_exp: [R, Q] of its scores.
        queries: [R, Q, D].
        diagonal: Per later step its keys and values, each [R, G, D].

    Returns:
        Output [R, Q, D] and log-sum-exp [R, Q] of all, in fp32 at least.
    """
    if not diagonal:
        return output, log_sum_exp
    exact = torch.promote_types(queries.dtype, torch.float32)
    num_groups = diagonal[0][0].shape[1]
    keys_RGSD, values_RGSD = (torch.stack(tensors, 2).to(exact) for tensors in zip(*diagonal, strict=True))
    q_RGMD, o_RGMD = (x.unflatten(1, (num_groups, -1)).to(exact) for x in (queries, output))
    lse_RGM1 = log_sum_exp.unflatten(1, (num_groups, -1)).unsqueeze(-1).to(exact)
    scores_RGMS = (q_RGMD @ keys_RGSD.transpose(-1, -2)) * queries.shape[-1] ** -0.5
    total_RGM1 = torch.logsumexp(torch.cat((lse_RGM1, scores_RGMS), -1), -1, keepdim=True)
    merged = o_RGMD * torch.exp(lse_RGM1 - total_RGM1) + torch.exp(scores_RGMS - total_RGM1) @ values_RGSD
    return merged.flatten(1, 2), total_RGM1.flatten(1)


def _merge(output: Tensor, lse: Tensor, other_output: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over two sets of keys from the softmaxes over each: outputs [..., D], log-sum-exps [...]."""
    total = torch.logaddexp(lse, other_lse)
    share, other_share = torch.exp(lse - total).unsqueeze(-1), torch.exp(other_lse - total).unsqueeze(-1)
    return output * share + other_output * other_share, total


def _heads_first(x: Tensor, num_groups: int) -> Tensor:
    """View [R, Q, ...] as [G, Q/G, R, ...]."""
    return x.unflatten(1, (num_groups, -1)).movedim(0, 2)


def _share_heads(x_TGD: Tensor, num_shared: int) -> Tensor:
    """View [T, G, D] as [G, M, T, D], without a copy for the M heads that share keys."""
    return x_TGD.transpose(0, 1).unsqueeze(1).expand(-1, num_shared, -1, -1)
