"""The plan: every sample once, nothing over the edge, full bins, one order for every world size."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eagle3_ray.data.packing import BinSchedule, PackingPlan, plan_bins

Int64s = NDArray[np.int64]

lengths_and_masks = st.lists(st.tuples(st.integers(1, 80), st.integers(0, 3)), min_size=0, max_size=120)


def _plan(lengths: Int64s, total_seq_len: int, seed: int = 0) -> PackingPlan:
    return plan_bins(lengths, np.ones_like(lengths), total_seq_len, seed)


# ------------------------------------------------------------------------------------- the plan


@given(lengths_and_masks, st.integers(2, 64), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_usable_sample_is_in_exactly_one_bin_and_no_bin_overflows(
    samples: list[tuple[int, int]], total_seq_len: int, seed: int
) -> None:
    num_tokens = np.array([tokens for tokens, _ in samples], dtype=np.int64)
    num_supervised = np.array([supervised for _, supervised in samples], dtype=np.int64)
    plan = plan_bins(num_tokens, num_supervised, total_seq_len, seed)
    usable = [number for number, (tokens, supervised) in enumerate(samples) if supervised > 0 and tokens >= 2]
    assert sorted(number for members in plan.bins for number in members.tolist()) == usable
    positions = {number: min(samples[number][0] - 1, total_seq_len) for number in usable}
    assert all(0 < sum(positions[number] for number in members.tolist()) <= total_seq_len for members in plan.bins)
    assert plan.num_dropped == len(samples) - len(usable)
    assert plan.num_cut == sum(samples[number][0] - 1 > total_seq_len for number in usable)
    capacity = len(plan.bins) * total_seq_len
    assert plan.fill_frac == pytest.approx(sum(positions.values()) / capacity if capacity else 0.0)


@given(lengths_and_masks, st.integers(2, 64))
@settings(max_examples=80, deadline=None)
def test_no_two_bins_could_be_one(samples: list[tuple[int, int]], total_seq_len: int) -> None:
    num_tokens = np.array([tokens for tokens, _ in samples], dtype=np.int64)
    plan = _plan(num_tokens, total_seq_len)
    filled = sorted(int(np.minimum(num_tokens[members] - 1, total_seq_len).sum()) for members in plan.bins)
    assert len(filled) < 2 or filled[0] + filled[1] > total_seq_len


CHAT_LIKE_LENGTHS = {
    "uniform 300..1700, 8192": (lambda rng: rng.integers(300, 1700, 6000), 8192),
    "lognormal, 8192": (lambda rng: rng.lognormal(6.5, 0.8, 6000).astype(np.int64) + 16, 8192),
    "lognormal, small, 8192": (lambda rng: rng.lognormal(6.5, 0.8, 300).astype(np.int64) + 16, 8192),
    "lognormal, 2048": (lambda rng: rng.lognormal(6.5, 0.8, 6000).astype(np.int64) + 16, 2048),
    "lognormal, 32768": (lambda rng: rng.lognormal(7.0, 1.0, 6000).astype(np.int64) + 16, 32768),
    "short turns, 2048": (lambda rng: rng.lognormal(4.5, 0.6, 6000).astype(np.int64) + 8, 2048),
}


@pytest.mark.parametrize("case", CHAT_LIKE_LENGTHS)
def test_chat_like_lengths_fill_97_percent(case: str) -> None:
    make_lengths, total_seq_len = CHAT_LIKE_LENGTHS[case]
    plan = _plan(make_lengths(np.random.default_rng(0)), total_seq_len)
    assert plan.fill_frac >= 0.97


@pytest.mark.parametrize("num_samples", [7, 40, 160])
def test_small_sets_need_no_more_bins_than_they_must(num_samples: int) -> None:
    # The last bin of a small set is filled as chance has it; no plan can have fewer bins than this one.
    lengths = np.random.default_rng(0).lognormal(6.5, 0.8, num_samples).astype(np.int64) + 16
    plan = _plan(lengths, 8192)
    assert len(plan.bins) == -(-int(np.minimum(lengths - 1, 8192).sum()) // 8192)


def test_groups_end_without_half_empty_bins() -> None:
    lengths = np.random.default_rng(0).integers(300, 1700, 30000)
    assert _plan(lengths, 8192).fill_frac >= 0.985


def test_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, 500)
    plan, again, other = _plan(lengths, 512), _plan(lengths, 512), _plan(lengths, 512, seed=1)
    assert plan.digest == again.digest
    assert all(np.array_equal(a, b) for a, b in zip(plan.bins, again.bins, strict=True))
    assert plan.digest != other.digest
    assert plan.digest != _plan(lengths, 513).digest


def test_digest_of_a_fixed_plan_never_changes() -> None:
    lengths = (np.arange(40, dtype=np.int64) * 37) % 91 + 2
    plan = _plan(lengths, 128)
    assert plan.digest == GOLDEN_DIGEST
    assert plan.epoch_order(1, seed=3).tolist() == GOLDEN_ORDER


GOLDEN_DIGEST = "209a8ada894af155524673a78790ef2bfd9cc133f3db43e0c533420f235061ab"
GOLDEN_ORDER = [7, 4, 0, 13, 9, 12, 1, 2, 5, 10, 8, 11, 6, 3]


def test_plan_survives_pickling() -> None:
    plan = _plan(np.arange(2, 90), 128)
    again = pickle.loads(pickle.dumps(plan))
    assert again.digest == plan.digest and len(again.bins) == len(plan.bins)


def test_nothing_usable_gives_an_empty_plan() -> None:
    plan = plan_bins(np.array([1, 50]), np.array([1, 0]), 32, 0)
    assert (len(plan.bins), plan.num_dropped, plan.fill_frac) == (0, 2, 0.0)


def test_a_hundred_thousand_samples_take_a_moment() -> None:
    # A million take about ten times as long and must stay under 10 s; 4 s leaves room for a busy machine.
    lengths = np.random.default_rng(0).integers(300, 1700, 100_000)
    start = time.process_time()
    _plan(lengths, 8192)
    assert time.process_time() - start < 4


def test_epochs_permute_the_bins() -> None:
    plan = _plan(np.random.default_rng(0).integers(2, 400, 300), 512)
    orders = [plan.epoch_order(epoch, seed=7) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(plan.bins)))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert np.array_equal(orders[2], plan.epoch_order(2, seed=7))
    assert not np.array_equal(orders[2], plan.epoch_order(2, seed=8))


# ------------------------------------------------------------------------------------- the schedule

schedules = st.builds(
    BinSchedule,
    num_bins=st.integers(1, 30),
    bins_per_step=st.integers(1, 9),
    num_workers=st.integers(1, 7),
    epochs=st.integers(1, 3),
)


@given(schedules)
@settings(max_examples=150, deadline=None)
def test_each_step_has_the_same_bins_whatever_the_number_of_workers(schedule: BinSchedule) -> None:
    rows = [schedule.place(row) for row in range(schedule.total_steps * schedule.rows_per_step)]
    for step in range(schedule.total_steps):
        epoch, step_of_epoch = divmod(step, schedule.steps_per_epoch)
        first = step_of_epoch * schedule.bins_per_step
        expected = list(range(first, min(first + schedule.bins_per_step, schedule.num_bins)))
        places = [place for place in rows if place.step == step]
        assert sorted(place.index for place in places if place.index != -1) == expected
        assert {place.epoch for place in places} == {epoch}


@given(schedules)
@settings(max_examples=80, deadline=None)
def test_every_rank_has_as_many_rows_in_each_step_and_row_inverts_place(schedule: BinSchedule) -> None:
    for row in range(schedule.total_steps * schedule.rows_per_step):
        place = schedule.place(row)
        assert 0 <= place.rank < schedule.num_workers and 0 <= place.micro_step < schedule.micro_steps
        assert place.rank == row % schedule.num_workers  # how streaming_split deals rows
        assert schedule.row(place.step, place.rank, place.micro_step) == row


def test_schedule_of_the_docstring() -> None:
    schedule = BinSchedule(num_bins=3, bins_per_step=2, num_workers=2, epochs=2)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.rows_per_step) == (2, 4, 2)
    assert [schedule.place(row).index for row in range(8)] == [0, 1, 2, -1, 0, 1, 2, -1]


def test_more_bins_than_workers_are_accumulated() -> None:
    schedule = BinSchedule(num_bins=5, bins_per_step=5, num_workers=2, epochs=1)
    assert schedule.micro_steps == 3
    rank_1 = [schedule.place(schedule.row(0, 1, micro_step)).index for micro_step in range(3)]
    assert rank_1 == [1, 3, -1]
