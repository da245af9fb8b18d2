"""Work that a signal ends: in its own time if it can be told to, else at once."""

import os
import signal
import threading

import pytest

from eagle3_ray import stopping
from eagle3_ray.errors import DataError
from eagle3_ray.jobs.fit import run_until_told_to_stop
from eagle3_ray.stopping import Stopped, stop_signals


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def never() -> bool:
    raise AssertionError("no signal came")


def test_work_that_no_signal_meets_is_done_and_its_error_raised() -> None:
    assert run_until_told_to_stop(lambda: 3, never) is None

    def fail() -> None:
        raise DataError("bad shard")

    with pytest.raises(DataError, match="bad shard"):
        run_until_told_to_stop(fail, never)


def test_a_signal_is_passed_on_and_the_work_ends_in_its_own_time(capsys: pytest.CaptureFixture[str]) -> None:
    is_ordered, has_saved = threading.Event(), threading.Event()

    def work() -> None:
        send()
        assert is_ordered.wait(60)
        has_saved.set()

    def order_stop() -> bool:
        is_ordered.set()
        return True

    with stop_signals():
        assert run_until_told_to_stop(work, order_stop) is signal.SIGTERM
    assert has_saved.is_set()
    assert capsys.readouterr().out == "SIGTERM: saving after this step; Ctrl-C from now on stops at once\n"


def test_work_that_cannot_be_told_to_stop_is_abandoned() -> None:
    is_over = threading.Event()

    def work() -> None:
        send()
        is_over.wait()

    with pytest.raises(Stopped), stop_signals():
        run_until_told_to_stop(work, lambda: False)
    is_over.set()


def test_ctrl_c_after_a_signal_does_not_wait_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ONE_ORDER_S", 0.0)
    is_over = threading.Event()

    def work() -> None:
        send()
        is_over.wait()

    def order_stop() -> bool:
        send(signal.SIGINT)
        return True

    with pytest.raises(Stopped), stop_signals():
        run_until_told_to_stop(work, order_stop)
    is_over.set()


def test_work_that_fails_after_a_signal_tells_its_error() -> None:
    is_ordered = threading.Event()

    def work() -> None:
        send()
        assert is_ordered.wait(60)
        raise DataError("bad shard")

    def order_stop() -> bool:
        is_ordered.set()
        return True

    with pytest.raises(DataError), stop_signals():
        run_until_told_to_stop(work, order_stop)
