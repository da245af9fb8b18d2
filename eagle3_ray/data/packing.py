"""Lengths -> `PackingPlan` -> the order of the stream. Pure and seeded, the same for every world size.

Bins are composed once: a seeded shuffle of the samples, cut into groups, each group packed best-fit-decreasing.
The groups keep a bin a random mixture; within a group the longest samples come first and each goes where least
room is left. Epochs permute whole bins. `BinSchedule` says which rank sees which bin when.

    3 bins, 2 bins a step, 2 workers         epoch 0              epoch 1
                               step       0        1           2        3
                               row      0   1    2   3       4   5    6   7
                               rank     0   1    0   1       0   1    0   1
                               bin      b2  b0   b1  -       b0  b1   b2  -        - : filler, no samples
"""

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eagle3_ray.data.flat import FlatArrays

MIN_GROUP_SAMPLES = 4096
MIN_GROUP_BINS = 256  # the last bin of a group may stay half empty: let that be little
FILLER = -1


@dataclass(frozen=True)
class PackingPlan:
    """Which samples share a bin.

    Attributes:
        total_seq_len: T, positions of a bin.
        bins: sample numbers of each bin, int64, in the order they are packed.
        num_cut: samples longer than a bin, whose tail is left out.
        num_dropped: samples without a supervised position, in no bin.
        fill_frac: share of all positions that belong to samples, 0..1; 0 without bins.
        digest: hex digest of everything above.
    """

    total_seq_len: int
    bins: FlatArrays
    num_cut: int
    num_dropped: int
    fill_frac: float
    digest: str

    def epoch_order(self, epoch: int, seed: int) -> NDArray[np.int64]:
        """Return a permutation [num_bins] of the bins: the order in which this epoch visits them."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.bins)).astype(np.int64)


def plan_bins(
    num_tokens: NDArray[np.int64], num_supervised: NDArray[np.int64], total_seq_len: int, seed: int
) -> PackingPlan:
    """Decide which samples share a bin. O(n log n): a million samples take seconds.

    A sample of S tokens takes min(S-1, T) positions. Samples without a supervised position are left out.

    Args:
        num_tokens: [n] int64, S of each sample.
        num_supervised: [n] int64, supervised positions of each sample, its first token not counted.
        total_seq_len: T.
        seed: of the shuffle.

    Returns:
        The plan; every other sample is in exactly one bin.
    """
    usable = np.flatnonzero((num_supervised > 0) & (num_tokens >= 2))
    lengths = np.minimum(num_tokens - 1, total_seq_len)
    order = np.random.default_rng(seed).permutation(usable)
    num_positions = int(lengths[usable].sum())
    num_groups = _num_groups(len(order), num_positions, total_seq_len)
    bins = []
    for group in np.array_split(order, num_groups):
        bins += _best_fit_decreasing(group, lengths[group], total_seq_len)
    capacity = len(bins) * total_seq_len
    return PackingPlan(
        total_seq_len=total_seq_len,
        bins=FlatArrays.of(bins),
        num_cut=int((num_tokens[usable] - 1 > total_seq_len).sum()),
        num_dropped=len(num_tokens) - len(usable),
        fill_frac=num_positions / capacity if bins else 0.0,
        digest=_digest(bins, total_seq_len, len(num_tokens)),
    )


def _num_groups(num_samples: int, num_positions: int, total_seq_len: int) -> int:
    """Return how many groups have both enough samples to fit well and enough bins to end well (at least one)."""
    return max(1, min(num_samples // MIN_GROUP_SAMPLES, num_positions // (MIN_GROUP_BINS * total_seq_len)))


def _best_fit_decreasing(
    group: NDArray[np.int64], lengths: NDArray[np.int64], total_seq_len: int
) -> list[NDArray[np.int64]]:
    """Pack one group: longest sample first, each into the open bin with least room that still holds it."""
    by_length = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min()) if len(lengths) else 0
    open_bins: list[tuple[int, int]] = []  # (room, bin), ascending: the first that fits is the best fit
    bins: list[list[int]] = []
    for sample, length in zip(group[by_length].tolist(), lengths[by_length].tolist(), strict=True):
        place = bisect_left(open_bins, (length, -1))
        if place < len(open_bins):
            room, number = open_bins.pop(place)
            bins[number].append(sample)
        else:
            room, number = total_seq_len, len(bins)
            bins.append([sample])
        if room - length >= shortest:
            insort(open_bins, (room - length, number))
    return [np.array(members, dtype=np.int64) for members in bins]


def _digest(bins: list[NDArray[np.int64]], total_seq_len: int, num_samples: int) -> str:
    digest = hashlib.sha256(f"{total_seq_len} {num_samples}".encode())
    if bins:
        digest.update(np.array([len(members) for members in bins], dtype="<i8").tobytes())
        digest.update(np.concatenate(bins).astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class RowPlace:
    """Where one row of the stream belongs.

    Attributes:
        step: optimizer step, counted over all epochs.
        epoch: pass over the bins.
        rank: the worker that gets it.
        micro_step: which of the rank's bins of this step.
        index: place in the epoch's order of bins; -1 for a filler.
    """

    step: int
    epoch: int
    rank: int
    micro_step: int
    index: int


@dataclass(frozen=True)
class BinSchedule:
    """The arithmetic of the stream: rows in order, each step `rows_per_step` of them, rank r every W-th.

    Which bins make a step depends on `bins_per_step` only; the number of workers decides who computes them. Where
    a step or an epoch has too few bins for all workers, fillers keep the workers in step.

    Attributes:
        num_bins: bins of the plan, at least 1.
        bins_per_step: B, bins of one optimizer step over all workers.
        num_workers: W.
        epochs: passes over the bins.
    """

    num_bins: int
    bins_per_step: int
    num_workers: int
    epochs: int

    def __post_init__(self) -> None:
        assert min(self.num_bins, self.bins_per_step, self.num_workers, self.epochs) >= 1, self

    @cached_property
    def micro_steps(self) -> int:
        """Bins of one rank in one step."""
        return -(-self.bins_per_step // self.num_workers)

    @cached_property
    def rows_per_step(self) -> int:
        """Rows of the stream in one step, fillers included."""
        return self.micro_steps * self.num_workers

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the bins; the last may have fewer bins."""
        return -(-self.num_bins // self.bins_per_step)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.steps_per_epoch * self.epochs

    def place(self, row: int) -> RowPlace:
        """Return where a row (0-based over all epochs) belongs."""
        step, slot = divmod(row, self.rows_per_step)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        index = step_of_epoch * self.bins_per_step + slot
        filler = slot >= self.bins_per_step or index >= self.num_bins
        return RowPlace(step, epoch, slot % self.num_workers, slot // self.num_workers, FILLER if filler else index)

    def row(self, step: int, rank: int, micro_step: int) -> int:
        """Return the row that a rank gets as its `micro_step`-th of a step; the inverse of `place`."""
        return step * self.rows_per_step + micro_step * self.num_workers + rank
