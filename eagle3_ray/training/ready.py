"""A packed bin -> what a step takes, made in the thread that reads bins ahead: host work and copies beside the step.

bins thread    read n+1   lay out   copy ──────────┐  read n+2   lay out   copy ─────
device         step n-1 ────────── step n ─────────┴──────── step n+1 ───────────────
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.attention import DocumentAttention, Move, build_document_attention
from eagle3_ray.model.draft import DraftInputs
from eagle3_ray.model.layout import build_layout


@dataclass(frozen=True)
class ReadyBin:
    """One bin without its padding, laid out for a draft, on the device.

    Attributes:
        number: The bin's number in the plan; -1 for a filler.
        num_tokens: Its tokens; 0 for a filler.
        inputs: States are in the dtype of the files. On a CPU they are views of the packed bin, not copies.
    """

    number: int
    num_tokens: int
    inputs: DraftInputs


def make_ready(
    packed: PackedBin, num_ttt_steps: int, num_layers: int, device: torch.device, sliding_window: int | None = None
) -> ReadyBin:
    """Lay a bin out and move it to the device. When it returns, a GPU has its copy and the bin may be written again.

    Args:
        packed: Page-locked for a GPU, or the copies hold up this thread.
        num_ttt_steps: P.
        num_layers: Decoder layers of the draft; all but the last attend from every index.
        device: Where to compute.
        sliding_window: Positions that a query sees, its own included; at least P. None: all before it.
    """
    layout = build_layout(packed.document_ids, packed.loss_mask, packed.num_tokens, num_ttt_steps)
    documents, num_tokens = layout.documents, layout.num_tokens
    with beside_compute(device) as move:

        def attend(rows: Tensor, step: int) -> DocumentAttention:
            # In step k a row stands k positions further on, and its window has moved as far, as it has for a server
            # (in speculators 0.9.0 it has not).
            reach = None if sliding_window is None else sliding_window - step
            return build_document_attention(documents, rows, num_tokens, device, move, reach)

        if sliding_window is None:
            attend_rows = (attend(layout.rows, 0),) * num_ttt_steps
        else:
            attend_rows = tuple(attend(layout.rows, step) for step in range(num_ttt_steps))
        attend_all = attend(torch.arange(num_tokens), 0) if num_layers > 1 else attend_rows[0]
        inputs = DraftInputs(
            input_ids=move(packed.input_ids[:num_tokens]),
            aux_states=move(packed.aux_states[:num_tokens]),
            last_state=move(packed.last_state[:num_tokens]),
            position_ids=move(packed.position_ids[:num_tokens]),
            layout=layout.move(move),
            attend_rows=attend_rows,
            attend_all=attend_all,
        )
    return ReadyBin(packed.number, packed.num_tokens, inputs)


@contextlib.contextmanager
def beside_compute(device: torch.device) -> Iterator[Move]:
    """Give a function that copies tensors to the device, on a GPU in a stream of its own.

    When the context is left, the copies are done and may be used on the device's default stream.
    """
    copies: list[Tensor] = []

    def move(tensor: Tensor) -> Tensor:
        copies.append(tensor.to(device, non_blocking=True))
        return copies[-1]

    if device.type != "cuda":
        yield move
        return
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        yield move
    stream.synchronize()
    for copy in copies:
        # Their memory is the copy stream's: it must not be given away while the step still reads it.
        copy.record_stream(torch.cuda.default_stream(device))


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
