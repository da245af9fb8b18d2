"""What is done behind the training: one thing at a time, and no error is lost."""

import threading

import pytest

from eagle3_ray.errors import CheckpointError
from eagle3_ray.training.saver import Background


def test_the_caller_goes_on_while_work_is_being_done() -> None:
    background, gate, done = Background(), threading.Event(), threading.Event()

    def work() -> None:
        gate.wait()
        done.set()

    background.start(work)
    background.check()  # neither waits nor complains
    assert not done.is_set()
    gate.set()
    background.wait()
    assert done.is_set()


def test_the_next_work_waits_for_the_one_before() -> None:
    background, second_began, order = Background(), threading.Event(), []

    def first() -> None:
        assert not second_began.wait(0.5)
        order.append("first")

    def second() -> None:
        second_began.set()
        order.append("second")

    background.start(first)
    background.start(second)
    background.wait()
    assert order == ["first", "second"]


def fail() -> None:
    raise CheckpointError("disk full")


@pytest.mark.parametrize("notice", [Background.check, Background.wait, lambda background: background.start(fail)])
def test_what_work_raises_is_raised_once_by_whatever_comes_next(notice) -> None:  # type: ignore[no-untyped-def]
    background = Background()
    background.start(fail)
    assert background._pending is not None
    background._pending.exception()  # waits, so that it is done for `check` too
    with pytest.raises(CheckpointError, match="disk full"):
        notice(background)
    background.check()
    background.wait()
