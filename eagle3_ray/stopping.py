"""SIGTERM and SIGINT as orders to end well: `docker stop`, `ray job stop`, a pod's deletion, Ctrl-C.

    first signal     raises `Stopped` in the main thread; within `deferred_stop` it is only noted, for a job that
                     saves before it ends
    one more there   SIGINT raises `Stopped`; SIGTERM is said twice by some (KubeRay stops the job, then its pod),
                     and who says it has SIGKILL for haste
    while unwinding  ends the process at once

The exit code is 128 and the signal's number, as shells tell it: 143 for SIGTERM, 130 for SIGINT.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `timeout`, for one, sends its signal to the command and then to the group the command is in: that is one order.
ONE_ORDER_S = 1.0


class Stopped(KeyboardInterrupt):
    """The command was told to end. No `Exception`: it passes through all that handles errors.

    A `KeyboardInterrupt`, for no other exception of a signal ends Ray's waits at once; they raise a bare one in its
    place, which `as_stopped` turns back.

    Attributes:
        signal: What told it.
        detail: What was saved and how to go on, the rest of the sentence; empty until somebody knows.
    """

    def __init__(self, number: signal.Signals, detail: str = "") -> None:
        super().__init__(number, detail)
        self.signal, self.detail = number, detail

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}{self.detail}"

    @property
    def exit_code(self) -> int:
        """128 and the signal's number."""
        return 128 + self.signal


class StopSignals:
    """The process's handler of SIGTERM and SIGINT, for the length of a block. Only the main thread may have one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_deferred = False
        self._received_s = 0.0

    def __enter__(self) -> "StopSignals":
        self._before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals, whoever handled them until now."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        is_first, was_deferred = self.received is None, self.is_deferred
        is_said_again = was_deferred and number == signal.SIGTERM
        if not is_first and (is_said_again or now - self._received_s < ONE_ORDER_S):
            return
        self.received, self._received_s = signal.Signals(number), now
        if is_first and was_deferred:
            return
        self.is_deferred = False
        if is_first or was_deferred:
            raise Stopped(self.received)
        # Not by an exception: one is on its way already, and what it runs through is what does not end.
        os.write(2, b"stopped at once\n")
        os._exit(128 + number)


_active: StopSignals | None = None  # signals belong to the process, and so does this


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise `Stopped` within the block. Does nothing in another thread than the main one."""
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with StopSignals() as _active:
        try:
            yield
        except KeyboardInterrupt as error:
            raise as_stopped(error) from None
        finally:
            _active = None


def as_stopped(error: KeyboardInterrupt) -> Stopped:
    """Return what a signal has raised, by whatever way it came."""
    if isinstance(error, Stopped):
        return error
    return Stopped((_active and _active.received) or signal.SIGINT)


def keep_stop_signals() -> None:
    """Take the signals back from a library that took them within the block, as ray.init does."""
    if _active is not None:
        _active.install()


@contextmanager
def deferred_stop() -> Iterator[Callable[[], signal.Signals | None]]:
    """Only note the first signal within the block, and any SIGTERM; yields what tells which one came, if any."""
    if _active is None:
        yield lambda: None
        return
    active = _active
    active.is_deferred = True
    try:
        yield lambda: active.received
    finally:
        active.is_deferred = False


@contextmanager
def when_stopped(detail: str) -> Iterator[None]:
    """Say how to go on after a stop within the block, unless it is said already."""
    try:
        yield
    except KeyboardInterrupt as error:
        stop = as_stopped(error)
        stop.detail = stop.detail or detail
        raise stop from None
