"""A run on disk: which folders are whole checkpoints, which is newest, which is best, what may be removed.

    <save-path>/
      0/ 1/ ... step-000500/   config.json model.safetensors state/ run.json, and COMMITTED written last
      best -> 1                the whole checkpoint with the most expected tokens per verification; on an object
                               store, which has no links, an object that holds the name "1"
      run.yaml                 the resolved settings
      initial_metrics.json     validation of the untrained draft
      metrics.jsonl            every logged point (`metrics_file.py`)
      plan.json                what the run is planned with, in numbers, and on which machines
      samples.parquet          what the plan was made of
      quarantine.jsonl         files that are left out
      run.lock                 locked by the driver while it lives (`run_lock.py`)

A folder counts as a checkpoint only once COMMITTED is in it. Half-written ones are never resumed from; their
number may well be the highest.
"""

import errno
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ray.errors import CheckpointError
from eagle3_ray.storage import ObjectPath, StoragePath, list_objects, remove_tree, write_atomically
from eagle3_ray.training.stagnation import BEST_METRIC, NOT_VALIDATED, Stagnation

COMMITTED, RECORD, STATE, BEST, RUN_YAML = "COMMITTED", "run.json", "state", "best", "run.yaml"
INITIAL_METRICS, SAMPLES, QUARANTINE = "initial_metrics.json", "samples.parquet", "quarantine.jsonl"
METRICS, PLAN = "metrics.jsonl", "plan.json"
LOCK = "run.lock"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
LOGGER_RUN_ID = "logger_run_id.txt"
BROKEN_SNAPSHOT = f"{RAY_SNAPSHOT}.broken"
# Ray Train's own files in its run folder.
RAY_FILES = (RAY_SNAPSHOT, BROKEN_SNAPSHOT, ".validate_storage_marker")
PARTS = {"config.json", "model.safetensors", STATE, RECORD, COMMITTED}
EVALUATION = "evaluation.json"  # what `evaluate` leaves in a checkpoint
_NAME = re.compile(r"\d+|step-\d+")
# What the record, the marker and (by the library) the tensors are called until they are whole.
_UNFINISHED = re.compile(rf"\.({COMMITTED}|{RECORD})\..*|\.tmp\w+")


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A whole checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer updates done when it was saved; 0 of a dry run.
        metrics: Last logged and validated, by name.
        identity: What a run must share to go on from it.
        stagnation: For how long validation has not improved.
    """

    path: StoragePath
    step: int
    metrics: Mapping[str, float]
    identity: Mapping[str, Any]
    stagnation: Stagnation = NOT_VALIDATED


def epoch_folder(epoch: int) -> str:
    """Name of the checkpoint after epoch `epoch` (0-based), as in `./checkpoints/0/`."""
    return str(epoch)


def step_folder(step: int) -> str:
    """Name of a checkpoint within an epoch, after `step` updates."""
    return f"step-{step:06d}"


def is_step_folder(name: str) -> bool:
    """Tell a checkpoint within an epoch from one after an epoch."""
    return name.startswith("step-")


def find_committed(save_dir: StoragePath) -> list[CommittedCheckpoint]:
    """Return the whole checkpoints of a run, oldest first; half-written ones are passed over.

    Raises:
        CheckpointError: A committed checkpoint has lost a part since.
    """
    if not save_dir.is_dir():
        return []
    found = [_open(save_dir / name, parts) for name, parts in _list_folders(save_dir).items() if COMMITTED in parts]
    # An epoch that was stopped before its validation has two of one step; the validated one is the newer.
    return sorted(found, key=lambda checkpoint: (checkpoint.step, not is_step_folder(checkpoint.path.name)))


def latest_committed(save_dir: StoragePath) -> CommittedCheckpoint | None:
    """Return the whole checkpoint with the most updates, or None; what a dry run left has none to go on from."""
    return latest_trained(find_committed(save_dir))


def latest_trained(committed: Sequence[CommittedCheckpoint]) -> CommittedCheckpoint | None:
    """Return the newest of these checkpoints, given oldest first, if any update was made until then."""
    return committed[-1] if committed and committed[-1].step > 0 else None


def holds_dry_run(save_dir: StoragePath) -> bool:
    """Tell whether all there is of a run is what a dry one left, which binds nobody to its settings."""
    committed = find_committed(save_dir)
    return len(committed) > 0 and latest_trained(committed) is None


def find_uncommitted(save_dir: StoragePath) -> list[StoragePath]:
    """Return folders that a save was interrupted in."""
    if not save_dir.is_dir():
        return []
    folders = _list_folders(save_dir)
    names = [name for name, parts in folders.items() if COMMITTED not in parts and _are_ours(parts)]
    return [save_dir / name for name in sorted(names)]


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a save was killed in the middle of, where the same checkpoint is saved again."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()


def commit(path: StoragePath, step: int) -> None:
    """Mark a checkpoint as whole, once all that it holds is on disk: older ones may be removed because of the marker.

    Raises:
        CheckpointError: A part is missing.
        OSError: The disk cannot be written.
    """
    missing = sorted(PARTS - {COMMITTED} - {part.name for part in path.iterdir()})
    if missing:
        raise CheckpointError(f"{path}: cannot be committed without {', '.join(missing)}. The storage lost files.")
    if isinstance(path, Path):
        _sync(path)
    write_atomically(path / COMMITTED, json.dumps({"step": step}) + "\n")


def choose_best(committed: Sequence[CommittedCheckpoint]) -> CommittedCheckpoint | None:
    """Return the one with the most expected tokens; the newest if none was validated. Of equals, the older."""
    scored = [c for c in committed if BEST_METRIC in c.metrics]
    if scored:
        return max(scored, key=lambda c: c.metrics[BEST_METRIC])
    return committed[-1] if committed else None


def point_best(save_dir: StoragePath, committed: Sequence[CommittedCheckpoint]) -> StoragePath | None:
    """Let `best` name the best of these checkpoints, given oldest first. Returns the folder it names."""
    best = choose_best(committed)
    if best is None:
        return None
    if isinstance(save_dir, ObjectPath):  # which has no links: an object that holds the name
        (save_dir / BEST).write_bytes(best.path.name.encode())
        return best.path
    temporary = save_dir / f".{BEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(best.path.name)
    os.replace(temporary, save_dir / BEST)
    return best.path


def follow_best(path: StoragePath) -> StoragePath:
    """Return the folder that a run's `best` names; any other path as it is."""
    if isinstance(path, ObjectPath) and path.name == BEST and path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path.resolve()


def check_best_is_ours(save_dir: StoragePath) -> None:
    """Refuse a `best` that was copied: it would hide the one this program makes.

    Raises:
        CheckpointError: It is a folder.
    """
    best = save_dir / BEST
    if best.is_dir() and not (isinstance(best, Path) and best.is_symlink()):
        raise CheckpointError(f"{best}: expected the link this program makes, found a copy. Move it away.")


def check_writable(save_dir: StoragePath, flag: str = "--save-path") -> None:
    """Make the run folder, and write a file there once, so that hours of training are not for nothing.

    Args:
        save_dir: The run folder, or another that is written to.
        flag: What names it.

    Raises:
        CheckpointError: It cannot be made, or not be written to.
        StorageError: It lies on an object store that cannot be written.
    """
    probe = save_dir / f".write-probe-{uuid.uuid4().hex[:8]}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{save_dir}: cannot be written to ({error.strerror}). Choose another {flag}, or give the user "
            f"that runs this (id {os.getuid()}) the right to write there."
        ) from error


def check_same_run(checkpoint: CommittedCheckpoint, identity: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        CheckpointError: Names everything that differs.
    """
    saved, identity = _flatten(checkpoint.identity), _flatten(identity)
    keys = sorted(set(saved) | set(identity))
    differing = [
        f"{key} was {saved.get(key)!r}, is {identity.get(key)!r}" for key in keys if saved.get(key) != identity.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: saved by a run with other settings or data:\n  "
            + "\n  ".join(differing)
            + "\n  Give the same ones, another --save-path, or --no-resume-from-checkpoint to start over."
        )


def remove_run(save_dir: StoragePath) -> list[StoragePath]:
    """Remove what earlier runs of this program wrote to the folder, and nothing else. Returns what was left alone.

    The lock stays too: a file of that name that somebody else made would be another lock.
    """
    if not save_dir.is_dir():
        return []
    best = save_dir / BEST
    if isinstance(best, ObjectPath) or best.is_symlink():
        best.unlink(missing_ok=True)
    for name in (RUN_YAML, INITIAL_METRICS, METRICS, PLAN, SAMPLES, QUARANTINE, LOGGER_RUN_ID, *RAY_FILES):
        (save_dir / name).unlink(missing_ok=True)
    for folder in find_own_folders(save_dir):
        remove_checkpoint(folder)
    return sorted((path for path in save_dir.iterdir() if path.name != LOCK), key=str)


def remove_checkpoint(path: StoragePath) -> None:
    """Remove a checkpoint, its marker first: where this breaks off, it is none any more."""
    (path / COMMITTED).unlink(missing_ok=True)
    remove_tree(path)


def find_own_folders(save_dir: StoragePath) -> list[StoragePath]:
    """Return the folders of checkpoints, whole ones and others, that hold nothing of somebody else."""
    return [folder for name in _list_folders(save_dir) if is_ours(folder := save_dir / name)]


def is_ours(path: StoragePath) -> bool:
    """Tell whether a folder, not a link to one, holds parts of a checkpoint and nothing else, or nothing at all."""
    is_link = isinstance(path, Path) and path.is_symlink()
    return not is_link and _are_ours({part.name for part in path.iterdir()})


def _sync(folder: Path) -> None:
    """Wait until a folder is on disk with all below it, and by its own name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what some mounts say of every folder
                raise
        finally:
            os.close(descriptor)


def _flatten(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return what is nested under dotted names, so that a difference can be told in a line."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _list_folders(save_dir: StoragePath) -> dict[str, set[str]]:
    """Return by name what is directly in each folder that is named as a checkpoint's."""
    if isinstance(save_dir, Path):
        paths = [path for path in save_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return {path.name: {part.name for part in path.iterdir()} for path in paths}
    folders: dict[str, set[str]] = {}
    for stored in list_objects(save_dir):  # one request for all of them
        name, _, below = stored.name.partition("/")
        if below and _NAME.fullmatch(name):
            folders.setdefault(name, set()).add(below.partition("/")[0])
    return folders


def _open(path: StoragePath, parts: set[str]) -> CommittedCheckpoint:
    missing = sorted(PARTS - parts)
    if missing:
        raise CheckpointError(
            f"{path}: committed, but {', '.join(missing)} is gone. Restore it or move the folder away."
        )
    try:
        step = int(json.loads((path / COMMITTED).read_text(encoding="utf-8"))["step"])
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        metrics, told = record["metrics"], record.get("stagnation")
        # One from before this was counted begins the count.
        stagnation = NOT_VALIDATED.after(metrics) if told is None else Stagnation(**told)
        return CommittedCheckpoint(path, step, metrics, record["identity"], stagnation)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {COMMITTED} or {RECORD} cannot be read ({error!r}). Move the folder away."
        ) from error


def _are_ours(parts: set[str]) -> bool:
    """Tell whether a folder holds parts of a checkpoint and nothing else, or nothing at all."""
    return all(part in PARTS or part == EVALUATION or _UNFINISHED.fullmatch(part) for part in parts)
