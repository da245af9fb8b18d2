"""What the driver shows: a bar on a terminal, a line a checkpoint anywhere, and their words."""

import io
import json
import queue
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ray

from eagle3_ray import console
from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.training import progress
from eagle3_ray.training.channel import Channel
from eagle3_ray.training.progress import (
    LINE_EVERY_S,
    Note,
    ProgressBoard,
    StepProgress,
    describe_epoch,
    describe_progress,
)
from eagle3_ray.training.startup import FirstStep, Laps

NONE_LEFT_OUT = Quarantine(Path("quarantine.jsonl"), "/data", 1, 0.0)
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


class FakeChannel:
    """The channel as far as the board uses it, without Ray."""

    def __init__(self) -> None:
        items: queue.Queue[Any] = queue.Queue()
        self.tell, self.take, self.is_closed = items.put, items.get, False

    def close(self) -> None:
        self.is_closed = True


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def show(
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    *items: StepProgress | Note | FirstStep | BadFile,
    quarantine: Quarantine = NONE_LEFT_OUT,
) -> tuple[str, str]:
    """What stdout and stderr show of these items."""
    stdout, stderr = Stream(is_terminal), Stream(is_terminal)
    with monkeypatch.context() as patched:
        patched.setattr(progress, "open_channel", FakeChannel)
        patched.setattr(sys, "stdout", stdout)
        patched.setattr(sys, "stderr", stderr)
        with ProgressBoard(Laps(), quarantine) as board:
            for item in items:
                board.channel.tell(item)
        channel: Any = board.channel
        assert channel.is_closed
    return stdout.getvalue(), stderr.getvalue()


def of_step(epoch: int, step_of_epoch: int) -> StepProgress:
    return StepProgress(epoch, 2, 40 * epoch + step_of_epoch, step_of_epoch, 40, METRICS)


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


FIRST_LINE = "epoch 1/2  step 10  10/40 of the epoch  loss 3.142, 1.23 tokens/verification, 12,346 tokens/s"
NOTES = Note("epoch 1/2  saved /run/0", "checkpoint", {"step": 40, "path": "/run/0"}), Note("epoch 2/2  saved /run/1")


def test_elsewhere_there_is_a_line_at_the_first_step_and_each_note(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = show(monkeypatch, False, *STEPS[:2], NOTES[0], STEPS[2], NOTES[1])
    assert stdout == f"{FIRST_LINE}\nepoch 1/2  saved /run/0\nepoch 2/2  saved /run/1\n"
    assert stderr == ""


@pytest.mark.parametrize("is_json", [False, True])
def test_a_file_left_out_is_told_once_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_json: bool) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", "/data", 1, 0.5)
    quarantine.begin(10, [])
    told = BadFile("/data/a.pt", ("empty",), "is empty.\n  Move it away.")
    console.use_log_format("json" if is_json else "text")
    try:
        stdout, _ = show(monkeypatch, False, told, told, quarantine=quarantine)
    finally:
        console.use_log_format("text")
    if is_json:
        (line,) = stdout.splitlines()
        expected = {"event": "bad_sample", "path": "a.pt", "kinds": ["empty"], "text": told.text}
        assert json.loads(line).items() >= expected.items()
    else:
        assert stdout == "left out: a.pt is empty. Move it away.\n"
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


class Clock:
    """Stands in for the module `time`: each look at it is so many seconds later."""

    def __init__(self, seconds: float) -> None:
        self._now, self._seconds = 1000.0, seconds

    def monotonic(self) -> float:
        self._now += self._seconds
        return self._now


def test_elsewhere_steps_are_told_by_time_not_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "time", Clock(LINE_EVERY_S / 4))
    stdout, stderr = show(monkeypatch, False, *(of_step(0, number) for number in range(1, 10)))
    assert [line.split("  ")[1] for line in stdout.splitlines()] == ["step 1", "step 5", "step 9"]
    assert "\r" not in stdout and stderr == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_in_json_each_line_is_an_object_with_what_belongs_to_it(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(console, "_log_format", "json")
    stdout, stderr = show(monkeypatch, is_terminal, *STEPS[:2], NOTES[0])
    step, note = [json.loads(line) for line in stdout.splitlines()]
    assert datetime.fromisoformat(step.pop("time")).utcoffset() == timedelta(0) and note.pop("time").endswith("Z")
    fields = {"step": 10, "epoch": 1, "metrics": METRICS}
    assert step == {"level": "info", "event": "progress", "message": FIRST_LINE, **fields}
    text = "epoch 1/2  saved /run/0"
    assert note == {"level": "info", "event": "checkpoint", "message": text, "step": 40, "path": "/run/0"}
    assert stderr == ""


FIRST_STEP = FirstStep(began_s=0.0, parts_s={"model": 1.25, "first bin": 0.25, "first step": 0.5})  # long ago


def test_the_parts_of_the_start_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, _ = show(monkeypatch, False, FIRST_STEP, NOTES[0], FIRST_STEP)
    line = "first step after 2.0 s: workers 0.0, model 1.2, first bin 0.2, first step 0.5"
    assert stdout.splitlines() == [line, "epoch 1/2  saved /run/0"]


def test_the_parts_of_the_start_are_told_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_log_format", "json")
    stdout, _ = show(monkeypatch, True, FIRST_STEP)
    found = json.loads(stdout)
    assert found["event"] == "first_step" and found["after_s"] == 2.0
    assert found["parts_s"] == {"workers": 0.0, "model": 1.25, "first bin": 0.25, "first step": 0.5}


def test_notes_stand_on_lines_of_their_own_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, _ = show(monkeypatch, True, STEPS[0], Note("saved"), STEPS[1])
    assert "saved\n" in stdout.splitlines(keepends=True)


@ray.remote
def tell(channel: Channel, items: list[StepProgress | Note]) -> None:
    """What rank 0 does, in a process of its own."""
    for item in items:
        channel.tell(item)
    channel.flush()


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_ray_worker_tells_is_shown_by_the_driver(capfd: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {number}" for number in range(200)]
    with ProgressBoard(Laps(), NONE_LEFT_OUT) as board:
        ray.get(tell.remote(board.channel, [of_step(0, 10), *map(Note, lines)]))
    # Read once nothing is written any more: a capture that is read meanwhile loses text.
    assert capfd.readouterr().out.splitlines() == [FIRST_LINE, *lines]  # all of them, in the order they were told in


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
    with_interval = describe_epoch(1, 20, 240, {**METRICS, "val/expected_tokens_ci": 0.123}, "/run/1")
    assert "  1.78 ±0.12 tokens/verification  " in with_interval


def test_a_checkpoint_within_an_epoch_has_no_validation_to_tell() -> None:
    metrics = {name: value for name, value in METRICS.items() if name.startswith("train/")}
    expected = "epoch 1/20  step 7  train loss 3.142  saved /run/step-000007"
    assert describe_epoch(0, 20, 7, metrics, "/run/step-000007") == expected


def test_acceptance_of_more_than_ten_steps_is_told_in_their_order() -> None:
    metrics = {"val/loss": 1.0} | {f"val/cond_acc_{k}": k / 100 for k in range(12)}
    told = describe_epoch(0, 1, 1, metrics, "x").split("acceptance ")[1].split("  ")[0]
    assert told == " ".join(f"{k / 100:.3f}" for k in range(12))
