"""Plan -> Ray Data stream -> bins on a rank, in plan order, checked.

Ray Data carries rows in the order of `BinSchedule`, one row a block, so that `streaming_split` deals row k to rank
k mod W. The documentation promises no such thing, so each row carries its number and each rank checks it.

    pack_in="worker"   a row is its number alone; the rank's own thread reads, packs, and reuses its buffers
    pack_in="task"     Ray tasks read and pack eight rows at a time; bins cross the object store

Either way a thread keeps the next bins ready, and tells how long the step had to wait for them.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import DataContext, DataIterator, Dataset, ExecutionOptions

from eagle3_ray.data.batch import PackedBin, allocate_bin, pack_samples
from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.packing import FILLER, BinSchedule, PackingPlan
from eagle3_ray.data.samples import Sample, SampleSpec, check_finite, read_sample
from eagle3_ray.errors import DataError
from eagle3_ray.storage import is_remote

PackIn = Literal["worker", "task"]

ROWS_PER_TASK = 8
REMOTE_FILES_AT_A_TIME = 8  # of one bin
# A read task of row numbers holds many: nothing but the numbers is in it.
ROW_NUMBERS_PER_TASK = 64
TENSORS = ("input_ids", "aux_states", "last_state", "loss_mask", "document_ids", "position_ids")


@dataclass(frozen=True)
class BinSource:
    """All that is needed to turn a bin's number into its tensors.

    Attributes:
        spec: What each sample must look like.
        index: The samples the plan speaks of.
        plan: Which of them share a bin.
        seed: Seed of each epoch's order of bins.
    """

    spec: SampleSpec
    index: SampleIndex
    plan: PackingPlan
    seed: int

    def read_bin(self, number: int, row: int, out: PackedBin | None = None) -> PackedBin:
        """Read and pack one bin; -1 gives a filler without samples.

        Raises:
            SampleFormatError: A file is no longer a sample, or holds NaN or Inf.
            DataError: A file has another length than when it was indexed.
        """
        members = [] if number == FILLER else self.plan.bins[number].tolist()
        samples = self._read_samples(members)
        return pack_samples(samples, self.plan.total_seq_len, self.spec, number, row, out)

    def paths_of_bin(self, number: int) -> list[str]:
        """Return the relative paths of a bin's samples; none for a filler."""
        members = [] if number == FILLER else self.plan.bins[number].tolist()
        return [self.index.paths[member] for member in members]

    def _read_samples(self, members: list[int]) -> list[Sample]:
        if not is_remote(self.index.root):
            return [self._read_sample(member) for member in members]
        # A request waits for the network most of its time.
        with ThreadPoolExecutor(REMOTE_FILES_AT_A_TIME) as pool:
            return list(pool.map(self._read_sample, members))

    def _read_sample(self, member: int) -> Sample:
        sample = read_sample(f"{self.index.root}/{self.index.paths[member]}", self.spec)
        expected = int(self.index.num_tokens[member])
        if len(sample.input_ids) != expected:
            raise DataError(
                f"{sample.path}: has {len(sample.input_ids)} tokens, had {expected} when it was indexed. "
                "Do not change samples during a run; start the run again."
            )
        check_finite(sample)
        return sample


class RowReader:
    """Reads the bin that belongs to a row of the stream."""

    def __init__(self, source: BinSource, schedule: BinSchedule) -> None:
        self._source, self._schedule = source, schedule
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def read_row(self, row: int, out: PackedBin | None = None) -> PackedBin:
        """Read and pack the bin of a row; errors as in `BinSource.read_bin`."""
        place = self._schedule.place(row)
        if place.epoch != self._epoch:
            self._epoch, self._order = place.epoch, self._source.plan.epoch_order(place.epoch, self._source.seed)
        number = FILLER if place.index == FILLER else int(self._order[place.index])
        return self._source.read_bin(number, row, out)


# ------------------------------------------------------------------------------------- the stream


def build_bin_dataset(
    source_ref: "ray.ObjectRef[BinSource]", schedule: BinSchedule, start_step: int, end_step: int, pack_in: PackIn
) -> Dataset:
    """Return the rows of steps [start_step, end_step), in stream order.

    Args:
        source_ref: The `BinSource`, stored once for all tasks.
        schedule: Which row belongs where.
        start_step: First optimizer step, counted over all epochs; a resumed run starts here and skips nothing.
        end_step: One past the last.
        pack_in: Where samples become bins.
    """
    quieten_ray_data()
    start = start_step * schedule.rows_per_step
    num_rows = (end_step - start_step) * schedule.rows_per_step
    rows_per_task = ROWS_PER_TASK if pack_in == "task" else ROW_NUMBERS_PER_TASK
    dataset = ray.data.range(num_rows, override_num_blocks=-(-num_rows // rows_per_task))

    # Two functions, and nothing of this module in the first: a task that deals in numbers alone imports no torch.
    def emit_numbers(batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for row in batch["id"]:
            yield {"row": np.array([start + row])}

    def emit_bins(batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        torch.set_num_threads(1)
        reader = RowReader(_get_source(source_ref), schedule)
        for row in batch["id"]:
            yield _to_columns(reader.read_row(int(start + row)))

    return dataset.map_batches(emit_bins if pack_in == "task" else emit_numbers, batch_size=rows_per_task)


def bin_execution_options() -> ExecutionOptions:
    """Return the options under which the stream keeps its order."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def quieten_ray_data() -> None:
    """Set what a stream of bins needs in the process that runs it: one row a block, no idle limit, no bars."""
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True


_SOURCES: dict[str, BinSource] = {}


def _get_source(source_ref: "ray.ObjectRef[BinSource]") -> BinSource:
    """Return the source, fetched once a process: its list of paths is long."""
    key = source_ref.hex()
    if key not in _SOURCES:
        _SOURCES.clear()
        _SOURCES[key] = ray.get(source_ref)
    return _SOURCES[key]


def _to_columns(packed: PackedBin) -> dict[str, NDArray[Any]]:
    """Return a bin as a batch of one row; bf16, which numpy lacks, travels as uint16."""
    scalars = {"row": packed.row, "number": packed.number, "num_tokens": packed.num_tokens}
    columns: dict[str, NDArray[Any]] = {name: np.array([value]) for name, value in scalars.items()}
    for name in TENSORS:
        tensor: torch.Tensor = packed.__dict__[name]
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        columns[name] = bits.numpy()[None]
    return columns


def _from_columns(columns: dict[str, NDArray[Any]]) -> PackedBin:
    """Return the bin of a batch of one row. The states are copied: what arrives is read-only shared memory."""
    tensors = {name: torch.from_numpy(columns[name][0].copy()) for name in TENSORS}
    for name in ("aux_states", "last_state"):
        if tensors[name].dtype == torch.uint16:
            tensors[name] = tensors[name].view(torch.bfloat16)
    return PackedBin(
        number=int(columns["number"][0]),
        row=int(columns["row"][0]),
        num_tokens=int(columns["num_tokens"][0]),
        **tensors,
    )


# --------------------------------------------------------------------------------------- on a rank


class StepBins(NamedTuple):
    """This rank's bins of one optimizer step.

    Attributes:
        step: Optimizer step, counted over all epochs.
        bins: `schedule.micro_steps` bins; valid until the next item is asked for, their buffers are used again.
        wait_s: Seconds the consumer waited for them.
    """

    step: int
    bins: list[PackedBin]
    wait_s: float


def iter_step_bins(
    shard: DataIterator,
    source: BinSource,
    schedule: BinSchedule,
    rank: int,
    steps: range,
    pack_in: PackIn,
    pin_memory: bool = False,
    num_prefetch: int = 2,
) -> Iterator[StepBins]:
    """Yield this rank's bins of each step in `steps`, read ahead by a thread.

    Args:
        shard: This rank's split of the dataset of exactly these steps.
        source: The samples and the plan.
        schedule: As given to `build_bin_dataset`.
        rank: This rank.
        steps: Optimizer steps, counted over all epochs.
        pack_in: As given to `build_bin_dataset`.
        pin_memory: Page-lock the buffers, for copies beside compute.
        num_prefetch: Steps kept ready.

    Raises:
        DataError: A row is missing or out of order, or a file cannot be used (`SampleFormatError`).
    """
    results: queue.Queue[tuple[int, list[PackedBin]] | BaseException] = queue.Queue(num_prefetch)
    is_closed = threading.Event()

    def offer(item: tuple[int, list[PackedBin]] | BaseException) -> None:
        while not is_closed.is_set():
            try:
                return results.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        # Whatever goes wrong in this thread belongs to the loop that waits for its bins.
        try:
            for item in _read_steps(shard, source, schedule, rank, steps, pack_in, pin_memory, num_prefetch + 2):
                offer(item)
                if is_closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001
            offer(error)

    thread = threading.Thread(target=produce, name="bins", daemon=True)
    thread.start()
    try:
        for _ in steps:
            start = time.perf_counter()
            item = results.get()
            if isinstance(item, BaseException):
                raise item
            yield StepBins(*item, wait_s=time.perf_counter() - start)
    finally:
        is_closed.set()


def _read_steps(
    shard: DataIterator,
    source: BinSource,
    schedule: BinSchedule,
    rank: int,
    steps: range,
    pack_in: PackIn,
    pin_memory: bool,
    num_buffers: int,
) -> Iterator[tuple[int, list[PackedBin]]]:
    """Yield (step, bins) in order; buffer sets go round in a ring of `num_buffers`.

    A consumer that holds one item, a queue of `num_buffers - 2` and the one being filled never share a buffer.
    """
    reader = RowReader(source, schedule)
    rows = iter(shard.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=schedule.micro_steps * 2))
    ring: list[list[PackedBin]] = []
    for turn, step in enumerate(steps):
        if pack_in == "worker" and len(ring) < num_buffers:
            ring.append(
                [
                    allocate_bin(source.plan.total_seq_len, source.spec, pin_memory=pin_memory)
                    for _ in range(schedule.micro_steps)
                ]
            )
        bins = []
        for micro_step in range(schedule.micro_steps):
            columns = next(rows, None)
            expected = schedule.row(step, rank, micro_step)
            found = None if columns is None else int(columns["row"][0])
            if columns is None or found != expected:
                raise DataError(f"rank {rank}, step {step}: expected row {expected} of the stream, found {found}.")
            if pack_in == "worker":
                buffers = ring[turn % num_buffers]
                buffers[micro_step] = reader.read_row(expected, buffers[micro_step])
                bins.append(buffers[micro_step])
            else:
                bins.append(_from_columns(columns))
        yield step, bins
