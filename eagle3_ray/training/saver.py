"""Checkpoints behind the training: a step waits for a copy to host memory, and a thread stores it from there.

    training   step  step  copy  step  step  step  step  ...  copy (not before the last one is stored)
    thread                    └─ write ─ Ray's commit ─ COMMITTED ─ best ─ told to the driver

What fails behind is raised before the next step, or at the end, which waits for what is still on its way.
"""

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

from eagle3_ray.background import in_background
from eagle3_ray.errors import CheckpointError
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.storage import ObjectPath, StoragePath, telling
from eagle3_ray.training.checkpoint import HostState, told_as_not_saved, write_checkpoint
from eagle3_ray.training.disk_space import checkpoint_bytes, make_room
from eagle3_ray.training.ema import Ema
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.progress import Note, describe_epoch
from eagle3_ray.training.retention import keep_newest
from eagle3_ray.training.run_folder import commit, find_committed, point_best


class Background:
    """Does one thing at a time in a thread of its own; what it raises is raised by the next call here."""

    def __init__(self) -> None:
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do it while the caller goes on."""
        self.wait()
        self._pending = in_background(work, "save")

    def check(self) -> None:
        """Raise what it has met, if it is done; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until it is done, and raise what it has met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class Saver:
    """Stores the checkpoints of a run, one after the other: a context manager that waits for the last when left."""

    def __init__(self, job: TrainJob, draft: Eagle3Draft, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        """collective: every rank calls it."""
        self._job = job
        self._host = HostState(draft, optimizer, ema)
        self._background = Background()
        self._last_save_s = time.monotonic()
        self._needed_bytes = checkpoint_bytes(draft.config, dist.get_world_size(), job.settings)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.wait()

    def check(self) -> None:
        """Raise what a save has met behind the training."""
        self._background.check()

    def is_due(self) -> bool:
        """Tell, on rank 0 alone, whether the last save is so long ago that the next one is due."""
        every_minutes = self._job.settings.checkpoint_every_minutes
        if every_minutes is None or not self._host.is_first:
            return False
        return time.monotonic() - self._last_save_s >= 60 * every_minutes

    def save(self, name: str, record: Mapping[str, Any]) -> None:
        """Copy the state, and start to store it; wait first for what is still being stored. collective."""
        self._background.wait()
        self._last_save_s = time.monotonic()
        self._host.copy()
        self._background.start(functools.partial(self._store, name, record))

    def _store(self, name: str, record: Mapping[str, Any]) -> None:
        """Store a checkpoint, have Ray Train take note of it, and mark it as whole. collective, in the saver's group.

        `report` returns before Ray's own commit; a worker killed in between would lose the checkpoint, so the marker
        waits for it.
        """
        path = self._job.save_dir / name
        self._write(path, record)
        with telling(path):
            ray.train.report(
                record["metrics"], as_ray_checkpoint(path), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
            )
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        # Together: no rank leaves, and has Ray end the others, before the marker is there.
        self._host.together(lambda: self._commit(path, record))

    def _write(self, path: StoragePath, record: Mapping[str, Any]) -> None:
        """Write a checkpoint where there is room for it; a disk that is full all the same is told as such. collective.

        What a library says of a full disk need not name it: whether the checkpoint would have fitted is measured.
        """
        self._host.together(functools.partial(self._make_room, path))
        try:
            write_checkpoint(path, self._host, self._job.mapping, record)
        except CheckpointError:
            if isinstance(path, Path):
                self._host.together(functools.partial(self._make_room, path))
            raise

    def _make_room(self, path: StoragePath) -> None:
        if self._host.is_first:
            with told_as_not_saved(path):
                make_room(self._job.save_dir, self._needed_bytes)

    def _commit(self, path: StoragePath, record: Mapping[str, Any]) -> None:
        if not self._host.is_first:
            return
        job, step, metrics = self._job, record["step"], record["metrics"]
        with told_as_not_saved(path):
            commit(path, step)
            self._keep_best_and_newest()
        epoch = (step - 1) // job.schedule.steps_per_epoch
        text = describe_epoch(epoch, job.settings.epochs, step, metrics, str(path))
        fields = {"step": step, "epoch": epoch + 1, "path": str(path), "metrics": metrics}
        job.channel.tell(Note(text, "checkpoint", fields))

    def _keep_best_and_newest(self) -> None:
        """Let `best` name the best of what stays, and remove the rest, if old checkpoints are to go."""
        save_dir, settings = self._job.save_dir, self._job.settings
        if settings.keep_last is None:
            point_best(save_dir, find_committed(save_dir))
            return
        for problem in keep_newest(save_dir, settings.keep_last, settings.keep_best):
            self._job.channel.tell(Note(f"warning: {problem}", "warning"))


def as_ray_checkpoint(path: StoragePath) -> Checkpoint:
    """Return a folder as Ray Train names it wherever it lies."""
    if isinstance(path, ObjectPath):
        return Checkpoint(path.key, path.filesystem)
    return Checkpoint.from_directory(path)
