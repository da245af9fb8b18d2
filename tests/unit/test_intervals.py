"""Intervals against repeated draws of texts whose rates differ, and moments of parts against those of the whole."""

import numpy as np
import numpy.typing as npt
import pytest

from eagle3_ray.intervals import chain_half_widths, cross_moments

MOMENTS_OF_BETA = [4 / 8, 4 * 5 / (8 * 9), 4 * 5 * 6 / (8 * 9 * 10)]  # Beta(4, 4): E[x], E[x^2], E[x^3]


def draw(generator: np.random.Generator, num_texts: int = 60) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Right and reached [texts, 3] of chains in texts whose own rates differ: tokens of a text go together."""
    right, reached = [], []
    for rate, length in zip(generator.beta(4, 4, num_texts), generator.integers(20, 60, num_texts), strict=True):
        chains = generator.random((length, 3)) < rate
        right.append(np.cumprod(chains, axis=1).sum(axis=0))
        reached.append([length, length - 1, length - 2])
        right[-1] = np.minimum(right[-1], reached[-1])
    return np.array(right), np.array(reached)


def test_95_of_100_intervals_hold_what_is_true() -> None:
    generator, hits = np.random.default_rng(0), []
    for _ in range(1500):
        moments = cross_moments(*draw(generator))
        right, reached = np.split(moments[-1, :-1], 2)
        half_widths, of_sum = chain_half_widths(moments)
        distances = np.abs(right / reached - MOMENTS_OF_BETA)
        hits.append([*(distances <= half_widths), abs((right / reached).sum() - sum(MOMENTS_OF_BETA)) <= of_sum])
    assert np.all(np.abs(np.mean(hits, axis=0) - 0.95) < 0.025)  # four standard errors


def test_a_coin_thrown_once_a_token_would_have_half_the_width() -> None:
    right, reached = draw(np.random.default_rng(1), 600)
    half_widths, _ = chain_half_widths(cross_moments(right, reached))
    share = right[:, 0].sum() / reached[:, 0].sum()
    assert half_widths[0] > 2 * 1.96 * np.sqrt(share * (1 - share) / reached[:, 0].sum())


def test_moments_of_parts_add_up_and_what_is_empty_counts_nothing() -> None:
    right, reached = draw(np.random.default_rng(2))
    whole = cross_moments(right, reached)
    assert np.array_equal(cross_moments(right[:20], reached[:20]) + cross_moments(right[20:], reached[20:]), whole)
    empty = np.zeros((5, 3), dtype=np.int64)
    assert np.array_equal(cross_moments(np.vstack([right, empty]), np.vstack([reached, empty])), whole)


def test_one_ratio_is_that_of_the_book() -> None:
    right, reached = np.array([[3], [1], [2]]), np.array([[4], [4], [3]])
    ratio, size = 6 / 11, 3
    variance = size / (size - 1) * np.square(right - ratio * reached).sum() / 11**2
    half_widths, of_sum = chain_half_widths(cross_moments(right, reached))
    assert half_widths[0] == pytest.approx(1.96 * np.sqrt(variance)) == pytest.approx(of_sum)


def test_one_text_and_a_guess_that_none_has_give_none() -> None:
    half_widths, of_sum = chain_half_widths(cross_moments([[3, 1]], [[4, 2]]))
    assert np.isnan(half_widths).all() and np.isnan(of_sum)
    half_widths, of_sum = chain_half_widths(cross_moments([[3, 0], [1, 0]], [[4, 0], [4, 0]]))
    assert half_widths[0] > 0 and np.isnan(half_widths[1]) and np.isnan(of_sum)
