"""The lengths of samples as bars of text."""

import numpy as np
from numpy.typing import NDArray

BAR_WIDTH = 40


def count_lengths(num_tokens: NDArray[np.int64]) -> dict[int, int]:
    """Count samples by length, in classes from one power of two to the next.

    Args:
        num_tokens: [n] int64, at least 1 each.

    Returns:
        Number of samples by the smallest length of their class, ascending, from the first class with any to the last.
    """
    if not len(num_tokens):
        return {}
    classes = np.frexp(num_tokens.astype(np.float64))[1] - 1
    counts = np.bincount(classes)
    return {2**power: int(counts[power]) for power in range(int(classes.min()), len(counts))}


def draw_lengths(counts: dict[int, int]) -> list[str]:
    """Return a line a class of `count_lengths`: its bounds, a bar, and how many; the longest bar is BAR_WIDTH.

    A class that is not empty has a bar of one at least.
    """
    total, most = sum(counts.values()), max(counts.values(), default=0)
    width = max((len(f"{2 * low - 1:,}") for low in counts), default=0)
    lines = []
    for low, number in counts.items():
        bar = "#" * -(-BAR_WIDTH * number // most)
        lines.append(
            f"{low:>{width},} .. {2 * low - 1:>{width},}  {bar:<{BAR_WIDTH}}  {number:,} ({number / total:.1%})"
        )
    return lines
