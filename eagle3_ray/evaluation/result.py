"""Counts of all prompts -> shares with their 95 % intervals, as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eagle3_ray.evaluation.decode import PromptResult
from eagle3_ray.intervals import chain_half_widths, cross_moments


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95 % interval; the bounds are None with less than two texts, all are None without any.

    Attributes:
        value: the ratio of the sums.
        low: lower bound.
        high: upper bound.
    """

    value: float | None
    low: float | None
    high: float | None

    def describe(self, is_share: bool) -> str:
        """Return `55.1% ±2.1` or `2.13 ±0.08`, a dash if there is nothing."""
        if self.value is None:
            return "-"
        factor, digits = (100, 1) if is_share else (1, 2)
        text = f"{self.value * factor:.{digits}f}{'%' if is_share else ''}"
        return text if self.high is None else f"{text} ±{(self.high - self.value) * factor:.{digits}f}"


def interval(value: float, half_width: float) -> Interval:
    """Return the interval around a value; a half-width or both may be NaN."""
    if np.isnan(value):
        return Interval(None, None, None)
    if np.isnan(half_width):
        return Interval(value, None, None)
    return Interval(value, value - half_width, value + half_width)


def chain_intervals(right: ArrayLike, reached: ArrayLike) -> tuple[list[Interval], Interval]:
    """Return the share of chains right up to each guess, and 1 + the sum of these shares, from counts [texts, K]."""
    moments = cross_moments(right, reached)
    right, reached = np.split(moments[-1, :-1], 2)
    shares = np.divide(right, reached, out=np.full(right.shape, np.nan), where=reached > 0)
    half_widths, of_sum = chain_half_widths(moments)
    return list(map(interval, shares.tolist(), half_widths.tolist())), interval(1.0 + float(shares.sum()), of_sum)


def ratio_interval(numerators: Sequence[int], denominators: Sequence[int]) -> Interval:
    """Return sum(numerators) / sum(denominators), one of each a text, with its interval."""
    return chain_intervals(np.array(numerators)[:, None], np.array(denominators)[:, None])[0][0]


@dataclass(frozen=True)
class Estimate:
    """What the draft does on given texts.

    Attributes:
        acceptance: [K] share of positions whose first j guesses are all right.
        tokens_per_verification: 1 + their sum; the verifier's own token is the 1.
        num_samples: texts.
    """

    acceptance: list[Interval]
    tokens_per_verification: Interval
    num_samples: int


def sum_up_estimate(counts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Estimate:
    """Return the estimate from (right [K], reached [K]) of each sample."""
    right, reached = zip(*counts, strict=True)
    return Estimate(*chain_intervals(right, reached), len(counts))


@dataclass(frozen=True)
class Decoded:
    """What real decoding of all prompts gave.

    Attributes:
        acceptance: [K] share of verifications whose first j guesses are all right, of those whose guess j lies
            within the output.
        tokens_per_verification: tokens of the output a verification; the verifier's own is counted. The last one of
            a prompt gives what is left of the output.
        num_tokens: of all outputs.
        num_verifications: of all prompts.
        tokens_per_s: with the draft, one prompt at a time, without the prompt's own pass.
        tokens_per_s_alone: the same of the verifier alone.
        num_identical: prompts with the verifier's own output, token for token.
        num_ties: prompts whose outputs part where the verifier's two best choices are as close as rounding.
    """

    acceptance: list[Interval]
    tokens_per_verification: Interval
    num_tokens: int
    num_verifications: int
    tokens_per_s: float | None
    tokens_per_s_alone: float | None
    num_identical: int
    num_ties: int

    @property
    def speedup(self) -> float | None:
        """How many times the verifier's own speed."""
        return self.tokens_per_s / self.tokens_per_s_alone if self.tokens_per_s and self.tokens_per_s_alone else None


def sum_up_decoded(results: Sequence[PromptResult]) -> Decoded:
    """Return what all prompts gave, of one or more."""
    # The first token of each output comes from the prompt's own pass, and from no verification.
    num_new = [result.num_tokens - 1 for result in results]
    with_draft_s, alone_s = sum(r.with_draft_s for r in results), sum(r.alone_s for r in results)
    num_ties = sum(result.tie is not None for result in results)
    return Decoded(
        acceptance=chain_intervals([r.right for r in results], [r.reached for r in results])[0],
        tokens_per_verification=ratio_interval(num_new, [r.num_verifications for r in results]),
        num_tokens=sum(result.num_tokens for result in results),
        num_verifications=sum(result.num_verifications for result in results),
        tokens_per_s=sum(num_new) / with_draft_s if sum(num_new) else None,
        tokens_per_s_alone=sum(num_new) / alone_s if sum(num_new) else None,
        num_identical=len(results) - num_ties,
        num_ties=num_ties,
    )


def to_record(decoded: Decoded | None, estimate: Estimate | None, results: Sequence[PromptResult]) -> dict[str, Any]:
    """Return the JSON result: plain numbers for what is read most, all counts below them."""
    record: dict[str, Any] = {}
    if decoded is not None:
        record = {
            "tokens_per_verification": decoded.tokens_per_verification.value,
            "acceptance": [share.value for share in decoded.acceptance],
            "tokens_per_s": decoded.tokens_per_s,
            "tokens_per_s_alone": decoded.tokens_per_s_alone,
            "speedup": decoded.speedup,
            "decoded": asdict(decoded),
        }
    if estimate is not None:
        record["estimate"] = asdict(estimate)
    return {**record, "prompts": [asdict(result) for result in results]}


def describe(decoded: Decoded | None, estimate: Estimate | None) -> list[str]:
    """Return the table, and what its numbers mean."""
    rows: dict[str, tuple[list[Interval], Interval]] = {}
    if decoded is not None:
        rows["real decoding"] = (decoded.acceptance, decoded.tokens_per_verification)
    if estimate is not None:
        rows["estimate"] = (estimate.acceptance, estimate.tokens_per_verification)
    num_guesses = len(next(iter(rows.values()))[0])
    titles = [*(f"guess {j + 1}" for j in range(num_guesses)), "tokens"]
    lines = [f"{'':<14}" + "".join(f"{title:>14}" for title in titles)]
    for label, (shares, tokens) in rows.items():
        cells = [*(share.describe(is_share=True) for share in shares), tokens.describe(is_share=False)]
        lines.append(f"{label:<14}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append("guess j  share of verifications whose first j guesses are all right, with its 95 % interval")
    lines.append("tokens   per verification; the verifier's own token is counted, so 1 is no gain")
    if estimate is not None:
        lines.append("estimate on the texts of held-out samples as they stand, nothing is generated")
    if decoded is not None and decoded.speedup is not None:
        lines.append(
            f"speed    {decoded.tokens_per_s:.1f} tokens/s with the draft, {decoded.tokens_per_s_alone:.1f} without: "
            f"{decoded.speedup:.2f} times, one prompt at a time"
        )
    if decoded is not None:
        num_prompts = decoded.num_identical + decoded.num_ties
        ties = (
            f"; {decoded.num_ties} part where its two best choices are as close as rounding" if decoded.num_ties else ""
        )
        lines.append(f"output   the verifier's own, token for token, of {decoded.num_identical} in {num_prompts}{ties}")
    return lines
