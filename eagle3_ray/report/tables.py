"""Runs -> headline and tables, as text: what was reached, with what, on what."""

import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eagle3_ray.metrics import LEFT_OUT_STEPS, TRAIN, VAL
from eagle3_ray.report.reading import RunRecord
from eagle3_ray.training.plan_file import MachineNumbers, PlanRecord
from eagle3_ray.training.run_folder import BEST_METRIC

NOTHING = "\N{EN DASH}"
# Where a run lies, and what it is called: these differ always.
NAMES_OF_A_RUN = {"save_path", "log_dir", "run_name"}
# What must be the same for two runs to be validated on the same samples.
VALIDATED_BY = ("verifier_name_or_path", "data_path", "train_frac", "seed", "total_seq_len", "ttt_steps")


class Row(NamedTuple):
    """A line of a table: what it is about, a cell a column, and the column that is best, if one is."""

    name: str
    cells: tuple[str, ...]
    best: int | None = None


@dataclass(frozen=True)
class Table:
    """Columns are runs, or what `columns` says."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


class Headline(NamedTuple):
    """A run in one glance: its label, the number, and what that is of."""

    label: str
    number: str
    text: str


def headline(run: RunRecord) -> Headline:
    """Return what the run has reached."""
    best = run.best
    if best is None:
        return Headline(run.label, NOTHING, f"no checkpoint yet; last logged after step {run.points[-1].step:,}")
    place = f"checkpoint {best.path.name} (step {best.step:,}{in_epochs(run, best.step)})"
    if BEST_METRIC not in best.metrics:
        return Headline(run.label, NOTHING, f"{place}, the newest: nothing was validated")
    text = f"expected tokens per verification: {place} is the best of {len(run.checkpoints)}"
    if BEST_METRIC in run.untrained:
        text += f"; {run.untrained[BEST_METRIC]:.2f} before training"
    return Headline(run.label, f"{best.metrics[BEST_METRIC]:.2f}", text)


def explain_tokens(runs: Sequence[RunRecord]) -> str:
    """Say what the headline's number is, and where those of the runs cannot be compared."""
    lengths = sorted({run.num_ttt_steps for run in runs})
    told = (
        "Expected tokens per verification are simulated on the validation samples, for a greedy chain of "
        f"{' or '.join(map(str, lengths))} drafted tokens. The verifier's own token is counted: 1 is no gain."
    )
    differing = [name for name in VALIDATED_BY if len({_tell(run.settings.get(name)) for run in runs}) > 1]
    if differing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in differing)
        told += f" These runs differ in {flags}: their numbers may not be of the same samples or chains."
    return told


def in_epochs(run: RunRecord, step: int) -> str:
    """Return `, epoch 1.5` for a step, or nothing where that is not known."""
    return "" if run.steps_per_epoch is None else f", epoch {step / run.steps_per_epoch:.3g}"


def final_numbers(runs: Sequence[RunRecord]) -> Table:
    """Return what each run's best checkpoint was validated at, and how its training went."""
    num_ttt_steps = max(run.num_ttt_steps for run in runs)
    at_best = {
        "expected tokens per verification": (f"{VAL}/expected_tokens", "{:.3f}", max),
        "half its 95 % interval": (f"{VAL}/expected_tokens_ci", "±{:.3f}", None),
        "validation loss": (f"{VAL}/loss", "{:.4f}", None),
        **{
            f"acceptance of drafted token {k + 1}": (f"{VAL}/cond_acc_{k}", "{:.1%}", max) for k in range(num_ttt_steps)
        },
        **{f"accuracy of drafted token {k + 1}": (f"{VAL}/accuracy_{k}", "{:.1%}", max) for k in range(num_ttt_steps)},
    }
    rows = [
        Row("best checkpoint", tuple(run.best.path.name if run.best else NOTHING for run in runs)),
        Row("its step", tuple(f"{run.best.step:,}" if run.best else NOTHING for run in runs)),
    ]
    for name, (metric, form, choose) in at_best.items():
        values = [None if run.best is None else run.best.metrics.get(metric) for run in runs]
        if any(value is not None for value in values):
            rows.append(Row(name, _cells(values, form), _chosen(values, choose)))
    rows += _training_rows(runs)
    return Table("Final numbers", _labels(runs), tuple(rows), "Validated numbers are those of the best checkpoint.")


def _training_rows(runs: Sequence[RunRecord]) -> Iterable[Row]:
    def row(name: str, metric: str, reduce: Callable[[list[float]], float], form: str, scale: float = 1.0) -> Row:
        series = [run.series(f"{TRAIN}/{metric}").values for run in runs]
        return Row(name, _cells([reduce(values) * scale if values else None for values in series], form))

    yield Row("steps made", tuple(_tell_steps(run) for run in runs))
    yield row("last training loss", "loss", lambda values: values[-1], "{:.4f}")
    yield row("tokens/s, median", "tokens_per_s", statistics.median, "{:,.0f}")
    yield row("waiting for data, mean", "data_wait_frac", statistics.fmean, "{:.2%}")
    yield row("peak memory of a worker", "peak_memory_bytes", max, "{:.2f} GiB", 2**-30)
    yield row("updates left out", LEFT_OUT_STEPS.removeprefix(f"{TRAIN}/"), lambda values: values[-1], "{:.0f}")
    yield Row("first logged (UTC)", tuple(_tell_time(run.points[0].time_s) for run in runs))
    yield Row("last logged (UTC)", tuple(_tell_time(run.points[-1].time_s) for run in runs))


def checkpoints(run: RunRecord) -> Table:
    """Return what each checkpoint of a run was validated at."""
    metrics = [f"{VAL}/loss", *(f"{VAL}/cond_acc_{k}" for k in range(run.num_ttt_steps)), BEST_METRIC]
    forms = ["{:.4f}", *["{:.1%}"] * run.num_ttt_steps, "{:.3f}"]
    columns = ("step", "loss", *(f"accepted {k + 1}" for k in range(run.num_ttt_steps)), "tokens")
    rows = []
    for checkpoint in run.checkpoints:
        cells = [_cell(checkpoint.metrics.get(name), form) for name, form in zip(metrics, forms, strict=True)]
        mark = " (best)" if run.best is not None and checkpoint.path.name == run.best.path.name else ""
        rows.append(Row(checkpoint.path.name + mark, (f"{checkpoint.step:,}", *cells)))
    return Table(f"Checkpoints of {run.label}", columns, tuple(rows))


def evaluations(run: RunRecord) -> Table | None:
    """Return what was measured of a run's checkpoints beside training, if anything was: numbers and lists of them."""
    found = {name: _flat(content) for name, content in run.evaluations.items()}
    names = list(dict.fromkeys(key for content in found.values() for key in content))
    if not names:
        return None
    rows = tuple(Row(key, tuple(content.get(key, NOTHING) for content in found.values())) for key in names)
    return Table(f"Evaluation of {run.label}", tuple(f"checkpoint {name}" for name in found), rows)


def _flat(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries that are text, numbers or lists of them, as text."""
    flat = {}
    for key, value in content.items():
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(item, str | int | float) for item in items):
            flat[str(key)] = " ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in items)
    return flat


def data(runs: Sequence[RunRecord]) -> Table:
    """Return how the samples are packed, and what is left out of them."""

    def row(name: str, tell: Callable[[PlanRecord], str]) -> Row:
        return Row(name, tuple(NOTHING if run.plan is None else tell(run.plan) for run in runs))

    def both(plan: PlanRecord, field: Callable[[Any], int]) -> int:
        return field(plan.training) + (0 if plan.validation is None else field(plan.validation))

    rows = (
        row("samples", lambda plan: f"{both(plan, lambda split: split.samples):,}"),
        row("tokens", lambda plan: f"{both(plan, lambda split: split.tokens):,}"),
        row("bins to train on", lambda plan: f"{plan.training.bins:,}"),
        row("of them filled", lambda plan: f"{plan.training.fill_frac:.1%}"),
        row("bins to validate on", lambda plan: f"{0 if plan.validation is None else plan.validation.bins:,}"),
        row("samples without a supervised token, dropped", lambda plan: f"{both(plan, lambda split: split.dropped):,}"),
        row("samples longer than a bin, cut", lambda plan: f"{both(plan, lambda split: split.cut):,}"),
        Row("bad files left out", tuple(f"{run.num_left_out_files:,}" for run in runs)),
        row("bins a step", lambda plan: f"{plan.steps.bins_per_step:,}"),
        row("steps an epoch", lambda plan: f"{plan.steps.steps_per_epoch:,}"),
        row("steps of all epochs", lambda plan: f"{plan.steps.total_steps:,}"),
    )
    return Table("Data and packing", _labels(runs), rows)


def machines(runs: Sequence[RunRecord]) -> Table:
    """Return what the runs were last on, and with which releases."""

    def row(name: str, tell: Callable[[MachineNumbers], str]) -> Row:
        return Row(name, tuple(NOTHING if run.plan is None else tell(run.plan.machine) for run in runs))

    versions = [{} if run.plan is None else run.plan.versions for run in runs]
    packages = list(dict.fromkeys(name for own in versions for name in own))
    rows = (
        row("workers", lambda m: f"{m.workers} with {m.cpus_per_worker} CPUs{' and a GPU' * m.use_gpu} each"),
        row("nodes", lambda m: f"{m.nodes}"),
        row("GPUs of the cluster", lambda m: " ".join([str(m.num_gpus), *m.gpu_kinds])),
        row("the driver's machine", lambda m: f"{m.driver_cpus} CPUs ({m.driver_processor})"),
        row("its memory", lambda m: f"{m.driver_memory_bytes / 2**30:.1f} GiB"),
        row("its system", lambda m: m.driver_system),
        *(Row(name, tuple(own.get(name, NOTHING) for own in versions)) for name in packages),
    )
    return Table("Machine and versions", _labels(runs), rows)


def differing_settings(runs: Sequence[RunRecord]) -> Table:
    """Return the settings in which runs differ."""
    rows = [row for row in all_settings(runs).rows if len(set(row.cells)) > 1 and row.name not in NAMES_OF_A_RUN]
    note = "" if rows else "They differ in none."
    return Table("Settings in which the runs differ", _labels(runs), tuple(rows), note)


def all_settings(runs: Sequence[RunRecord]) -> Table:
    """Return all settings."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = tuple(Row(name, tuple(_tell(run.settings.get(name)) for run in runs)) for name in names)
    return Table("All settings", _labels(runs), rows)


def _labels(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    return tuple(run.label for run in runs)


def _cells(values: Sequence[float | None], form: str) -> tuple[str, ...]:
    return tuple(_cell(value, form) for value in values)


def _cell(value: float | None, form: str) -> str:
    return NOTHING if value is None or math.isnan(value) else form.format(value)


def _chosen(values: Sequence[float | None], choose: Callable[[list[float]], float] | None) -> int | None:
    """Return which of several values is the best, if one is."""
    known = [value for value in values if value is not None]
    if choose is None or len(known) < 2 or known.count(choose(known)) > 1:
        return None
    return values.index(choose(known))


def _tell(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def _tell_steps(run: RunRecord) -> str:
    made = run.points[-1].step
    return f"{made:,}" if run.plan is None else f"{made:,} of {run.plan.steps.total_steps:,}"


def _tell_time(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
