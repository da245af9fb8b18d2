"""Which rank is named when nothing moves any more."""

import pytest

from eagle3_ray.training.pulses import Mark, Pulse, Pulses, Stuck, find_culprits

TIMEOUT_S = 100.0
COMPUTING, READING = Mark(7, None), Mark(7, None, is_reading=True)


def culprits(**pulses: Pulse) -> list[int]:
    """Numbers of the culprits at time 1000, of ranks r0, r1, ..."""
    by_rank = {int(name[1:]): pulse for name, pulse in pulses.items()}
    return [stuck.rank for stuck in find_culprits(by_rank, 1000.0, TIMEOUT_S)]


def test_nobody_is_stuck_as_long_as_there_was_progress_a_while_ago() -> None:
    assert culprits() == []
    assert culprits(r0=Pulse(COMPUTING, 901.0, 1000.0), r1=Pulse(READING, 900.0, 995.0)) == []


@pytest.mark.parametrize(
    ("culprit", "why"),
    [
        (Pulse(COMPUTING, 850.0, 851.0), "its process is not heard of"),
        (Pulse(READING, 850.0, 999.0), "it waits for its bins, and the others for it"),
        (Pulse(Mark(6, None), 850.0, 999.0), "it is a step behind"),
        (Pulse(Mark(7, 3), 850.0, 999.0), "it still validates, before that step"),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(culprit: Pulse, why: str) -> None:
    others = Pulse(COMPUTING, 850.0, 999.0)
    assert culprits(r0=others, r1=others, r2=culprit, r3=others) == [2], why


def test_a_silent_rank_comes_before_one_that_reads_and_all_are_named_where_none_stands_out() -> None:
    stands, reads = Pulse(COMPUTING, 850.0, 851.0), Pulse(READING, 850.0, 999.0)
    assert culprits(r0=reads, r1=stands) == [1]
    computes = Pulse(COMPUTING, 850.0, 999.0)
    assert culprits(r0=computes, r1=computes) == [0, 1]


@pytest.mark.parametrize("culprit", [Pulse(COMPUTING, 902.0, 904.0), Pulse(READING, 902.0, 999.0)])
def test_the_culprit_is_named_though_it_was_seen_to_get_there_a_little_later_than_those_that_wait(
    culprit: Pulse,
) -> None:
    waits = Pulse(COMPUTING, 899.0, 999.0)
    assert culprits(r0=waits, r1=culprit) == [1]


def test_a_save_may_take_as_long_as_it_takes_and_the_time_of_the_others_starts_when_it_is_over() -> None:
    pulses, saving = Pulses(), Mark(7, None, is_saving=True)
    for now_s in range(0, 1000, 50):
        assert pulses.take("a", 2, 0, saving, now_s, TIMEOUT_S) == []
        assert pulses.take("a", 2, 1, COMPUTING, now_s + 1, TIMEOUT_S) == []
    assert pulses.take("a", 2, 0, COMPUTING, 1000, TIMEOUT_S) == []
    assert pulses.take("a", 2, 1, COMPUTING, 1049, TIMEOUT_S) == []
    (stuck,) = pulses.take("a", 2, 0, Mark(8, None), 1060, TIMEOUT_S)
    assert stuck.rank == 1 and stuck.for_s == 109


def test_a_process_that_stands_still_is_named_though_another_saves() -> None:
    pulses, saving = Pulses(), Mark(7, None, is_saving=True)
    pulses.take("a", 2, 1, COMPUTING, 0, TIMEOUT_S)
    for now_s in (0, 50, 100):
        assert pulses.take("a", 2, 0, saving, now_s, TIMEOUT_S) == []
    assert [stuck.rank for stuck in pulses.take("a", 2, 0, saving, 101, TIMEOUT_S)] == [1]


def test_progress_starts_the_time_anew_and_one_rank_is_told_once() -> None:
    pulses = Pulses()
    assert pulses.take("a", 2, 0, COMPUTING, 0.0, TIMEOUT_S) == []
    assert pulses.take("a", 2, 1, READING, 10.0, TIMEOUT_S) == []
    assert pulses.take("a", 2, 0, Mark(8, None), 90.0, TIMEOUT_S) == []
    assert pulses.take("a", 2, 1, READING, 109.0, TIMEOUT_S) == []
    assert pulses.take("a", 2, 0, Mark(8, None), 115.0, TIMEOUT_S) == [Stuck(1, READING, 105.0, False)]
    assert pulses.take("a", 2, 0, Mark(8, None), 116.0, TIMEOUT_S) == []


def test_workers_that_were_started_again_are_not_held_to_what_others_told_before() -> None:
    pulses = Pulses()
    pulses.take("a", 2, 0, COMPUTING, 0.0, TIMEOUT_S)
    assert pulses.take("b", 2, 1, Mark(3, None, is_reading=True), 500.0, TIMEOUT_S) == []
    assert pulses.take("b", 2, 1, Mark(3, None, is_reading=True), 599.0, TIMEOUT_S) == []


def test_a_rank_that_stands_still_before_it_was_ever_heard_is_named() -> None:
    pulses = Pulses()
    for now_s in (0, 50, 100):
        assert pulses.take("a", 2, 0, COMPUTING, now_s, TIMEOUT_S) == []
    assert pulses.take("a", 2, 0, COMPUTING, 101, TIMEOUT_S) == [Stuck(1, COMPUTING, 101, True)]
