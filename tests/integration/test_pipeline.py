"""The stream of bins through Ray Data: dealt as planned, whole, in order, at any world size, and loud when broken."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.data import DataIterator
from ray.train import DataConfig

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.packing import FILLER, BinSchedule, plan_bins
from eagle3_ray.data.pipeline import (
    TENSORS,
    BinSource,
    PackIn,
    StepBins,
    bin_execution_options,
    build_bin_dataset,
    iter_step_bins,
)
from eagle3_ray.errors import DataError, SampleFormatError
from tests.makers import make_content, make_spec, write_samples

LENGTHS = [30, 17, 41, 25, 33, 12, 38, 29, 21, 44, 35]
TOTAL_SEQ_LEN = 64

pytestmark = pytest.mark.usefixtures("ray_cluster")


def make_source(folder: Path, data_format_version: int = 1, **changes: Any) -> BinSource:
    """Write the samples and plan them: seven bins or so."""
    write_samples(folder, LENGTHS, data_format_version, **changes)
    num_tokens = np.array(LENGTHS)
    num_supervised = num_tokens - 4  # the maker's prompts
    index = SampleIndex(str(folder), [f"data_{n}.pt" for n in range(len(LENGTHS))], num_tokens, num_supervised, 0)
    plan = plan_bins(num_tokens, num_supervised, TOTAL_SEQ_LEN, seed=3)
    assert 5 <= len(plan.bins) <= 8
    return BinSource(make_spec(data_format_version), index, plan, seed=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BinSource:
    return make_source(tmp_path_factory.mktemp("samples"))


def make_schedule(source: BinSource, bins_per_step: int, num_workers: int, epochs: int) -> BinSchedule:
    return BinSchedule(len(source.plan.bins), bins_per_step, num_workers, epochs)


def deal_out(source: BinSource, schedule: BinSchedule) -> list[list[list[int]]]:
    """Brute force: the bin numbers [step][rank] of a whole run; -1 is a filler."""
    steps, num_workers = [], schedule.num_workers
    for epoch in range(schedule.epochs):
        order = source.plan.epoch_order(epoch, source.seed).tolist()
        for start in range(0, len(order), schedule.bins_per_step):
            slots = order[start : start + schedule.bins_per_step]
            while len(slots) < schedule.bins_per_step or len(slots) % num_workers:
                slots.append(-1)
            steps.append([slots[rank::num_workers] for rank in range(num_workers)])
    return steps


def split_like_train(schedule: BinSchedule, steps: range) -> list[DataIterator]:
    """The shards of the ranks, by the very class that `TorchTrainer` is given."""
    dataset = build_bin_dataset(schedule, steps.start, steps.stop)
    node_ids = [ray.get_runtime_context().get_node_id()] * schedule.num_workers
    config = DataConfig(execution_options=bin_execution_options())
    return [shards["train"] for shards in config.configure({"train": dataset}, schedule.num_workers, None, node_ids)]


def copy_bin(packed: PackedBin) -> PackedBin:
    tensors = {name: packed.__dict__[name].clone() for name in TENSORS}
    return PackedBin(packed.number, packed.row, packed.num_tokens, **tensors)


def assert_same_bin(found: PackedBin, expected: PackedBin) -> None:
    assert (found.number, found.row, found.num_tokens) == (expected.number, expected.row, expected.num_tokens)
    for name in TENSORS:
        tensor, wanted = found.__dict__[name], expected.__dict__[name]
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name


Steps = list[tuple[int, list[PackedBin]]]


def as_packed(packed: PackedBin) -> PackedBin:
    """Prepares nothing: the buffers themselves are looked at."""
    return packed


def consume(
    shard: DataIterator, source: BinSource, schedule: BinSchedule, rank: int, steps: range, pack_in: PackIn
) -> Steps:
    """Everything a rank gets, copied: buffers are used again."""
    items = iter_step_bins(shard, source, schedule, rank, steps, pack_in, as_packed)
    return [(item.step, [copy_bin(packed) for packed in item.bins]) for item in items]


def consume_all(
    shards: list[DataIterator], source: BinSource, schedule: BinSchedule, steps: range, pack_in: PackIn
) -> list[Steps]:
    """What each rank gets, all reading at once."""
    with ThreadPoolExecutor(len(shards)) as pool:
        futures = [
            pool.submit(consume, shard, source, schedule, rank, steps, pack_in) for rank, shard in enumerate(shards)
        ]
        return [future.result(timeout=60) for future in futures]


def assert_dealt_out(by_rank: list[Steps], source: BinSource, schedule: BinSchedule, steps: range) -> None:
    """Numbers equal the brute force, contents what `read_bin` gives, rows rise by one over the ranks."""
    expected, num_workers = deal_out(source, schedule), schedule.num_workers
    for rank, items in enumerate(by_rank):
        assert [step for step, _ in items] == list(steps)
        for step, bins in items:
            assert [packed.number for packed in bins] == expected[step][rank]
            for micro_step, packed in enumerate(bins):
                row = (step * len(bins) + micro_step) * num_workers + rank
                assert_same_bin(packed, source.read_bin(packed.number, row))


def assert_every_bin_once(by_rank: list[Steps], schedule: BinSchedule, epoch: int) -> None:
    first = epoch * schedule.steps_per_epoch
    steps = range(first, first + schedule.steps_per_epoch)
    numbers = [packed.number for items in by_rank for step, bins in items if step in steps for packed in bins]
    assert sorted(number for number in numbers if number != FILLER) == list(range(schedule.num_bins))


@pytest.mark.parametrize("bins_per_step", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_rows_are_dealt_as_planned_from_mid_run_over_an_epochs_end(
    num_workers: int, bins_per_step: int, source: BinSource
) -> None:
    schedule = make_schedule(source, bins_per_step, num_workers, epochs=2)
    steps = range(1, schedule.total_steps)
    by_rank = consume_all(split_like_train(schedule, steps), source, schedule, steps, "worker")
    assert_dealt_out(by_rank, source, schedule, steps)
    assert_every_bin_once(by_rank, schedule, epoch=1)


@pytest.mark.parametrize(("num_workers", "bins_per_step"), [(1, 1), (2, 3), (3, 4)])
def test_tasks_deal_the_same_bins_as_workers_pack(num_workers: int, bins_per_step: int, source: BinSource) -> None:
    schedule = make_schedule(source, bins_per_step, num_workers, epochs=2)
    steps = range(1, schedule.total_steps)
    by_rank = consume_all(split_like_train(schedule, steps), source, schedule, steps, "task")
    assert_dealt_out(by_rank, source, schedule, steps)
    assert_every_bin_once(by_rank, schedule, epoch=1)


def test_states_in_float32_cross_the_object_store_as_they_are(tmp_path: Path) -> None:
    source = make_source(tmp_path, dtype=torch.float32)
    schedule = make_schedule(source, len(source.plan.bins), 1, epochs=1)
    by_rank = consume_all(split_like_train(schedule, range(1)), source, schedule, range(1), "task")
    assert {packed.last_state.dtype for _, bins in by_rank[0] for packed in bins} == {torch.float32}
    assert_dealt_out(by_rank, source, schedule, range(1))


def test_normed_states_of_the_other_format_stream_as_well(tmp_path: Path) -> None:
    source = make_source(tmp_path, data_format_version=0)
    schedule = make_schedule(source, 2, 2, epochs=1)
    steps = range(schedule.total_steps)
    by_rank = consume_all(split_like_train(schedule, steps), source, schedule, steps, "task")
    assert_dealt_out(by_rank, source, schedule, steps)


@pytest.mark.parametrize(("num_workers", "pack_in"), [(2, "task"), (3, "worker")])
def test_validation_is_read_alike_pass_after_pass(num_workers: int, pack_in: PackIn, source: BinSource) -> None:
    schedule = make_schedule(source, num_workers, num_workers, epochs=1)
    steps = range(schedule.steps_per_epoch)
    shards = split_like_train(schedule, steps)
    for _ in range(2):
        by_rank = consume_all(shards, source, schedule, steps, pack_in)
        assert_dealt_out(by_rank, source, schedule, steps)
        assert_every_bin_once(by_rank, schedule, epoch=0)


def test_a_validation_set_smaller_than_the_world_is_read_by_all_ranks_with_fillers(source: BinSource) -> None:
    plan = plan_bins(np.array(LENGTHS), np.where(np.arange(len(LENGTHS)) < 2, 5, 0), TOTAL_SEQ_LEN, seed=0)
    source = BinSource(source.spec, source.index, plan, seed=0)
    schedule = make_schedule(source, 3, 3, epochs=1)
    by_rank = consume_all(split_like_train(schedule, range(1)), source, schedule, range(1), "worker")
    assert [[packed.number for packed in bins] for items in by_rank for _, bins in items] == [[0], [-1], [-1]]
    filler = by_rank[2][0][1][0]
    assert filler.num_tokens == 0 and not filler.loss_mask.any() and (filler.document_ids == -1).all()


# --------------------------------------------------------------------------- reading ahead, on one rank


class FakeShard:
    """A shard without Ray that deals these rows, waits where it is told to, and knows how many it dealt."""

    def __init__(self, rows: Iterable[int], delay_s: float = 0.0) -> None:
        self._rows, self._delay_s, self.num_dealt = rows, delay_s, 0

    def iter_batches(self, **_: Any) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            time.sleep(self._delay_s)
            self.num_dealt += 1
            yield {"first_row": np.array([row]), "num_rows": np.array([1])}


def iter_fake(
    shard: FakeShard, source: BinSource, schedule: BinSchedule, steps: range, rank: int = 0, **options: Any
) -> Generator[StepBins[PackedBin]]:
    """What a rank makes of a fake shard, packing in the worker."""
    stand_in: Any = shard
    items = iter_step_bins(stand_in, source, schedule, rank, steps, "worker", as_packed, **options)
    assert isinstance(items, Generator)
    return items


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("num_prefetch", [1, 2])
def test_a_slow_consumer_never_sees_the_buffers_it_holds_change(num_prefetch: int, source: BinSource) -> None:
    """At every item the reader gets the time to run ahead as far as it may: it must stop short of what is held."""
    schedule = make_schedule(source, 2, 1, epochs=4)
    shard = FakeShard(range(schedule.total_steps * schedule.rows_per_step))
    expected, addresses = deal_out(source, schedule), set()
    for item in iter_fake(shard, source, schedule, range(schedule.total_steps), num_prefetch=num_prefetch):
        # One held, some ready, one filled and waiting for its place.
        num_steps_read = min(item.step + 1 + num_prefetch + 1, schedule.total_steps)
        wait_until(lambda n=num_steps_read: shard.num_dealt == n * 2, "the reader does not read ahead")  # type: ignore[misc]
        assert [packed.number for packed in item.bins] == expected[item.step][0]
        for packed in item.bins:
            assert_same_bin(packed, source.read_bin(packed.number, packed.row))
            addresses.add(packed.aux_states.data_ptr())
    assert schedule.total_steps > 2 * (num_prefetch + 2)
    assert len(addresses) == (num_prefetch + 2) * schedule.micro_steps  # reused, and no more than needed


def test_an_item_tells_how_long_it_was_waited_for(source: BinSource) -> None:
    schedule = make_schedule(source, 1, 1, epochs=1)
    shard = FakeShard(range(schedule.total_steps), delay_s=0.5)
    items = iter_fake(shard, source, schedule, range(schedule.total_steps))
    assert next(items).wait_s > 0.4
    wait_until(lambda: shard.num_dealt >= 4, "the reader does not read ahead")
    items.close()


# ------------------------------------------------------------------------------------- what goes wrong


def lengthen(path: Path) -> None:
    torch.save(make_content(20 + 31), path)


def put_nan(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["hidden_states"][2][7, 5] = torch.nan
    torch.save(content, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


BREAKAGES: list[tuple[Callable[[Path], None], str]] = [
    (lengthen, r"data_4.pt: has 51 tokens, had 33 when it was indexed. Do not change samples during a run"),
    (put_nan, r"data_4.pt: auxiliary state 2 has NaN or Inf.*token 7"),
    (truncate, r"data_4.pt: "),
    (Path.unlink, r"data_4.pt: "),
]


@pytest.mark.parametrize(("breakage", "text"), BREAKAGES, ids=["length", "nan", "cut_short", "gone"])
def test_a_file_that_changed_since_the_index_is_an_error_in_the_consumer(
    breakage: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    source = make_source(tmp_path)
    breakage(tmp_path / "data_4.pt")
    schedule = make_schedule(source, 1, 1, epochs=1)
    with pytest.raises(SampleFormatError, match=text) as caught:
        list(iter_fake(FakeShard(range(schedule.total_steps)), source, schedule, range(schedule.total_steps)))
    assert type(caught.value) is SampleFormatError
    wait_for_no_reader()


@pytest.mark.parametrize(("breakage", "text"), BREAKAGES[:2], ids=["length", "nan"])
def test_a_file_that_changed_is_the_same_error_when_tasks_read_it(
    breakage: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    source = make_source(tmp_path)
    breakage(tmp_path / "data_4.pt")
    schedule = make_schedule(source, 1, 1, epochs=1)
    steps = range(schedule.total_steps)
    (shard,) = split_like_train(schedule, steps)
    with pytest.raises(SampleFormatError, match=text) as caught:
        consume(shard, source, schedule, 0, steps, "task")
    assert type(caught.value) is SampleFormatError


def consume_rank_one(rows: list[int], source: BinSource) -> list[list[int]]:
    """Rows of the bins of steps 2 and 3, for rank 1 of two with one bin a step each: it expects 5 and 7."""
    schedule = make_schedule(source, 2, 2, epochs=2)
    items = iter_fake(FakeShard(rows), source, schedule, range(2, 4), rank=1)
    return [[packed.row for packed in item.bins] for item in items]


def test_a_row_out_of_order_or_missing_is_an_error_and_never_trained_on(source: BinSource) -> None:
    assert consume_rank_one([5, 7], source) == [[5], [7]]
    with pytest.raises(DataError, match=r"rank 1, step 2: expected row 5 of the stream, found 4\."):
        consume_rank_one([4, 6], source)
    with pytest.raises(DataError, match=r"rank 1, step 3: expected row 7 of the stream, found 9\."):
        consume_rank_one([5, 9], source)
    with pytest.raises(DataError, match=r"rank 1, step 3: expected row 7 of the stream, found None\."):
        consume_rank_one([5], source)


# ------------------------------------------------------------------------------------------- its end


def count_readers() -> int:
    return sum(thread.name == "bins" for thread in threading.enumerate())


def wait_for_no_reader() -> None:
    wait_until(lambda: count_readers() == 0, "the reader's thread is still alive")


def test_closing_early_ends_the_reader_and_its_stream(source: BinSource) -> None:
    wait_for_no_reader()
    schedule = make_schedule(source, 1, 1, epochs=4)
    steps = range(schedule.total_steps)
    (shard,) = split_like_train(schedule, steps)
    items = iter_step_bins(shard, source, schedule, 0, steps, "task", as_packed)
    assert isinstance(items, Generator) and next(items).step == 0 and count_readers() == 1
    items.close()
    wait_for_no_reader()


@pytest.mark.parametrize("num_taken", [1, 3])
def test_closing_ends_a_reader_that_waits_for_a_place(num_taken: int, source: BinSource) -> None:
    wait_for_no_reader()
    schedule = make_schedule(source, 1, 1, epochs=4)
    shard = FakeShard(range(schedule.total_steps))
    items = iter_fake(shard, source, schedule, range(schedule.total_steps))
    for _ in range(num_taken):
        next(items)
    wait_until(lambda: shard.num_dealt == num_taken + 3, "the reader does not read ahead")
    items.close()
    wait_for_no_reader()
    assert shard.num_dealt == num_taken + 3


def test_reading_to_the_end_ends_the_reader_too(source: BinSource) -> None:
    consume_rank_one([5, 7], source)
    wait_for_no_reader()
