"""Hung is failed: a rank that makes no progress is named, and the workers end, for Ray Train to start them again.

A thread beside each rank's steps tells the channel's actor where the rank is. It ends its own process if one of them is
stuck: no exception reaches a rank that waits in a collective, and Ray Train starts anew when a worker is gone.
"""

import os
import threading
import uuid
from collections.abc import Callable

import torch.distributed as dist

from eagle3_ray.training.channel import Channel
from eagle3_ray.training.progress import Note
from eagle3_ray.training.pulses import Mark, Stuck

PULSES_A_TIMEOUT, LONGEST_PULSE_S = 10, 10.0
EXIT_CODE = 75  # EX_TEMPFAIL: worth another try


class Watch:
    """A context manager that watches over all ranks while it is entered.

    Args:
        channel: To the actor that hears all ranks.
        number: This rank.
        timeout_s: Without progress for so long, a rank is stuck.
        describe_bins: Names the files of the bins that a rank has where it is.
    """

    def __init__(
        self, channel: Channel, number: int, timeout_s: float, describe_bins: Callable[[int, Mark], str]
    ) -> None:
        """collective: every rank calls it."""
        group = [uuid.uuid4().hex]
        dist.broadcast_object_list(group)
        self._group, self._num_ranks = group[0], dist.get_world_size()
        self._channel, self._number, self._timeout_s, self._describe_bins = channel, number, timeout_s, describe_bins
        self._mark = Mark(0, None)
        self._is_over = threading.Event()

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._tell, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def mark(self, mark: Mark) -> None:
        """Say where this rank is: that is its progress."""
        self._mark = mark

    def _tell(self) -> None:
        while not self._is_over.wait(min(self._timeout_s / PULSES_A_TIMEOUT, LONGEST_PULSE_S)):
            stuck = self._channel.pulse(self._group, self._num_ranks, self._number, self._mark, self._timeout_s)
            if stuck and not self._is_over.is_set():
                self._channel.tell(
                    Note("\n".join(map(self._describe, stuck)), "hung", {"ranks": [s.rank for s in stuck]})
                )
                self._channel.flush()
                os._exit(EXIT_CODE)

    def _describe(self, stuck: Stuck) -> str:
        mark = stuck.mark
        step = f"step {mark.step}" if mark.validation_step is None else f"step {mark.validation_step} of a validation"
        doing = f"waits for its bins ({self._describe_bins(stuck.rank, mark)})" if mark.is_reading else "computes"
        silent = ", and its process has gone silent" if stuck.is_silent else ""
        no_progress = f"rank {stuck.rank} has made no progress for {stuck.for_s:.0f} s"
        return f"{no_progress}: at {step} it {doing}{silent}; the workers are ended"
