"""Means against a brute force that follows each position's chain; the table against the names that are logged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ray.intervals import cross_moments
from eagle3_ray.metrics import (
    METRICS,
    TRAIN,
    VAL,
    TttSums,
    metrics_table,
    summarize,
    summarize_spread,
    unknown_names,
)


def _sums(counts: np.ndarray, right: np.ndarray, loss: np.ndarray) -> TttSums:
    """Sums of positions [N, P]: whether target k counts, whether it is right, its loss."""
    counts_all, right_all = np.logical_and.accumulate(counts, 1), np.logical_and.accumulate(right, 1)
    right_before = np.hstack([np.ones((len(right), 1), dtype=bool), right_all[:, :-1]])
    parts = [loss * counts, counts, counts & right, counts_all & right_all, counts_all, counts_all & right_before]
    return TttSums(*(part.sum(0).astype(np.float64) for part in parts))


def test_means_are_those_of_a_chain_followed_by_hand() -> None:
    # Four positions, two TTT steps; the last position's second target does not count.
    counts = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], dtype=bool)
    right = np.array([[1, 1], [1, 0], [0, 1], [1, 0]], dtype=bool)
    loss = np.array([[1.0, 2.0], [1.0, 4.0], [2.0, 6.0], [4.0, 99.0]])
    assert summarize(_sums(counts, right, loss), decay=0.5, prefix=VAL) == pytest.approx(
        {
            "val/loss_0": 8 / 4,
            "val/loss_1": 12 / 3,
            "val/loss": 2.0 + 0.5 * 4.0,
            "val/accuracy_0": 3 / 4,
            "val/accuracy_1": 2 / 3,
            "val/cond_acc_0": 3 / 4,
            "val/cond_acc_1": 1 / 2,
            "val/expected_tokens": 1 + 3 / 4 + 1 / 3,
        }
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_sums_of_parts_give_the_means_of_the_whole(seed: int, num_steps: int, num_positions: int) -> None:
    rng = np.random.default_rng(seed)
    counts, right = rng.random((2, num_positions, num_steps)) < 0.6
    loss = rng.random((num_positions, num_steps))
    cut = int(rng.integers(0, num_positions + 1))
    whole = summarize(_sums(counts, right, loss), 0.9, TRAIN)
    parts = _sums(counts[:cut], right[:cut], loss[:cut]) + _sums(counts[cut:], right[cut:], loss[cut:])
    assert summarize(parts, 0.9, TRAIN) == pytest.approx(whole)
    for k in range(num_steps):
        chains = [i for i in range(num_positions) if counts[i, : k + 1].all() and right[i, :k].all()]
        if chains:
            assert whole[f"train/cond_acc_{k}"] == pytest.approx(np.mean([right[i, k] for i in chains]))
        else:
            assert f"train/cond_acc_{k}" not in whole


def test_a_mean_over_no_position_is_left_out() -> None:
    assert summarize(TttSums.zeros(3), 1.0, TRAIN) == {}
    one_step_empty = TttSums.zeros(2) + _sums(
        np.array([[True, False]]), np.array([[True, False]]), np.array([[3.0, 0.0]])
    )
    assert summarize(one_step_empty, 1.0, TRAIN) == {
        "train/loss_0": 3.0,
        "train/loss": 3.0,
        "train/accuracy_0": 1.0,
        "train/cond_acc_0": 1.0,
    }


def test_intervals_are_told_of_what_has_one() -> None:
    found = summarize_spread(cross_moments([[3, 1], [1, 1]], [[4, 2], [4, 2]]))
    assert found == {
        "val/acceptance_0": 0.5,
        "val/acceptance_1": 0.5,
        "val/acceptance_ci_0": pytest.approx(1.96 / 4),
        "val/acceptance_ci_1": 0.0,
        "val/expected_tokens_ci": pytest.approx(1.96 / 4),
    }
    assert unknown_names(found) == []
    one_bin = summarize_spread(cross_moments([[3, 0]], [[4, 0]]))
    assert one_bin == {"val/acceptance_0": 0.75}


def test_sums_survive_the_trip_through_one_array() -> None:
    array = np.arange(18.0).reshape(6, 3)
    sums = TttSums.from_array(array)
    assert sums.correct.tolist() == [6.0, 7.0, 8.0] and sums.cond_count.tolist() == [15.0, 16.0, 17.0]
    assert np.array_equal(sums.to_array(), array)


def test_every_summarized_name_is_in_the_table_and_a_misspelt_one_is_not() -> None:
    ones = TttSums.from_array(np.ones((6, 12)))
    assert unknown_names({**summarize(ones, 1.0, TRAIN), **summarize(ones, 1.0, VAL)}) == []
    assert unknown_names(["train/lr", "train/epoch", "train/data_wait_frac"]) == []
    wrong = ["loss", "train/los", "val/lr", "train/loss_", "train/loss_x", "train/loss_1b", "xtrain/loss"]
    assert unknown_names(wrong) == wrong


def test_the_table_has_one_row_a_metric_with_its_unit() -> None:
    lines = metrics_table().splitlines()
    assert lines[0] == "| metric | unit | meaning |" and len(lines) == 2 + len(METRICS)
    assert "| `train/loss_{k}`, `val/loss_{k}` | nats |" in metrics_table()
    assert "| `train/tokens_per_s` | tokens/s |" in metrics_table()
    assert all(line.count("|") == 4 for line in lines)
