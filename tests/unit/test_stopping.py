"""SIGTERM and SIGINT: one order is one order, a second one is final, and what was there before comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from eagle3_ray import stopping
from eagle3_ray.stopping import Stopped, deferred_stop, keep_stop_signals, stop_signals, when_stopped

ROOT = Path(__file__).parents[2]


def send(number: signal.Signals) -> None:
    """To this very process; Python handles it before the next line of the main thread."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_what_is_under_way(number: signal.Signals, exit_code: int) -> None:
    with pytest.raises(Stopped) as caught, stop_signals():
        send(number)
        raise AssertionError("went on")
    assert caught.value.exit_code == exit_code and str(caught.value) == f"stopped by {number.name}"


def test_a_stop_passes_through_what_handles_errors() -> None:
    with pytest.raises(Stopped), stop_signals():
        try:
            send(signal.SIGTERM)
        except Exception as error:
            raise AssertionError("taken for an error") from error


@ray.remote(num_cpus=0)
def sleep_for_ever() -> None:
    time.sleep(3600)


WAITS: dict[str, Callable[[Any], object]] = {
    "get": ray.get,
    "get with a limit": lambda ref: ray.get(ref, timeout=3600),
    "wait": lambda ref: ray.wait([ref]),
}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", WAITS)
def test_a_signal_ends_a_wait_for_ray(kind: str) -> None:
    ref = sleep_for_ever.remote()
    signaller = threading.Timer(0.5, send, [signal.SIGTERM])
    with pytest.raises(Stopped) as caught, stop_signals(), when_stopped("; told"):
        signaller.start()
        WAITS[kind](ref)
    assert caught.value.exit_code == 143 and str(caught.value) == "stopped by SIGTERM; told"
    ray.cancel(ref, force=True)


def test_a_deferred_signal_is_only_noted_and_ctrl_c_after_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ONE_ORDER_S", 0.0)
    with pytest.raises(Stopped) as caught, stop_signals(), deferred_stop() as received:
        assert received() is None
        send(signal.SIGTERM)
        assert received() is signal.SIGTERM
        send(signal.SIGINT)
        raise AssertionError("went on")
    assert caught.value.signal is signal.SIGINT


def test_sigterm_said_again_leaves_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ONE_ORDER_S", 0.0)
    with stop_signals(), deferred_stop() as received:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            send(number)
        assert received() is signal.SIGINT


def test_signals_that_come_together_are_one_order() -> None:
    with stop_signals(), deferred_stop() as received:
        for _ in range(3):
            send(signal.SIGTERM)
        assert received() is signal.SIGTERM


def test_after_a_deferral_signals_stop_again() -> None:
    with pytest.raises(Stopped), stop_signals():
        with deferred_stop():
            pass
        send(signal.SIGTERM)


def test_a_second_signal_while_unwinding_ends_the_process_at_once() -> None:
    script = """
import os, signal
from eagle3_ray import stopping
stopping.ONE_ORDER_S = 0.0
with stopping.stop_signals():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # while something tidies up
        print("tidied up")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "stopped at once\n")


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        with stop_signals():  # a command within a command
            pass
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_handler_that_a_library_has_taken_is_taken_back() -> None:
    with pytest.raises(Stopped), stop_signals():
        signal.signal(signal.SIGTERM, lambda *_: None)
        keep_stop_signals()
        send(signal.SIGTERM)


def test_outside_a_command_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    keep_stop_signals()
    with deferred_stop() as received:
        assert received() is None and signal.getsignal(signal.SIGTERM) is before


def test_another_thread_cannot_handle_signals_and_does_not_try() -> None:
    handlers = []

    def command() -> None:
        with stop_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_the_first_to_know_says_how_to_go_on() -> None:
    with pytest.raises(Stopped) as caught, when_stopped("; outer"), when_stopped("; inner"):
        raise Stopped(signal.SIGINT)
    assert str(caught.value) == "stopped by SIGINT; inner"
    with pytest.raises(Stopped) as caught, when_stopped("; outer"):
        raise Stopped(signal.SIGINT, " at step 3")
    assert str(caught.value) == "stopped by SIGINT at step 3"
