"""Which figures there are, and what each panel of them shows of a run. Of very many points neighbours are averaged."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from eagle3_ray.metrics import TRAIN, VAL
from eagle3_ray.report.reading import RunRecord, Series

MAX_POINTS = 400


class Panel(NamedTuple):
    """One metric.

    Fields: its name after `train/` and `val/`, the title, the label of its axis, what values are multiplied by.
    """

    metric: str
    title: str
    label: str
    scale: float = 1.0


class FigureSpec(NamedTuple):
    """What is drawn together.

    Fields: file name, title, what to know of it, panels, whether these share their axis of values, whether the other
    axis is epochs instead of steps.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    shares_y: bool = False
    is_over_epochs: bool = False


# Of runs whose epochs are of different lengths; those of one length have epochs on every figure's upper edge.
OVER_EPOCHS = FigureSpec(
    "epochs",
    "Over epochs",
    "The runs' epochs have different numbers of steps: the same curves over the passes over the samples.",
    (Panel("expected_tokens", "expected tokens per verification", "tokens"), Panel("loss", "loss", "loss")),
    is_over_epochs=True,
)


def choose_figures(runs: Sequence[RunRecord]) -> list[FigureSpec]:
    """Return the figures that something was logged for, without panels that would stay empty."""
    specs = figure_specs(max(run.num_ttt_steps for run in runs))
    lengths = {run.steps_per_epoch for run in runs}
    if len(lengths) > 1 and None not in lengths:
        specs.insert(1, OVER_EPOCHS)
    shown = []
    for spec in specs:
        panels = tuple(panel for panel in spec.panels if any(series_of(run, panel) for run in runs))
        if panels:
            shown.append(spec._replace(panels=panels))
    return shown


def figure_specs(num_ttt_steps: int) -> list[FigureSpec]:
    """Return the figures of runs with so many TTT steps."""

    def a_token(metric: str, label: str) -> list[Panel]:
        return [Panel(f"{metric}_{k}", f"drafted token {k + 1}", label) for k in range(num_ttt_steps)]

    return [
        FigureSpec(
            "tokens",
            "Expected tokens per verification",
            "The verifier's own token is counted: 1 is no gain. A star marks the best checkpoint.",
            (Panel("expected_tokens", "", "tokens"),),
        ),
        FigureSpec(
            "loss",
            "Loss",
            "First the sum that training minimises, then the mean of each TTT step without decay.",
            (Panel("loss", "all tokens", "loss"), *a_token("loss", "loss")),
        ),
        FigureSpec(
            "acceptance",
            "Acceptance",
            "Of the positions where all drafted tokens before were right, the share where this one is "
            "(cond_acc): what a verifier that takes its likeliest token would accept.",
            tuple(a_token("cond_acc", "share")),
            shares_y=True,
        ),
        FigureSpec(
            "accuracy",
            "Accuracy",
            "Of all positions, the share where this drafted token is right, whatever those before it were.",
            tuple(a_token("accuracy", "share")),
            shares_y=True,
        ),
        FigureSpec(
            "optimizer",
            "Learning rate and gradient norm",
            "The norm is that before clipping.",
            (Panel("lr", "learning rate", ""), Panel("grad_norm", "gradient norm", "")),
        ),
        FigureSpec(
            "speed",
            "Speed and memory",
            "Tokens of all workers, padding not counted; the share of the time that workers waited for data; the most "
            "memory that a worker has held so far.",
            (
                Panel("tokens_per_s", "tokens/s", ""),
                Panel("data_wait_frac", "waiting for data", "% of the time", 100.0),
                Panel("peak_memory_bytes", "peak memory", "GiB", 2**-30),
            ),
        ),
    ]


def series_of(run: RunRecord, panel: Panel) -> dict[str, Series]:
    """Return what a panel shows of a run: by `train` and `val`, those that were logged."""
    found = {part: run.series(f"{part}/{panel.metric}") for part in (TRAIN, VAL)}
    return {
        part: Series(series.steps, [value * panel.scale for value in series.values])
        for part, series in found.items()
        if series.steps
    }


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """Return a series of so many points at most, each the mean of its neighbours, at the last one's step."""
    size = math.ceil(len(series.steps) / max_points)
    if size <= 1:
        return series
    starts = range(0, len(series.steps), size)
    means = [sum(part) / len(part) for part in (series.values[start : start + size] for start in starts)]
    return Series([series.steps[min(start + size, len(series.steps)) - 1] for start in starts], means)
