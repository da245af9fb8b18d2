"""Where the time from a command to its first step goes, part by part, across the processes that share it.

    driver   imports, verifier, Ray, index, plan  |  workers  |  model, validation, first bin, first step   rank 0

Rank 0 tells its parts with its first step, and the driver adds its own. Both go by the clock on the wall: on two
machines whose clocks differ, the part between them, `workers`, is off by as much.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass


class Laps:
    """A stopwatch with names: each part lasts from the end of the one before it.

    Attributes:
        began_s: when the first one began, as `time.time()` tells it.
        ended_s: when the last one ended.
        parts_s: seconds each part took, in order.
    """

    def __init__(self, began_s: float | None = None) -> None:
        self.began_s = self.ended_s = time.time() if began_s is None else began_s
        self.parts_s: dict[str, float] = {}

    def end(self, part: str) -> None:
        """End a part now."""
        self.end_at(part, time.time())

    def end_at(self, part: str, now_s: float) -> None:
        """End a part at a time of the clock; none is negative, whatever the clocks say. One of an earlier name adds."""
        self.parts_s[part] = self.parts_s.get(part, 0.0) + max(now_s - self.ended_s, 0.0)
        self.ended_s = now_s

    def first_step(self, wait_s: float) -> "FirstStep":
        """Return what rank 0 tells once it has made its first step, for which it waited `wait_s` for its bins."""
        self.end_at("first bin", self.ended_s + wait_s)
        self.end("first step")
        return FirstStep(self.began_s, self.parts_s)


@dataclass(frozen=True)
class FirstStep:
    """The parts of rank 0, in seconds and in order; the first one began at `began_s`, as `time.time()` tells it."""

    began_s: float
    parts_s: Mapping[str, float]


def add_up(driver: Laps, first_step: FirstStep) -> dict[str, float]:
    """Return all parts in order, in seconds: the driver's, rank 0's, and what is between them."""
    workers_s = max(first_step.began_s - driver.ended_s, 0.0)
    return {**driver.parts_s, "workers": workers_s, **first_step.parts_s}


def describe_startup(parts_s: Mapping[str, float]) -> str:
    """Return the line of the first step."""
    listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts_s.items())
    return f"first step after {sum(parts_s.values()):.1f} s: {listed}"
