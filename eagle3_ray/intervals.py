"""95 % intervals of acceptance: tokens of a text go together, but texts, and so packed bins of them, do not.

What is right and what was reached is summed up per text or per bin, and a share is a ratio of two sums over those; its
interval is that of such a ratio (linearised, normal), not of a coin thrown once a token.
"""

import numpy as np
import numpy.typing as npt

Z_95 = 1.96


def cross_moments(right: npt.ArrayLike, reached: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the sum over texts of x x^T [2P+1, 2P+1], where x = (right [P], reached [P], 1).

    The 1 is 0 of a text without positions, which so counts nothing.

    Args:
        right: [texts, P] positions whose first j guesses are all right.
        reached: [texts, P] positions that have j guesses.
    """
    right, reached = np.asarray(right, np.float64), np.asarray(reached, np.float64)
    rows = np.hstack([right, reached, reached[:, :1] > 0])
    return rows.T @ rows


def chain_half_widths(moments: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Return half the widths of the 95 % intervals of the shares right / reached [P], and of the sum of these shares.

    NaN where there are less than two texts, or no position.

    Args:
        moments: As from `cross_moments`; those of parts add up.

    Source: Cochran, Sampling Techniques, chapter 6: variance of a ratio estimate.
    """
    num_guesses = len(moments) // 2
    num_texts, totals = moments[-1, -1], moments[-1, :-1]
    right, reached = totals[:num_guesses], np.where(totals[num_guesses:] > 0, totals[num_guesses:], np.nan)
    if num_texts < 2:
        return np.full(num_guesses, np.nan), float("nan")
    slopes = np.hstack([np.eye(num_guesses), np.diag(-right / reached)]) / reached[:, None]
    covariance = slopes @ moments[:-1, :-1] @ slopes.T * num_texts / (num_texts - 1)
    variances = np.append(np.diag(covariance), covariance.sum())
    half_widths = Z_95 * np.sqrt(variances.clip(min=0))
    return half_widths[:-1], float(half_widths[-1])
