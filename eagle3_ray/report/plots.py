"""Runs -> curves over steps: once as SVG that takes its colours from the page, once as PNG on white.

A figure is a row or more of panels, a panel one metric. Of one run, training and validation have a colour each; of
several, a run has a colour, training is thin and validation has points.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eagle3_ray.metrics import TRAIN, VAL
from eagle3_ray.report.figures import FigureSpec, Panel, choose_figures, series_of, thin
from eagle3_ray.report.reading import RunRecord
from eagle3_ray.training.run_folder import BEST_METRIC

MAX_COLUMNS = 4
PNG_DPI = 110
HEADROOM = 0.08  # of what is drawn
LOG_SCALE_FROM = 50.0  # times the smallest value of a gradient norm


class Palette(NamedTuple):
    """Colours of a figure: text and axes, grid, the runs'."""

    ink: str
    grid: str
    runs: tuple[str, ...]


ON_WHITE = Palette(
    "#24292f",
    "#d8dee4",
    ("#2a78d6", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#b8860b", "#5c677d"),
)
# Stand for the page's own in an SVG: `--ink`, `--grid`, `--run-0` ...
IN_PAGE = Palette("#010101", "#020202", tuple(f"#0303{number:02x}" for number in range(len(ON_WHITE.runs))))


class Drawing(NamedTuple):
    """A figure, drawn."""

    spec: FigureSpec
    svg: str
    png: bytes


def draw_figures(runs: Sequence[RunRecord]) -> list[Drawing]:
    """Draw all figures that something was logged for."""
    return [Drawing(spec, draw_svg(spec, runs), draw_png(spec, runs)) for spec in choose_figures(runs)]


def draw_svg(spec: FigureSpec, runs: Sequence[RunRecord]) -> str:
    """Return a figure as an <svg> element: colours are the page's, ids are the figure's own."""
    content = io.StringIO()
    with mpl.rc_context(drawing_settings(IN_PAGE, spec.name)):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        draw(spec, runs, IN_PAGE).savefig(content, format="svg", transparent=True, metadata=metadata)
    return embed(content.getvalue(), spec.name, spec.title)


def embed(text: str, name: str, title: str) -> str:
    """Turn matplotlib's SVG file into an element of a page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    for variable, color in [("ink", IN_PAGE.ink), ("grid", IN_PAGE.grid)]:
        text = text.replace(color, f"var(--{variable})")
    for number, color in enumerate(IN_PAGE.runs):
        text = text.replace(color, f"var(--run-{number})")
    return text


def draw_png(spec: FigureSpec, runs: Sequence[RunRecord]) -> bytes:
    """Return a figure as the bytes of a PNG file, with its title."""
    content = io.BytesIO()
    with mpl.rc_context(drawing_settings(ON_WHITE, spec.name)):
        figure = draw(spec, runs, ON_WHITE)
        figure.suptitle(spec.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        figure.savefig(content, format="png", dpi=PNG_DPI)
    return content.getvalue()


def drawing_settings(palette: Palette, name: str) -> mpl.RcParams:
    """Return matplotlib's settings of a figure."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return mpl.RcParams(
        {
            **dict.fromkeys(inked, palette.ink),
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": palette.grid,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": name,  # ids that are the same each time
        }
    )


def draw(spec: FigureSpec, runs: Sequence[RunRecord], palette: Palette) -> Figure:
    """Return a figure."""
    num_rows = math.ceil(len(spec.panels) / MAX_COLUMNS)
    num_columns = math.ceil(len(spec.panels) / num_rows)
    figure = Figure(figsize=(10, 0.5 + 2.6 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=spec.shares_y)
    for axes, panel in zip(grid.flat, spec.panels, strict=False):
        draw_panel(axes, panel, runs, palette, spec.is_over_epochs)
        if not spec.shares_y or axes in grid[:, 0]:
            axes.set_ylabel(panel.label)
        set_limits(axes, spec.panels if spec.shares_y else [panel], runs)
    for axes in list(grid.flat)[len(spec.panels) :]:
        axes.set_axis_off()
    handles = legend_handles(spec, runs, palette)
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 5))
    return figure


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunRecord], palette: Palette, is_over_epochs: bool) -> None:
    """Draw one metric of all runs."""
    ends = []
    for number, run in enumerate(runs):
        unit = (run.steps_per_epoch or 1) if is_over_epochs else 1
        for part, series in series_of(run, panel).items():
            color, style = line_style(part, number, len(runs), palette)
            steps, values = thin(series)
            axes.plot([step / unit for step in steps], values, color=color, **style)
        if f"{VAL}/{panel.metric}" == BEST_METRIC and run.best is not None and BEST_METRIC in run.best.metrics:
            color, _ = line_style(VAL, number, len(runs), palette)
            axes.plot(run.best.step / unit, run.best.metrics[BEST_METRIC], "*", color=color, markersize=13, zorder=5)
        ends += [run.points[0].step / unit, run.points[-1].step / unit]
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("epoch" if is_over_epochs else "step")
    margin = 0.03 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if not is_over_epochs:
        add_epochs(axes, runs)


def set_limits(axes: Axes, panels: Sequence[Panel], runs: Sequence[RunRecord]) -> None:
    """Let an axis begin where its metric does, and end above the highest value of the panels that share it."""
    values = [v for panel in panels for run in runs for series in series_of(run, panel).values() for v in series.values]
    lowest, highest = min(values), max(values)
    metric = panels[0].metric
    if metric == "grad_norm" and 0 < lowest * LOG_SCALE_FROM < highest:
        axes.set_yscale("log")
        return
    start = 1.0 if metric == "expected_tokens" else 0.0
    if lowest >= start:
        room = HEADROOM * (highest - start) or HEADROOM
        axes.set_ylim(start - 0.2 * room, highest + room)  # a curve along the start is still seen


def line_style(part: str, number: int, num_runs: int, palette: Palette) -> tuple[str, dict[str, Any]]:
    """Return colour and style of a run's curve: by its part of one run, by the run of several."""
    color = palette.runs[(number if num_runs > 1 else part == VAL) % len(palette.runs)]
    if part == VAL:
        return color, {"linestyle": "-", "linewidth": 1.4, "marker": "o", "markersize": 3.5}
    return color, {"linestyle": "-", "linewidth": 0.9, "alpha": 0.65 if num_runs > 1 else 1.0}


def legend_handles(spec: FigureSpec, runs: Sequence[RunRecord], palette: Palette) -> list[Line2D]:
    """Return what the legend names: training and validation, where both are drawn, and several runs."""
    parts = [part for part in (TRAIN, VAL) if any(part in series_of(run, p) for run in runs for p in spec.panels)]
    names = {TRAIN: "training", VAL: "validation"}
    handles = []
    for part in parts:
        color, style = line_style(part, 0, len(runs), palette)
        shown = {**style, "color": palette.ink if len(runs) > 1 else color, "label": names[part]}
        handles.append(Line2D([], [], **shown))
    if len(runs) > 1:
        colors = [palette.runs[number % len(palette.runs)] for number in range(len(runs))]
        of_runs = [Line2D([], [], color=c, linewidth=2.5, label=run.label) for c, run in zip(colors, runs, strict=True)]
        return of_runs + (handles if len(parts) > 1 else [])
    return handles


def add_epochs(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Put epochs on the upper edge, where all runs have the same number of steps in one."""
    lengths = {run.steps_per_epoch for run in runs}
    (length, *others) = lengths
    if others or length is None:
        return
    upper = axes.secondary_xaxis(
        "top", functions=(lambda step: np.asarray(step) / length, lambda epoch: np.asarray(epoch) * length)
    )
    upper.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    upper.tick_params(labelsize=7, length=2)
    upper.set_xlabel("epoch", fontsize=7, labelpad=3)
