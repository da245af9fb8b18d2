"""How far a run is, told by rank 0 and shown by the driver.

On a terminal a bar an epoch and a line a checkpoint; elsewhere, where a bar would fill a file, a line of progress at
the first logged step and then every ten seconds at most.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError
from tqdm import tqdm

from eagle3_ray.console import say, speaks_json
from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.training.channel import Channel, open_channel
from eagle3_ray.training.startup import FirstStep, Laps, add_up, describe_startup

LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class StepProgress:
    """After a logged step; `step_of_epoch` counts from 1."""

    epoch: int
    num_epochs: int
    step: int
    step_of_epoch: int
    steps_per_epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Note:
    """A line for the user, and what belongs to it for machines."""

    text: str
    event: str = "note"
    fields: Mapping[str, Any] = field(default_factory=dict)


class ProgressBoard:
    """The driver's end: a context manager that shows what rank 0 tells until it is left.

    Args:
        laps: The driver's own part of the time until the first step.
        quarantine: What the run leaves out.
    """

    def __init__(self, laps: Laps, quarantine: Quarantine) -> None:
        self.channel: Channel = open_channel()
        self._laps, self._quarantine = laps, quarantine
        self._shows_startup = True
        self._draws = sys.stderr.isatty() and not speaks_json()
        self._bar: tqdm[Any] | None = None
        self._epoch = -1
        self._shown_s = -LINE_EVERY_S
        self._thread = threading.Thread(target=self._show_all, name="progress", daemon=True)

    def __enter__(self) -> "ProgressBoard":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A Ray that is gone has an error of its own to tell, which must not be hidden by one of the display.
        with contextlib.suppress(RayActorError):
            self.channel.tell(None)
            self._thread.join()
            self.channel.close()
        self._close_bar()

    def _show_all(self) -> None:
        while (item := self._next_item()) is not None:
            if isinstance(item, Note):
                self._show_note(item)
            elif isinstance(item, BadFile):
                self._leave_out(item)
            elif isinstance(item, FirstStep):
                self._show_startup(item)
            elif self._draws:
                self._show_step(item)
            else:
                self._write_step(item)

    def _next_item(self) -> StepProgress | Note | BadFile | FirstStep | None:
        try:
            item: StepProgress | Note | BadFile | FirstStep | None = self.channel.take()
        except RayActorError:
            return None
        return item

    def _show_note(self, note: Note) -> None:
        if self._draws:
            tqdm.write(note.text, file=sys.stdout)
            sys.stdout.flush()
        else:
            say(note.text, note.event, **note.fields)

    def _leave_out(self, told: BadFile) -> None:
        """Take note of a file that a rank found bad; once there are too many, have the ranks save and stop."""
        file = self._quarantine.leave_out(told)
        if file is None:
            return  # another rank, or an earlier pass, has told of it
        self._quarantine.append(file)
        text = f"left out: {file.path} {' '.join(file.text.split())}"
        self._show_note(Note(text, "bad_sample", {"path": file.path, "kinds": list(file.kinds), "text": file.text}))
        if self._quarantine.must_end_run:
            self.channel.order_stop()

    def _show_startup(self, item: FirstStep) -> None:
        if self._shows_startup:  # not of workers that were started again
            parts_s = {part: round(seconds, 3) for part, seconds in add_up(self._laps, item).items()}
            fields = {"after_s": round(sum(parts_s.values()), 3), "parts_s": parts_s}
            self._show_note(Note(describe_startup(parts_s), "first_step", fields))
            self._shows_startup = False

    def _write_step(self, item: StepProgress) -> None:
        now = time.monotonic()
        if now - self._shown_s >= LINE_EVERY_S:
            self._shown_s = now
            fields = {"step": item.step, "epoch": item.epoch + 1, "metrics": dict(item.metrics)}
            say(describe_step(item), "progress", **fields)

    def _show_step(self, item: StepProgress) -> None:
        if item.epoch != self._epoch:
            self._close_bar()
            self._epoch = item.epoch
            self._bar = tqdm(total=item.steps_per_epoch, desc=f"epoch {item.epoch + 1}", unit="step", leave=False)
        assert self._bar is not None
        self._bar.n = item.step_of_epoch  # less than before when workers were restarted, which `update` would not draw
        self._bar.set_postfix_str(describe_progress(item.metrics))

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe_step(item: StepProgress) -> str:
    """Return the line of a logged step."""
    place = f"epoch {item.epoch + 1}/{item.num_epochs}  step {item.step}"
    return f"{place}  {item.step_of_epoch}/{item.steps_per_epoch} of the epoch  {describe_progress(item.metrics)}"


def describe_progress(metrics: Mapping[str, float]) -> str:
    """Return loss, acceptance and speed of a logged step in a few words."""
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.3f}")
    if "train/expected_tokens" in metrics:
        parts.append(f"{metrics['train/expected_tokens']:.2f} tokens/verification")
    parts.append(f"{metrics['train/tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)


def describe_epoch(epoch: int, num_epochs: int, step: int, metrics: Mapping[str, float], folder: str) -> str:
    """Return the line of a stored checkpoint: where it is and what validation says."""
    by_ttt_step = sorted((name for name in metrics if name.startswith("val/cond_acc_")), key=lambda n: (len(n), n))
    acceptance = " ".join(f"{metrics[name]:.3f}" for name in by_ttt_step)
    parts = [f"epoch {epoch + 1}/{num_epochs}  step {step}"]
    if "train/loss" in metrics:
        parts.append(f"train loss {metrics['train/loss']:.3f}")
    if "val/loss" in metrics:
        parts.append(f"val loss {metrics['val/loss']:.3f}  acceptance {acceptance}")
    if "val/expected_tokens" in metrics:
        spread = f" ±{metrics['val/expected_tokens_ci']:.2f}" if "val/expected_tokens_ci" in metrics else ""
        parts.append(f"{metrics['val/expected_tokens']:.2f}{spread} tokens/verification")
    return "  ".join([*parts, f"saved {folder}"])
