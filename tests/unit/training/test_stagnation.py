"""Epochs without a rise, counted from the records of checkpoints."""

import json
from pathlib import Path

import pytest

from eagle3_ray.errors import CheckpointError
from eagle3_ray.training.run_folder import RECORD, latest_committed
from eagle3_ray.training.stagnation import BEST_METRIC, Stagnation
from tests.unit.training.test_run_folder import write_checkpoint


def count(*tokens: float | None) -> Stagnation:
    found = Stagnation()
    for value in tokens:
        found = found.after({} if value is None else {BEST_METRIC: value})
    return found


def test_only_a_rise_above_the_best_of_all_ends_the_count() -> None:
    assert count() == (None, 0) and count(1.5) == (1.5, 0)
    assert count(1.5, 1.7, 1.6, 1.65) == (1.7, 2)
    assert count(1.5, 1.5, 1.5) == (1.5, 2)  # the same is no rise
    assert count(1.5, 1.4, 1.6) == (1.6, 0)


def test_an_epoch_that_was_not_validated_counts_neither_way() -> None:
    assert count(None, 1.5, None, 1.4, None) == (1.5, 1)


def test_it_ends_after_so_many_epochs_and_never_without_a_bound() -> None:
    assert [count(1.5, *[1.4] * n).is_over(2) for n in range(4)] == [False, False, True, True]
    assert not count(1.5, *[1.4] * 50).is_over(None)


def change_record(folder: Path, **changes: object) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


def test_a_checkpoint_holds_the_count_and_an_older_one_begins_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "3", 12, 1.5)
    old = latest_committed(tmp_path)
    assert old is not None and old.stagnation == (1.5, 0)
    change_record(folder, stagnation=count(1.7, 1.5)._asdict())
    new = latest_committed(tmp_path)
    assert new is not None and new.stagnation == (1.7, 1)
    change_record(folder, stagnation={"epochs": 3})
    with pytest.raises(CheckpointError, match="cannot be read"):
        latest_committed(tmp_path)
