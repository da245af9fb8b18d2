"""`metrics.jsonl` of the run folder: every logged point, whatever `--logger` says; `report` is made from it.

    {"step": 10, "time_s": 1764200000.0, "metrics": {"train/loss": 4.2, "train/lr": 0.0001, ...}}

A line a point, in the order of its steps; what is no finite number is null. A run that goes on from step s cuts the
lines after s, which it makes again. A line without its end was being written when the run was killed.

On this machine or a mount a line is appended as soon as it is logged. An object store cannot append: there the lines
are kept in memory and stored whole with each checkpoint and at the end, before the checkpoint counts. What a killed
run loses of them are the steps that it loses too.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from eagle3_ray.errors import CheckpointError, DataError
from eagle3_ray.storage import StoragePath, write_atomically


@dataclass(frozen=True)
class Point:
    """One line.

    Attributes:
        step: Optimizer steps done.
        time_s: When it was logged, in seconds since 1970.
        metrics: By their names; NaN for null.
    """

    step: int
    time_s: float
    metrics: Mapping[str, float]


class MetricsFile:
    """A `MetricLogger` that is always open, on rank 0.

    Args:
        path: The file; made if it is not there.
        resume_step: Steps done by the checkpoint that training goes on from; 0 for a start, which cuts all lines.
    """

    def __init__(self, path: StoragePath, resume_step: int) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        try:
            found = path.read_bytes() if path.is_file() else b""
            kept = lines_until(found, resume_step) if resume_step else b""
            self._lines = [kept]  # of an object store: all that is to be stored
            if isinstance(path, Path):
                if kept != found:
                    write_atomically(path, kept)
                self._file = path.open("ab")
        except OSError as error:
            raise _cannot_be_written(path, error) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line.

        Raises:
            CheckpointError: The disk cannot be written.
        """
        line = (json.dumps(to_record(metrics, step, time.time()), allow_nan=False) + "\n").encode()
        if self._file is None:
            self._lines.append(line)
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise _cannot_be_written(self._path, error) from error

    def store(self) -> None:
        """Have all lines on disk, or on the object store, when this returns.

        Raises:
            CheckpointError: The disk cannot be written.
            StorageError: The object store cannot be written.
        """
        if self._file is None:
            self._lines = [b"".join(self._lines)]
            write_atomically(self._path, self._lines[0])
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_be_written(self._path, error) from error

    def close(self) -> None:
        """Store what is left, and close the file."""
        self.store()
        if self._file is not None:
            self._file.close()


def to_record(metrics: Mapping[str, float], step: int, time_s: float) -> dict[str, object]:
    """Return a point as JSON has it."""
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"step": step, "time_s": round(time_s, 3), "metrics": values}


def lines_until(content: bytes, step: int) -> bytes:
    """Return the file's beginning: all before the first line after a step, or without an end.

    A damaged line is kept for `read_points` to name: no run is to end for it.
    """
    kept = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            if to_point(line).step > step:
                break
        except ValueError:
            pass
        kept += len(line)
    return content[:kept]


def read_points(path: StoragePath) -> tuple[list[Point], bool]:
    """Return a run's points in order, and whether the file ends in a line that was cut short and is left out.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It cannot be read, or a line of it.
        StorageError: The object store cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return list(_iter_points(path, content)), not content.endswith(b"\n") and content != b""


def _iter_points(path: StoragePath, content: bytes) -> Iterator[Point]:
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                yield to_point(line)
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} cannot be read ({error}), expected "
                    '{"step": 10, "time_s": 1.5, "metrics": {"train/loss": 0.5}}. Take the line out of the file.'
                ) from error


def to_point(line: bytes) -> Point:
    """Return what a line says.

    Raises:
        ValueError: It is not such a line.
    """
    record = json.loads(line)
    try:
        step, time_s, metrics = record["step"], record["time_s"], record["metrics"]
        values = {str(name): math.nan if value is None else float(value) for name, value in metrics.items()}
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step is {step!r}")
        return Point(step, float(time_s), values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error


def _cannot_be_written(path: StoragePath, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({error.strerror}). Make room, or the folder writable.")
