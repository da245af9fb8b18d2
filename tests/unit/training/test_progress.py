"""What the driver shows: a bar on a terminal, a line a checkpoint anywhere, and their words."""

import io
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from eagle3_ray.training import progress
from eagle3_ray.training.progress import (
    Note,
    ProgressBoard,
    ProgressSender,
    StepProgress,
    describe_epoch,
    describe_progress,
)

METRICS = {
    "train/loss": 3.14159,
    "train/loss_0": 1.0,
    "train/expected_tokens": 1.2345,
    "train/tokens_per_s": 12345.6,
    "val/loss": 2.71828,
    "val/cond_acc_0": 0.51,
    "val/cond_acc_1": 0.4004,
    "val/cond_acc_2": 0.3,
    "val/expected_tokens": 1.785,
}


@dataclass(frozen=True)
class FakeMethod:
    """An actor's method that runs at once."""

    function: Callable[[Any], None]

    def remote(self, item: object) -> None:
        self.function(item)


class FakeQueue:
    """Ray's queue as far as the board uses it, without Ray."""

    def __init__(self, actor_options: dict[str, Any]) -> None:
        assert actor_options == {"num_cpus": 0}  # it must fit beside workers that take every CPU
        self._items: queue.Queue[Any] = queue.Queue()
        self.get, self.put = self._items.get, self._items.put
        self.actor, self.put_nowait, self.is_shut_down = self, FakeMethod(self._items.put), False

    def shutdown(self, force: bool) -> None:
        assert force
        self.is_shut_down = True


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def show(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, *items: StepProgress | Note) -> tuple[str, str]:
    """What stdout and stderr show of these items."""
    stdout, stderr = Stream(is_terminal), Stream(is_terminal)
    with monkeypatch.context() as patched:
        patched.setattr(progress, "Queue", FakeQueue)
        patched.setattr(sys, "stdout", stdout)
        patched.setattr(sys, "stderr", stderr)
        with ProgressBoard() as board:
            for item in items:
                board.sender.send(item)
        shown: Any = board.sender.queue
        assert shown.is_shut_down
    return stdout.getvalue(), stderr.getvalue()


def of_step(epoch: int, step_of_epoch: int) -> StepProgress:
    return StepProgress(epoch, step_of_epoch, 40, METRICS)


STEPS = (of_step(0, 10), of_step(0, 40), of_step(1, 10))


def test_a_terminal_shows_a_bar_an_epoch_with_loss_acceptance_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = show(monkeypatch, True, *STEPS)
    drawn = [part for part in stderr.split("\r") if "step" in part]
    for text in ("epoch 1:  25%", "10/40", "epoch 1: 100%", "40/40", "epoch 2:  25%"):
        assert any(text in part for part in drawn), text
    assert "loss 3.142, 1.23 tokens/verification, 12,346 tokens/s" in drawn[-1]
    assert stdout == ""


def test_the_bar_is_gone_when_the_board_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stderr = show(monkeypatch, True, *STEPS)
    assert stderr.rsplit("\r", 2)[-2].strip() == "" and stderr.endswith("\r")


def test_a_worker_that_was_restarted_sets_the_bar_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stderr = show(monkeypatch, True, of_step(0, 30), of_step(0, 20))
    drawn = [part for part in stderr.split("\r") if "/40" in part]
    assert "30/40" in drawn[-2] and "20/40" in drawn[-1]


def test_elsewhere_there_is_a_line_a_note_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Note("epoch 1/2  saved /run/0"), Note("epoch 2/2  saved /run/1")
    stdout, stderr = show(monkeypatch, False, *STEPS[:2], notes[0], STEPS[2], notes[1])
    assert stdout == "epoch 1/2  saved /run/0\nepoch 2/2  saved /run/1\n"
    assert stderr == ""


def test_notes_stand_on_lines_of_their_own_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, _ = show(monkeypatch, True, STEPS[0], Note("saved"), STEPS[1])
    assert "saved\n" in stdout.splitlines(keepends=True)


@ray.remote
def tell(sender: ProgressSender, item: StepProgress | Note) -> None:
    """What rank 0 does, in a process of its own."""
    sender.send(item)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_ray_worker_tells_is_shown_by_the_driver(capfd: pytest.CaptureFixture[str]) -> None:
    shown, deadline = "", time.monotonic() + 60
    with ProgressBoard() as board:
        for number in range(3):
            ray.get(tell.remote(board.sender, of_step(0, number + 1)))
            ray.get(tell.remote(board.sender, Note(f"line {number}")))
            # Telling does not wait: the line may still be on its way.
            while f"line {number}\n" not in shown:
                assert time.monotonic() < deadline, shown
                time.sleep(0.01)
                shown += capfd.readouterr().out
    assert shown == "line 0\nline 1\nline 2\n"


# --------------------------------------------------------------------------------------- the words


def test_a_step_is_told_in_a_few_words() -> None:
    assert describe_progress(METRICS) == "loss 3.142, 1.23 tokens/verification, 12,346 tokens/s"


def test_a_step_without_a_supervised_position_has_no_loss_to_tell() -> None:
    assert describe_progress({"train/tokens_per_s": 0.4}) == "0 tokens/s"


def test_a_checkpoint_is_told_with_its_validation_and_its_place() -> None:
    assert describe_epoch(1, 20, 240, METRICS, "/run/1") == (
        "epoch 2/20  step 240  train loss 3.142  val loss 2.718  acceptance 0.510 0.400 0.300  "
        "1.78 tokens/verification  saved /run/1"
    )


def test_a_checkpoint_within_an_epoch_has_no_validation_to_tell() -> None:
    metrics = {name: value for name, value in METRICS.items() if name.startswith("train/")}
    expected = "epoch 1/20  step 7  train loss 3.142  saved /run/step-000007"
    assert describe_epoch(0, 20, 7, metrics, "/run/step-000007") == expected


def test_acceptance_of_more_than_ten_steps_is_told_in_their_order() -> None:
    metrics = {"val/loss": 1.0} | {f"val/cond_acc_{k}": k / 100 for k in range(12)}
    told = describe_epoch(0, 1, 1, metrics, "x").split("acceptance ")[1].split("  ")[0]
    assert told == " ".join(f"{k / 100:.3f}" for k in range(12))
