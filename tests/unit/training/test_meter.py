"""Sums over ranks against a brute force, and a clock that runs in steps alone."""

from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.intervals import cross_moments
from eagle3_ray.metrics import TttSums
from eagle3_ray.training.meter import Meter, Spread, peak_memory_bytes
from tests.unit.training.ranks import run_on_ranks

CPU = torch.device("cpu")
NUM_TTT_STEPS, NUM_STEPS = 3, 4

# Seconds of rank 0 and rank 1: of a step, waited in it, and spent on other things after it.
STEP_S, WAIT_S, OTHER_S = (2.0, 4.0), (0.5, 1.0), 100.0


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sums_of(rank: int, step: int) -> Tensor:
    """[6, P] float64, whole numbers, so that any order of adding gives the same."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randint(1000, (6, NUM_TTT_STEPS), generator=generator).double()


def tokens_of(rank: int, step: int) -> int:
    return 100 + 7 * rank + step


def as_array(sums: TttSums) -> list[list[float]]:
    """[6][P], in the order of the fields."""
    return [getattr(sums, field.name).tolist() for field in fields(sums)]


Reduced = tuple[list[list[float]], dict[str, float]]


def meter_two_windows() -> list[Reduced]:
    """Two logged points of two steps each, with other work after every step."""
    rank, clock = dist.get_rank(), Clock()
    reduced = []
    with mock.patch("eagle3_ray.training.meter.time.perf_counter", clock):
        meter = Meter(NUM_TTT_STEPS, CPU)
        clock.now += OTHER_S
        meter.restart_clock()
        for step in range(NUM_STEPS):
            clock.now += STEP_S[rank]
            meter.add(sums_of(rank, step), tokens_of(rank, step), WAIT_S[rank])
            if step % 2 == 1:
                clock.now += OTHER_S
                sums, speed = meter.reduce()
                reduced.append((as_array(sums), speed))
            clock.now += OTHER_S
            meter.restart_clock()
    return reduced


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Reduced]:
    windows: list[Reduced] = run_on_ranks(2, meter_two_windows, tmp_path_factory.mktemp("ranks"))
    return windows


@pytest.mark.parametrize("window", [0, 1])
def test_sums_of_two_ranks_are_those_of_their_own_steps_alone(window: int, of_two_ranks: list[Reduced]) -> None:
    sums, _ = of_two_ranks[window]
    steps = (2 * window, 2 * window + 1)
    expected = sum(sums_of(rank, step).numpy() for rank in (0, 1) for step in steps)
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("window", [0, 1])
def test_speed_counts_all_ranks_and_leaves_out_what_lies_between_steps(
    window: int, of_two_ranks: list[Reduced]
) -> None:
    _, speed = of_two_ranks[window]
    steps = (2 * window, 2 * window + 1)
    num_tokens = sum(tokens_of(rank, step) for rank in (0, 1) for step in steps)
    # Ranks run side by side: two steps of 2 s on one and of 4 s on the other are 6 s on average.
    assert speed["tokens_per_s"] == pytest.approx(num_tokens / 6.0, rel=1e-12)
    assert speed["data_wait_frac"] == pytest.approx((2 * 0.5 + 2 * 1.0) / (2 * 2.0 + 2 * 4.0), rel=1e-12)


def test_a_meter_works_without_a_process_group() -> None:
    meter = Meter(NUM_TTT_STEPS, CPU)
    meter.add(sums_of(0, 0), 10, 0.0)
    sums, speed = meter.reduce()
    np.testing.assert_array_equal(as_array(sums), sums_of(0, 0).numpy())
    assert speed["tokens_per_s"] > 0 and speed["data_wait_frac"] == 0.0


def test_small_addends_are_not_lost_in_a_large_sum() -> None:
    meter = Meter(NUM_TTT_STEPS, CPU)
    for value in (2.0**30, *[0.25] * 64):
        meter.add(torch.full((6, NUM_TTT_STEPS), value, dtype=torch.float32), 1, 0.0)
    sums, _ = meter.reduce()
    assert as_array(sums)[0][0] == 2.0**30 + 16.0  # float32 would leave 2**30


def test_memory_of_a_cpu_is_the_most_that_was_resident() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident_kib = int(status["VmRSS"].split()[0])
    # The kernel counts pages in batches for each thread: a few MiB apart at most.
    assert peak_memory_bytes(CPU) >= (resident_kib - 16 * 1024) * 1024
    before = peak_memory_bytes(CPU)
    large = torch.ones(before // 4 + 2**24)  # float32: larger than everything so far
    assert peak_memory_bytes(CPU) > before and len(large) > 0


def bins_of(rank: int) -> list[Tensor]:
    """[6, P] of three bins; one of them holds nothing."""
    return [sums_of(rank, 0), torch.zeros(6, NUM_TTT_STEPS, dtype=torch.float64), sums_of(rank, 1)]


def spread_over_bins() -> list[list[float]]:
    spread = Spread(NUM_TTT_STEPS, CPU)
    for sums in bins_of(dist.get_rank()):
        spread.add(sums)
    moments: list[list[float]] = spread.reduce().tolist()
    return moments


def test_a_spread_of_two_ranks_is_that_of_all_their_bins(tmp_path: Path) -> None:
    found: list[list[float]] = run_on_ranks(2, spread_over_bins, tmp_path)
    totals = [TttSums.from_array(sums.numpy()) for rank in (0, 1) for sums in bins_of(rank)]
    expected = cross_moments([t.prefix_right for t in totals], [t.prefix_count for t in totals])
    assert found == expected.tolist()
    assert expected[-1, -1] == 4
