"""Plan -> Ray Data stream -> bins on a rank, in plan order, checked.

Ray Data deals out the rows of a run in the order of `BinSchedule`: blocks of one deal each, some steps of one rank,
which `streaming_split` gives to the ranks in turn. The documentation promises no such thing, so each rank checks every
row's number. It packs the samples into buffers that it uses again; `pack_in` says where they are read and checked:

    "worker"   in the rank's own thread            page cache -> buffer: one copy of a byte
    "task"     in Ray tasks, bins ahead of it      page cache -> object store -> buffer: two copies

A task returns its samples as views of the mapped files, which Ray writes into the object store as they are; on the rank
they are views of the object store. The rank owns them: they go when it goes, and Ray reads them again should a node
be lost. A thread keeps the next bins ready, and tells how long the step had to wait for them.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import DataContext, DataIterator, Dataset, ExecutionOptions
from ray.exceptions import RayTaskError

from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.batch import PackedBin, allocate_bin
from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.samples import Sample, SampleSpec, raise_bad_file
from eagle3_ray.data.source import BinOrder, BinSource, IndexedFile, read_files
from eagle3_ray.errors import DataError, Eagle3RayError

__all__ = ["BinSource", "PackIn", "StepBins", "TENSORS", "bin_execution_options", "build_bin_dataset", "iter_step_bins"]

PackIn = Literal["worker", "task"]

MAX_DEALS, MIN_STEPS_PER_DEAL = 256, 1024  # a deal costs Ray Data some milliseconds, whatever is in it
# One that takes less has more processes than CPUs; Ray ends those beyond that number when they are idle, and the next
# bin waits for another one to start.
CPUS_PER_TASK = 1
BYTES_AHEAD = 2**30  # of a rank, read or in the object store; more of them only spread over more memory
MIN_BINS_AHEAD, MAX_BINS_AHEAD = 2, 16
TENSORS = ("input_ids", "aux_states", "last_state", "loss_mask", "document_ids", "position_ids")


# ------------------------------------------------------------------------------------- the stream


def build_bin_dataset(schedule: BinSchedule, start_step: int, end_step: int) -> Dataset:
    """Return the rows of steps [start_step, end_step), dealt out to the ranks: deal k is for rank k mod W.

    A deal is a row of Ray Data's: the first of a rank's rows (every W-th from there), and how many they are. Nothing is
    read to make it, so that no task has to start before the first bin.

    Args:
        schedule: Which row belongs where.
        start_step: First optimizer step, counted over all epochs; a resumed run starts here and skips nothing.
        end_step: One past the last.
    """
    quieten_ray_data()
    num_turns = max(1, MAX_DEALS // schedule.num_workers)
    steps_per_deal = max(MIN_STEPS_PER_DEAL, -(-(end_step - start_step) // num_turns))
    deals = [
        {"first_row": schedule.row(first, rank, 0), "num_rows": (last - first) * schedule.micro_steps}
        for first in range(start_step, end_step, steps_per_deal)
        for last in (min(first + steps_per_deal, end_step),)
        for rank in range(schedule.num_workers)
    ]
    return ray.data.from_items(deals, override_num_blocks=len(deals))


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


# --------------------------------------------------------------------------------------- in a task


class SampleArrays(NamedTuple):
    """A sample on its way through the object store: no longer than a bin, bf16, which numpy lacks, as uint16."""

    path: str
    input_ids: NDArray[Any]
    loss_mask: NDArray[Any]
    states: list[NDArray[Any]]


def read_arrays(
    files: list[IndexedFile], spec: SampleSpec, total_seq_len: int
) -> tuple[list[SampleArrays], list[BadFile]]:
    """Read and check the samples of a bin, in a Ray task; their arrays are views of the files."""
    torch.set_num_threads(1)
    samples, bad_files = read_files(files, spec)
    return [_to_arrays(sample, total_seq_len + 1) for sample in samples], bad_files


def _to_arrays(sample: Sample, num_tokens: int) -> SampleArrays:
    """Return the first tokens of a sample."""
    states = [state[:num_tokens] for state in (*sample.aux_states, sample.last_state)]
    bits = [state.view(torch.uint16) if state.dtype == torch.bfloat16 else state for state in states]
    return SampleArrays(
        path=sample.path,
        input_ids=sample.input_ids[:num_tokens].numpy(),
        loss_mask=sample.loss_mask[:num_tokens].numpy(),
        states=[state.numpy() for state in bits],
    )


def to_sample(arrays: SampleArrays) -> Sample:
    """Return the sample, whose tensors are views of read-only shared memory."""
    states = [torch.from_dlpack(state) for state in arrays.states]
    *aux_states, last_state = [state.view(torch.bfloat16) if state.dtype == torch.uint16 else state for state in states]
    return Sample(
        path=arrays.path,
        input_ids=torch.from_dlpack(arrays.input_ids),
        loss_mask=torch.from_dlpack(arrays.loss_mask),
        aux_states=tuple(aux_states),
        last_state=last_state,
    )


# --------------------------------------------------------------------------------------- on a rank


Ready = TypeVar("Ready")


class StepBins(NamedTuple, Generic[Ready]):
    """This rank's bins of one optimizer step.

    Attributes:
        step: Optimizer step, counted over all epochs.
        bins: `schedule.micro_steps` bins as `prepare` made them; the buffers of the packed ones are used again once the
            next item is asked for.
        wait_s: Seconds the consumer waited for them.
    """

    step: int
    bins: list[Ready]
    wait_s: float


def iter_step_bins(
    shard: DataIterator | None,
    source: BinSource,
    schedule: BinSchedule,
    rank: int,
    steps: range,
    pack_in: PackIn,
    prepare: Callable[[PackedBin], Ready],
    pin_memory: bool = False,
    num_prefetch: int = 2,
    leave_out: Callable[[BadFile], object] = raise_bad_file,
) -> Iterator[StepBins[Ready]]:
    """Yield this rank's bins of each step in `steps`, read and prepared ahead by a thread from the call on.

    Args:
        shard: This rank's split of the dataset of exactly these steps; None to go by the schedule without being dealt
            rows, as a pass that is always made as a whole can.
        source: The samples and the plan.
        schedule: As given to `build_bin_dataset`.
        rank: This rank.
        steps: Optimizer steps, counted over all epochs.
        pack_in: Where samples are read and checked.
        prepare: Makes of a packed bin what the step takes, in the thread.
        pin_memory: Page-lock the buffers, for copies beside compute.
        num_prefetch: Steps kept ready.
        leave_out: Called with each file that cannot be used, in the thread; its bin goes without it.

    Raises:
        DataError: A row is missing or out of order, or what `leave_out` raises.
    """
    results: queue.Queue[tuple[int, list[Ready]] | BaseException] = queue.Queue(num_prefetch)
    is_closed = threading.Event()

    def offer(item: tuple[int, list[Ready]] | BaseException) -> None:
        while not is_closed.is_set():
            try:
                return results.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        # Whatever goes wrong in this thread belongs to the loop that waits for its bins.
        try:
            read = _read_steps(shard, source, schedule, rank, steps, pack_in, pin_memory, num_prefetch + 2, leave_out)
            for step, bins in read:
                offer((step, [prepare(packed) for packed in bins]))
                if is_closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001
            offer(error)

    def take() -> Iterator[StepBins[Ready]]:
        try:
            for _ in steps:
                start = time.perf_counter()
                item = results.get()
                if isinstance(item, BaseException):
                    raise item
                yield StepBins(*item, wait_s=time.perf_counter() - start)
        finally:
            is_closed.set()

    threading.Thread(target=produce, name="bins", daemon=True).start()
    return take()


def _read_steps(
    shard: DataIterator | None,
    source: BinSource,
    schedule: BinSchedule,
    rank: int,
    steps: range,
    pack_in: PackIn,
    pin_memory: bool,
    num_buffers: int,
    leave_out: Callable[[BadFile], object],
) -> Iterator[tuple[int, list[PackedBin]]]:
    """Yield (step, bins) in order; buffer sets go round in a ring of `num_buffers`.

    A consumer that holds one item, a queue of `num_buffers - 2` and the one being filled never share a buffer.
    """
    expected = (schedule.row(step, rank, number) for step in steps for number in range(schedule.micro_steps))
    rows = expected if shard is None else _check_rows(iter_dealt(shard, schedule.num_workers), expected, schedule)
    bins = _iter_in_tasks(source, schedule, rows) if pack_in == "task" else _iter_here(source, schedule, rows)
    ring: list[list[PackedBin]] = []
    for turn, step in enumerate(steps):
        if len(ring) < num_buffers:
            ring.append(
                [
                    allocate_bin(source.plan.total_seq_len, source.spec, pin_memory=pin_memory)
                    for _ in range(schedule.micro_steps)
                ]
            )
        buffers = ring[turn % num_buffers]
        for micro_step in range(schedule.micro_steps):
            row, number, samples, bad_files = next(bins)
            for file in bad_files:
                leave_out(file)
            buffers[micro_step] = source.pack_bin(samples, number, row, buffers[micro_step])
        yield step, list(buffers)


def iter_dealt(shard: DataIterator, num_workers: int) -> Iterator[int]:
    """Yield the numbers of the rows that a rank is dealt."""
    for deal in shard.iter_batches(batch_size=1, batch_format="numpy"):
        first, number = int(deal["first_row"][0]), int(deal["num_rows"][0])
        yield from range(first, first + number * num_workers, num_workers)


def _check_rows(dealt: Iterator[int], expected: Iterator[int], schedule: BinSchedule) -> Iterator[int]:
    """Yield the rows as they were dealt.

    Raises:
        DataError: A row is missing or out of order.
    """
    for row in expected:
        found = next(dealt, None)
        if found != row:
            place = schedule.place(row)
            raise DataError(f"rank {place.rank}, step {place.step}: expected row {row} of the stream, found {found}.")
        yield row


class ReadBin(NamedTuple):
    """The files of a row's bin, read: those that are samples, and those that are none any more."""

    row: int
    number: int
    samples: list[Sample]
    bad_files: list[BadFile]


def _iter_here(source: BinSource, schedule: BinSchedule, rows: Iterator[int]) -> Iterator[ReadBin]:
    """Yield the bins of these rows, read in this process."""
    order = BinOrder(source, schedule)
    for row in rows:
        number = order.number(row)
        yield ReadBin(row, number, *read_files(source.files_of_bin(number), source.spec))


def _iter_in_tasks(source: BinSource, schedule: BinSchedule, rows: Iterator[int]) -> Iterator[ReadBin]:
    """Yield the bins of these rows, read by Ray tasks some bins ahead."""
    order = BinOrder(source, schedule)
    remote = ray.remote(num_cpus=CPUS_PER_TASK)(read_arrays)
    spec_ref = ray.put(source.spec)
    ahead: deque[tuple[int, int, ray.ObjectRef[tuple[list[SampleArrays], list[BadFile]]]]] = deque()
    num_ahead = _num_bins_ahead(source)
    for row in rows:
        number = order.number(row)
        files = source.files_of_bin(number)
        ahead.append((row, number, remote.remote(files, spec_ref, source.plan.total_seq_len)))
        if len(ahead) > num_ahead:
            yield _fetch(*ahead.popleft())
    while ahead:
        yield _fetch(*ahead.popleft())


def _num_bins_ahead(source: BinSource) -> int:
    """Return how many bins of a rank are read or lie in the object store at a time."""
    bytes_of_token = 2 * (source.spec.num_aux_layers + 1) * source.spec.hidden_size
    num_fitting = BYTES_AHEAD // (source.plan.total_seq_len * bytes_of_token)
    return min(MAX_BINS_AHEAD, max(MIN_BINS_AHEAD, num_fitting))


def _fetch(row: int, number: int, ref: "ray.ObjectRef[tuple[list[SampleArrays], list[BadFile]]]") -> ReadBin:
    """Wait for the samples of a bin."""
    try:
        arrays, bad_files = ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Eagle3RayError):
            raise error.cause from None  # Ray's wrapping adds nothing but a remote traceback
        raise
    return ReadBin(row, number, [to_sample(sample) for sample in arrays], bad_files)
