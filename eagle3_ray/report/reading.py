"""A run folder -> what `report` shows of it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from eagle3_ray.errors import DataError, UsageError
from eagle3_ray.metrics import VAL
from eagle3_ray.settings_file import read_run_yaml
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.metrics_file import Point, read_points
from eagle3_ray.training.plan_file import PlanRecord, read_plan
from eagle3_ray.training.run_folder import (
    EVALUATION,
    METRICS,
    PLAN,
    QUARANTINE,
    RUN_YAML,
    CommittedCheckpoint,
    choose_best,
    find_committed,
)

_TTT_METRIC = re.compile(r"(?:train|val)/\w+_(\d+)")


class Series(NamedTuple):
    """One metric over steps; points that are no finite number are left out."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        path: The folder.
        label: A short name that no other run of the report has.
        points: Logged, in order.
        notes: What the reader should know of what was read.
        settings: Of run.yaml, by name.
        plan: None of a run that stored none.
        checkpoints: Whole ones, oldest first.
        evaluations: What was measured of them beside training, by the checkpoint's name.
        num_left_out_files: Lines of quarantine.jsonl.
    """

    path: StoragePath
    label: str
    points: Sequence[Point]
    notes: Sequence[str]
    settings: Mapping[str, Any]
    plan: PlanRecord | None
    checkpoints: Sequence[CommittedCheckpoint]
    evaluations: Mapping[str, Mapping[str, Any]]
    num_left_out_files: int

    @cached_property
    def best(self) -> CommittedCheckpoint | None:
        """The checkpoint that `best` names."""
        return choose_best(self.checkpoints)

    @cached_property
    def num_ttt_steps(self) -> int:
        """TTT steps that something was logged of."""
        matches = (_TTT_METRIC.fullmatch(name) for point in self.points for name in point.metrics)
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of one pass over the training samples, if that is known."""
        return None if self.plan is None else self.plan.steps.steps_per_epoch

    @property
    def untrained(self) -> Mapping[str, float]:
        """What the draft was validated at before its first step; empty if it was not."""
        first = self.points[0]
        is_validation = first.step == 0 and all(name.startswith(f"{VAL}/") for name in first.metrics)
        return first.metrics if is_validation else {}

    def series(self, name: str) -> Series:
        """Return one metric over steps; empty if it was never logged."""
        found = [(point.step, point.metrics[name]) for point in self.points if name in point.metrics]
        finite = [(step, value) for step, value in found if math.isfinite(value)]
        return Series([step for step, _ in finite], [value for _, value in finite])


def read_runs(paths: Sequence[StoragePath]) -> list[RunRecord]:
    """Read run folders, in the order given.

    Raises:
        DataError: Some cannot be used; all of them in one message.
        CheckpointError: A committed checkpoint has lost a part since.
        StorageError: An object store cannot be read.
    """
    runs, problems = [], []
    for path, label in zip(paths, short_names(paths), strict=True):
        try:
            runs.append(read_run(path, label))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return runs


def read_run(path: StoragePath, label: str) -> RunRecord:
    """Read one run folder. Errors as in `read_runs`."""
    if not path.is_dir():
        found = "is a file" if path.is_file() else "is not there"
        raise DataError(f"{path}: {found}; expected a run folder, which --save-path of train names.")
    checkpoints = find_committed(path)
    try:
        points, is_cut = read_points(path / METRICS)
    except FileNotFoundError:
        points, is_cut = [], False
    if not points:
        raise DataError(describe_without_metrics(path, is_run=bool(checkpoints) or (path / RUN_YAML).is_file()))
    notes = ["The last line of metrics.jsonl was cut short, as by a kill, and is left out."] if is_cut else []
    plan = read_plan(path / PLAN)
    if plan is None:
        notes.append(f"There is no {PLAN}: nothing is known of packing, machine and epochs.")
    evaluations, unreadable = read_evaluations(checkpoints)
    return RunRecord(
        path=path,
        label=label,
        points=points,
        notes=[*notes, *unreadable],
        settings=read_settings_of(path),
        plan=plan,
        checkpoints=checkpoints,
        evaluations=evaluations,
        num_left_out_files=count_lines(path / QUARANTINE),
    )


def describe_without_metrics(path: StoragePath, is_run: bool) -> str:
    """Say what is amiss with a folder that holds no logged point."""
    if is_run:
        return (
            f"{path}: {METRICS} holds no logged point: the run has not logged one yet, or was made by an older "
            "release. On an object store the file is written with the first checkpoint."
        )
    return f"{path}: is no run folder: it holds neither {RUN_YAML} nor a checkpoint nor {METRICS}."


def read_settings_of(path: StoragePath) -> Mapping[str, Any]:
    """Return the settings of a run folder's run.yaml; none if it is gone.

    Raises:
        DataError: It is damaged.
    """
    if not (path / RUN_YAML).is_file():
        return {}
    try:
        return read_run_yaml(path / RUN_YAML)
    except UsageError as error:
        raise DataError(str(error)) from error


def read_evaluations(checkpoints: Sequence[CommittedCheckpoint]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Return what was measured of checkpoints, by their names, and notes of what of it cannot be read."""
    found: dict[str, Mapping[str, Any]] = {}
    notes = []
    for checkpoint in checkpoints:
        try:
            content = json.loads((checkpoint.path / EVALUATION).read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            notes.append(f"{checkpoint.path.name}/{EVALUATION} cannot be read ({error}) and is left out.")
            continue
        if isinstance(content, dict):
            found[checkpoint.path.name] = content
        else:
            notes.append(f"{checkpoint.path.name}/{EVALUATION} is no JSON object and is left out.")
    return found, notes


def count_lines(path: StoragePath) -> int:
    """Return the lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def short_names(paths: Sequence[StoragePath]) -> list[str]:
    """Return as little of the ends of paths as tells each from all others."""
    parts = [[part for part in str(path).split("/") if part] for path in paths]
    for num_parts in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-num_parts:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
