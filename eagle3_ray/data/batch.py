"""Samples -> `PackedBin`: the one shift, document ids, padding.

Index i of a document holds what the draft sees and is judged by at once, so a sample of S tokens gives S-1:

    sample     ids   x0  x1  x2  x3      states  g0..g3 (auxiliary)   y0..y3 (last)      mask  l0..l3
    index i          0   1   2           input_ids[i] = x[i+1]        aux_states[i] = g[i]
    position id      1   2   3           last_state[i] = y[i+1]       loss_mask[i] = l[i+1]

    two samples in a bin of 8:   document_ids  0  0  0  1  1 -1 -1 -1
                                 position_ids  1  2  3  1  2  0  0  0
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle3_ray.data.samples import Sample, SampleSpec
from eagle3_ray.errors import DataError


@dataclass
class PackedBin:
    """One row of T positions, the tail of it padding.

    Attributes:
        number: the bin's number in the plan; -1 for a filler without samples.
        row: its place in the stream of all bins of the run.
        num_tokens: positions that belong to samples; the padding starts here.
        input_ids: [T] int64, 0 in padding.
        aux_states: [T, A*H] in the files' dtype, 0 in padding.
        last_state: [T, H] in the files' dtype, 0 in padding.
        loss_mask: [T] bool, False in padding.
        document_ids: [T] int64, 0.. in the order of the samples, -1 in padding.
        position_ids: [T] int64, from 1 in each document, 0 in padding.
    """

    number: int
    row: int
    num_tokens: int
    input_ids: Tensor
    aux_states: Tensor
    last_state: Tensor
    loss_mask: Tensor
    document_ids: Tensor
    position_ids: Tensor


def allocate_bin(
    total_seq_len: int, spec: SampleSpec, state_dtype: torch.dtype = torch.bfloat16, pin_memory: bool = False
) -> PackedBin:
    """Return a bin with uninitialised tensors, to be filled by `pack_samples`.

    Args:
        total_seq_len: T.
        spec: gives A and H.
        state_dtype: of both states.
        pin_memory: page-lock the tensors, for asynchronous copies to a GPU.
    """

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, pin_memory=pin_memory)

    return PackedBin(
        number=-1,
        row=-1,
        num_tokens=0,
        input_ids=empty(total_seq_len, dtype=torch.int64),
        aux_states=empty(total_seq_len, spec.num_aux_layers * spec.hidden_size, dtype=state_dtype),
        last_state=empty(total_seq_len, spec.hidden_size, dtype=state_dtype),
        loss_mask=empty(total_seq_len, dtype=torch.bool),
        document_ids=empty(total_seq_len, dtype=torch.int64),
        position_ids=empty(total_seq_len, dtype=torch.int64),
    )


def pack_samples(
    samples: list[Sample],
    total_seq_len: int,
    spec: SampleSpec,
    number: int = -1,
    row: int = -1,
    out: PackedBin | None = None,
) -> PackedBin:
    """Put samples one after another into a bin, shifted; copy each byte once, from the file's map to the bin.

    Args:
        samples: in the order of the plan, each of one token or more; a longer one than the bin is cut. None: a filler.
        total_seq_len: T.
        spec: gives A and H.
        number: the bin's number in the plan.
        row: its place in the stream.
        out: a bin whose tensors are used again, every position rewritten; tensors of another dtype are replaced.

    Returns:
        The bin, sharing the tensors of `out`. States have the files' dtype, float32 if the samples differ in it.

    Raises:
        DataError: The samples are longer than the plan was told: they were changed after the index was built.
    """
    lengths = [min(len(sample.input_ids) - 1, total_seq_len) for sample in samples]
    num_tokens = sum(lengths)
    if num_tokens > total_seq_len:
        paths = ", ".join(sample.path for sample in samples)
        raise DataError(
            f"bin {number}: its samples have {num_tokens} positions, the plan gave them at most {total_seq_len}. "
            f"A file was changed after the index was built; start the run again. Files: {paths}"
        )
    dtype = _state_dtype(samples, out)
    if out is None or out.last_state.dtype != dtype:
        out = allocate_bin(total_seq_len, spec, dtype, pin_memory=out is not None and out.last_state.is_pinned())
    assert out.aux_states.shape == (total_seq_len, spec.num_aux_layers * spec.hidden_size)
    start = 0
    for document, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        _put_sample(out, sample, document, start, start + length)
        start += length
    _clear_tail(out, start)
    return replace(out, number=number, row=row, num_tokens=num_tokens)


def _state_dtype(samples: list[Sample], out: PackedBin | None) -> torch.dtype:
    dtypes = {state.dtype for sample in samples for state in (*sample.aux_states, sample.last_state)}
    if len(dtypes) == 1:
        return dtypes.pop()
    if dtypes:
        return torch.float32  # holds bfloat16 and float16 exactly
    return out.last_state.dtype if out is not None else torch.bfloat16


def _put_sample(out: PackedBin, sample: Sample, document: int, start: int, end: int) -> None:
    """Write one sample to the positions [start, end) of the bin."""
    length = end - start
    out.input_ids[start:end] = sample.input_ids[1 : length + 1]
    out.loss_mask[start:end] = sample.loss_mask[1 : length + 1]
    out.last_state[start:end] = sample.last_state[1 : length + 1]
    column = 0
    for state in sample.aux_states:
        out.aux_states[start:end, column : column + state.shape[1]] = state[:length]
        column += state.shape[1]
    out.document_ids[start:end] = document
    torch.arange(1, length + 1, out=out.position_ids[start:end])


def _clear_tail(out: PackedBin, start: int) -> None:
    """Rewrite the padding: what an earlier use of the tensors left there must not be seen."""
    for tensor in (out.input_ids, out.aux_states, out.last_state, out.loss_mask, out.position_ids):
        tensor[start:] = 0
    out.document_ids[start:] = -1
