"""Work in a thread of its own, for a thread that goes on meanwhile and asks later how it went."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Do work in a new thread of this name; whatever it returns or raises, `result()` does.

    A daemon: a disk or a hub that does not answer must not keep a process alive that is told to end.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
