"""TensorBoard, Weights & Biases and Trackio behind one Protocol.

A training run keeps one id in its run folder, so that a resumed run goes on in the same place:

    TensorBoard   <log_dir>/tensorboard/<run name>-<id>/
    wandb         run id <id>; offline files in <log_dir>/wandb/
    Trackio       run <run name>-<id> in <log_dir>/trackio/<project>.db

A resumed run first repeats the steps that came after its checkpoint. Steps never go backwards in a chart:
TensorBoard hides and Trackio drops the older points of the steps to be repeated; wandb cannot forget a point,
and silently ignores points whose step is not the highest, so steps travel there as a metric of their own.

Open loggers on one rank only. A library is imported only when it is chosen; keys and servers come from the
libraries' own environment variables (WANDB_API_KEY, WANDB_MODE, TRACKIO_SPACE_ID ...).
"""

import contextlib
import io
import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eagle3_ray.errors import UsageError
from eagle3_ray.metrics import metrics_table, unknown_names
from eagle3_ray.storage import StoragePath, write_atomically

# In the run folder; a run that starts over removes it and becomes a new run in every logger.
RUN_ID_FILE = "logger_run_id.txt"
SECRET_WORDS = ("key", "secret", "password", "token")

_log = logging.getLogger(__name__)


class MetricLogger(Protocol):
    """One place where metrics go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics measured after `step` optimizer steps."""

    def close(self) -> None:
        """Write everything out and let go of files, threads and connections."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger needs to know of the run.

    Attributes:
        log_dir: Folder that all loggers write under.
        name: The run's name.
        run_id: 8 hex digits, the same after every restart of the run.
        project: Project the run belongs to.
        settings: Resolved settings, without secrets.
        resume_step: Optimizer steps done by the checkpoint that training goes on from; 0 for a start.
    """

    log_dir: Path
    name: str
    run_id: str
    project: str
    settings: dict[str, Any]
    resume_step: int

    @property
    def unique_name(self) -> str:
        """A name no other run has: run folders are often called the same."""
        return f"{self.name}-{self.run_id}"

    @property
    def first_step(self) -> int:
        """Points from this step on will be written again."""
        return self.resume_step + 1 if self.resume_step else 0


class TensorBoardLogger:
    """Event files for TensorBoard, one folder a run."""

    def __init__(self, run: LoggedRun) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing_library("tensorboard", error) from error
        folder = run.log_dir / "tensorboard" / run.unique_name
        self._writer = SummaryWriter(str(folder), purge_step=run.first_step, flush_secs=10)
        settings_text = json.dumps(run.settings, indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{settings_text}\n```", run.first_step)
        self._writer.add_text("metrics", metrics_table(), run.first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """A wandb run, online or offline as WANDB_MODE says."""

    def __init__(self, run: LoggedRun) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing_library("wandb", error) from error
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                id=run.run_id,
                resume="allow",
                dir=str(run.log_dir),
                config=run.settings,
                # Ray already forwards the worker's output; wandb must not redirect it as well.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            wandb.teardown()
            raise UsageError(
                f"--logger wandb: cannot open run {run.run_id} of project {run.project} ({error}). "
                "Set WANDB_API_KEY in the workers' environment, or WANDB_MODE=offline to write files only."
            ) from error
        self._teardown = wandb.teardown
        # wandb drops points whose own step went back; ours travels beside the values and may.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics as one row, the step among them."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """Finish the run and wait until it is uploaded or on disk."""
        self._run.finish()
        # finish() may return a moment before the service process has written an offline file's last block.
        self._teardown()


class TrackioLogger:
    """A Trackio run in a database under the log folder.

    On a network file system Trackio itself appends JSONL files instead; its dashboard imports them later, and
    a run resumed before that keeps the points that it repeats.
    """

    def __init__(self, run: LoggedRun) -> None:
        folder = run.log_dir / "trackio"
        # Trackio reads the variable once, when it is imported.
        os.environ["TRACKIO_DIR"] = str(folder)
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError as error:
            raise _missing_library("trackio", error) from error
        if folder != trackio.TRACKIO_DIR:
            raise UsageError(
                f"--logger trackio: this process already writes to {trackio.TRACKIO_DIR}, not to {folder}. "
                "Start another process for another --log-dir."
            )
        self._finish = trackio.finish
        try:
            _drop_points(SQLiteStorage.get_project_db_path(run.project), run.unique_name, run.first_step)
            with _quiet():
                self._run = trackio.init(
                    project=run.project, name=run.unique_name, resume="allow", config=run.settings, embed=False
                )
        except (OSError, sqlite3.Error, ValueError) as error:
            raise UsageError(f"--logger trackio: cannot open run {run.unique_name} in {folder} ({error}).") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics as one row of the step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until all rows are written."""
        with _quiet():
            self._finish()


class MultiLogger:
    """Several loggers as one; none is a valid number of them."""

    def __init__(self, loggers: tuple[MetricLogger, ...]) -> None:
        self._loggers = loggers
        self._open = ExitStack()
        for logger in loggers:
            self._open.callback(logger.close)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics, all of which must be in `metrics.METRICS`, to every logger."""
        assert not unknown_names(metrics), f"not in METRICS: {unknown_names(metrics)}"
        for logger in self._loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        """Close every logger, the others too when one fails; closing twice is harmless."""
        self._open.close()


LOGGER_CLASSES: dict[str, Callable[[LoggedRun], MetricLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}


def open_loggers(
    names: tuple[str, ...],
    log_dir: Path,
    run_name: str,
    project: str,
    settings: dict[str, Any],
    resume_step: int,
    run_ids_dir: StoragePath,
) -> MultiLogger:
    """Open the chosen loggers, going on where this run's earlier attempts stopped.

    Args:
        names: Of LOGGER_CLASSES, in any order; empty opens nothing and writes nothing.
        log_dir: Folder that all loggers write under.
        run_name: Shown by the loggers.
        project: Shown by wandb and Trackio.
        settings: Stored beside the metrics; entries that are named like a secret are left out.
        resume_step: Optimizer steps done by the checkpoint that training goes on from; 0 for a start.
        run_ids_dir: The run folder; it keeps the run's id.

    Raises:
        UsageError: A library is missing, refuses its credentials, or a folder cannot be written.
    """
    if not names:
        return MultiLogger(())
    log_dir = log_dir.absolute()
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        run_id = _read_or_make_run_id(run_ids_dir)
    except OSError as error:
        raise UsageError(
            f"--logger {','.join(names)}: cannot write under {log_dir} or {run_ids_dir} ({error})."
        ) from error
    run = LoggedRun(log_dir, run_name, run_id, project, _without_secrets(settings), resume_step)
    with ExitStack() as opened:
        loggers: list[MetricLogger] = []
        for name in dict.fromkeys(names):
            loggers.append(LOGGER_CLASSES[name](run))
            opened.callback(loggers[-1].close)
        # All are open: from here on MultiLogger closes them.
        opened.pop_all()
    _log.info("run %s is logged to %s under %s", run.unique_name, ", ".join(names), log_dir)
    return MultiLogger(tuple(loggers))


def _read_or_make_run_id(run_ids_dir: StoragePath) -> str:
    path = run_ids_dir / RUN_ID_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    run_ids_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, run_id + "\n")
    return run_id


def _without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without entries whose last word is a secret's (api_key, hf-token); nested ones too."""
    kept = {}
    for name, value in settings.items():
        if name.lower().replace("-", "_").rsplit("_", 1)[-1] not in SECRET_WORDS:
            kept[name] = _without_secrets(value) if isinstance(value, Mapping) else value
    return kept


def _drop_points(database: Path, run_name: str, first_step: int) -> None:
    """Delete a run's points from a step on (Trackio's documented schema: table `metrics`)."""
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        connection.execute("DELETE FROM metrics WHERE run_name = ? AND step >= ?", (run_name, first_step))


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keep a library's greetings off the terminal; its warnings go to stderr and are seen."""
    return contextlib.redirect_stdout(io.StringIO())


def _missing_library(name: str, error: ImportError) -> UsageError:
    return UsageError(
        f"--logger {name}: its library cannot be imported ({error}). "
        f"Install it in the workers' environment (pip install {name}) or choose another logger."
    )
