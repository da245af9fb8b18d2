"""Counts add up to shares with their intervals, to JSON and to the table that people read."""

import pytest

from eagle3_ray.evaluation.decode import PromptResult
from eagle3_ray.evaluation.result import describe, ratio_interval, sum_up_decoded, sum_up_estimate, to_record


def test_tokens_per_verification_add_up_the_shares() -> None:
    estimate = sum_up_estimate([([3, 1], [4, 4]), ([1, 1], [4, 2])])
    assert [share.value for share in estimate.acceptance] == [0.5, 2 / 6]
    tokens, num_samples = estimate.tokens_per_verification, estimate.num_samples
    assert tokens.value == 1 + 0.5 + 2 / 6 and num_samples == 2
    assert tokens.low is not None and tokens.high is not None
    assert tokens.low < tokens.value < tokens.high and tokens.low + tokens.high == pytest.approx(2 * tokens.value)


def test_one_text_has_no_interval_and_none_has_no_share() -> None:
    assert ratio_interval([3], [4]).value == 0.75 and ratio_interval([3], [4]).low is None
    assert ratio_interval([0, 0], [0, 0]).value is None
    assert sum_up_estimate([([0, 0], [0, 0])]).tokens_per_verification.value is None


def result(name: str, num_tokens: int, tie: float | None = None) -> PromptResult:
    return PromptResult(name, 5, num_tokens, 4, (3, 1), (4, 3), 2.0, 4.0, tie)


def test_decoding_adds_up_to_a_table_and_to_json() -> None:
    results = [result("a", 9), result("b", 11, 1e-6)]
    decoded = sum_up_decoded(results)
    assert decoded.tokens_per_verification.value == (8 + 10) / 8  # the first token of each is of no verification
    assert decoded.tokens_per_s == 18 / 4 and decoded.speedup == 2.0
    text = "\n".join(describe(decoded, sum_up_estimate([((3, 1), (4, 4))])))
    for part in ("2.25 ±", "75.0%", "1 is no gain", "2.00 times", "of 1 in 2; 1 part where", "nothing is generated"):
        assert part in text
    record = to_record(decoded, None, results)
    assert record["tokens_per_verification"] == 2.25 and record["acceptance"] == [0.75, pytest.approx(1 / 3)]
    assert record["prompts"][1]["tie"] == 1e-6 and "estimate" not in record
