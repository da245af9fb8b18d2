"""The chaos in small: what is killed while it trains ends bit for bit like what was left in peace."""

from pathlib import Path

import torch

from tests.faults.chaos import compare, differing


def test_a_run_whose_worker_raylet_and_driver_are_killed_ends_like_a_calm_one(tmp_path: Path) -> None:
    found = compare(num_steps=60, kinds=["worker", "raylet", "driver"], seed=1, folder=tmp_path)
    assert found["survived"] == {"worker": 1, "raylet": 1, "driver": 1} and found["typed"] == 3
    assert found["tensors"] > 30 and found["differing"] == []


def test_a_difference_of_one_bit_is_seen() -> None:
    one, other = torch.zeros(3), torch.zeros(3)
    other[1] = 1e-45
    assert differing({"a": one, "b": 2}, {"a": one.clone(), "b": 2}) == []
    assert differing({"a": one, "b": 2}, {"a": other, "c": 2}) == ["a", "b", "c"]
