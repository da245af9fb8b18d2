"""Who among the ranks is stuck: each tells now and then where it is, and one that stays there for too long is named.

A rank that is stuck holds up all others, which wait for it in a collective; so of those that made no progress, the
culprit is one that is not heard of any more, else one that waits for its bins, else one that is a step behind. As long
as one waits for its checkpoint to be stored, which takes as long as the storage takes, nobody else is stuck.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

# Of the time without progress after which a rank is stuck: one not heard of for so long stands still, and once one is
# stuck, one without progress for so long may be what it waits for. Where ranks are is heard now and then only.
SUSPECT_FRAC = 0.5


class Mark(NamedTuple):
    """Where a rank is.

    Attributes:
        step: Optimizer step, counted from 0.
        validation_step: If it validates, before that step: the step of the validation, else None.
        is_reading: It waits for its bins, and for nobody else.
        is_saving: It waits for the checkpoint before to be stored, or copies the next.
    """

    step: int
    validation_step: int | None
    is_reading: bool = False
    is_saving: bool = False

    @property
    def place(self) -> tuple[int, float]:
        """What rises with all progress."""
        return self.step, math.inf if self.validation_step is None else self.validation_step


class Pulse(NamedTuple):
    """The last that was heard of a rank: where it was, since when it has been there, when it was heard (seconds)."""

    mark: Mark
    since_s: float
    heard_s: float


class Stuck(NamedTuple):
    """A rank that holds up the others; `for_s` is how long it has made no progress."""

    rank: int
    mark: Mark
    for_s: float
    is_silent: bool


class Pulses:
    """What all ranks of a group of workers told last; a new group, after a restart, starts anew.

    When the first of a group is heard, all others are taken to be where it is: one that stands still before it was ever
    heard is named too.
    """

    def __init__(self) -> None:
        self._group = ""
        self._by_rank: dict[int, Pulse] = {}

    def take(self, group: str, num_ranks: int, rank: int, mark: Mark, now_s: float, timeout_s: float) -> list[Stuck]:
        """Take note of where a rank is, and return who is stuck: nobody, or the culprits among all `num_ranks` ranks.

        Only one rank is told, once: it ends the group.
        """
        if group != self._group:
            self._group = group
            self._by_rank = dict.fromkeys(range(num_ranks), Pulse(mark, now_s, now_s))
        known = self._by_rank.get(rank)
        since_s = known.since_s if known is not None and known.mark == mark else now_s
        self._by_rank[rank] = Pulse(mark, since_s, now_s)
        if any(pulse.mark.is_saving for pulse in self._by_rank.values()):
            # The others' time starts when that is over; not of one that is not heard of meanwhile.
            self._by_rank = {one: pulse._replace(since_s=pulse.heard_s) for one, pulse in self._by_rank.items()}
        culprits = find_culprits(self._by_rank, now_s, timeout_s)
        if culprits:
            self._by_rank = {}
        return culprits


def find_culprits(pulses: Mapping[int, Pulse], now_s: float, timeout_s: float) -> list[Stuck]:
    """Return the ranks that the others wait for, once one has made no progress for `timeout_s` or longer."""
    if all(now_s - pulse.since_s <= timeout_s for pulse in pulses.values()):
        return []
    suspects = [
        Stuck(rank, pulse.mark, now_s - pulse.since_s, now_s - pulse.heard_s > SUSPECT_FRAC * timeout_s)
        for rank, pulse in sorted(pulses.items())
        if now_s - pulse.since_s > SUSPECT_FRAC * timeout_s
    ]
    first = min(one.mark.place for one in suspects)
    kinds = (
        [one for one in suspects if one.is_silent],
        [one for one in suspects if one.mark.is_reading],
        [one for one in suspects if one.mark.place == first],
    )
    return next(kind for kind in kinds if kind)
