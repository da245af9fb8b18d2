"""How far a run is, told by rank 0 and shown by the driver: a bar an epoch on a terminal, a line an epoch elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.util.queue import Queue
from tqdm import tqdm


@dataclass(frozen=True)
class StepProgress:
    """After a logged step; `step_of_epoch` counts from 1."""

    epoch: int
    step_of_epoch: int
    steps_per_epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class ProgressSender:
    """The worker's end. Telling never waits, and a driver that is gone is not the run's concern."""

    queue: Queue

    def send(self, item: StepProgress | Note) -> None:
        """Tell the driver."""
        self.queue.actor.put_nowait.remote(item)  # type: ignore[attr-defined]


class ProgressBoard:
    """The driver's end: a context manager that shows what rank 0 tells until it is left."""

    def __init__(self) -> None:
        self._queue = Queue(actor_options={"num_cpus": 0})
        self.sender = ProgressSender(self._queue)
        self._bar: tqdm[Any] | None = None
        self._epoch = -1
        self._thread = threading.Thread(target=self._show_all, name="progress", daemon=True)

    def __enter__(self) -> "ProgressBoard":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A Ray that is gone has an error of its own to tell, which must not be hidden by one of the display.
        with contextlib.suppress(RayActorError):
            self._queue.put(None)
            self._thread.join()
            self._queue.shutdown(force=True)
        self._close_bar()

    def _show_all(self) -> None:
        while (item := self._next_item()) is not None:
            if isinstance(item, Note):
                tqdm.write(item.text, file=sys.stdout)
                sys.stdout.flush()
            elif sys.stderr.isatty():
                self._show_step(item)

    def _next_item(self) -> StepProgress | Note | None:
        try:
            item: StepProgress | Note | None = self._queue.get()
        except RayActorError:
            return None
        return item

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
        parts.append(f"{metrics['val/expected_tokens']:.2f} tokens/verification")
    return "  ".join([*parts, f"saved {folder}"])
