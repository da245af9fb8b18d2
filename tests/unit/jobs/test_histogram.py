"""Classes of lengths from one power of two to the next, and their bars."""

import numpy as np

from eagle3_ray.jobs.histogram import BAR_WIDTH, count_lengths, draw_lengths


def test_every_length_is_in_the_class_whose_bounds_hold_it() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 400)
    counts = count_lengths(lengths)
    assert counts == {low: sum(low <= length < 2 * low for length in lengths.tolist()) for low in counts}
    assert sum(counts.values()) == 400


def test_bounds_of_classes_are_exact_and_empty_ones_between_are_told() -> None:
    assert count_lengths(np.array([15, 16, 31, 32, 128])) == {8: 1, 16: 2, 32: 1, 64: 0, 128: 1}


def test_no_samples_have_no_classes() -> None:
    assert count_lengths(np.empty(0, dtype=np.int64)) == {} and draw_lengths({}) == []


def test_the_longest_bar_is_full_and_a_rare_length_is_seen() -> None:
    lines = draw_lengths({512: 1000, 1024: 0, 2048: 1})
    assert [line.count("#") for line in lines] == [BAR_WIDTH, 0, 1]
    assert lines[0].startswith("  512 .. 1,023  #") and lines[0].endswith("#  1,000 (99.9%)")
    assert lines[2].startswith("2,048 .. 4,095  # ") and lines[2].endswith("  1 (0.1%)")
