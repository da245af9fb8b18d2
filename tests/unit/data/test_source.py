"""Which bin a row of the stream holds, and which files a bin."""

from pathlib import Path

import numpy as np
import pytest

from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.packing import FILLER, BinSchedule, plan_bins
from eagle3_ray.data.source import BinOrder, BinSource, IndexedFile
from tests.makers import make_spec

LENGTHS = np.array([30, 17, 41, 25, 33, 12, 38, 29, 21, 44, 35])


@pytest.fixture
def source(tmp_path: Path) -> BinSource:
    paths = [f"sub/{number}.pt" for number in range(len(LENGTHS))]
    index = SampleIndex(str(tmp_path), paths, LENGTHS, LENGTHS - 4, 0)
    return BinSource(make_spec(), index, plan_bins(LENGTHS, LENGTHS - 4, 64, seed=3), seed=3)


@pytest.mark.parametrize(("bins_per_step", "num_workers"), [(1, 1), (3, 2), (4, 3)])
def test_rows_hold_each_epochs_bins_in_its_order(source: BinSource, bins_per_step: int, num_workers: int) -> None:
    schedule = BinSchedule(len(source.plan.bins), bins_per_step, num_workers, epochs=3)
    expected: list[int] = []
    for epoch in range(3):
        order = source.plan.epoch_order(epoch, source.seed).tolist()
        for start in range(0, len(order), bins_per_step):
            slots = order[start : start + bins_per_step]
            expected += slots + [FILLER] * (schedule.rows_per_step - len(slots))
    order = BinOrder(source, schedule)
    assert [order.number(row) for row in range(len(expected))] == expected
    assert [order.number(row) for row in reversed(range(len(expected)))] == expected[::-1]


def test_files_of_a_bin_are_those_of_the_plan_with_their_lengths(source: BinSource) -> None:
    for number, members in enumerate(source.plan.bins):
        relative = [f"sub/{member}.pt" for member in members.tolist()]
        assert source.paths_of_bin(number) == relative
        assert source.files_of_bin(number) == [
            IndexedFile(f"{source.index.root}/{path}", int(LENGTHS[member]))
            for path, member in zip(relative, members.tolist(), strict=True)
        ]
    assert source.paths_of_bin(FILLER) == [] and source.files_of_bin(FILLER) == []
