"""The README's pictures, made from the committed results alone: `make plots`.

    python -m tests.benchmarks.plots [--output FOLDER]

For each entry of `PLOTS`, `<name>-light.svg` and `<name>-dark.svg`, without background, for a light and a dark page.
The same results give the same bytes. A new plot is a function that draws its rows into a figure, and an entry.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

RESULTS = Path(__file__).with_name("results")
BAR_WIDTH = 0.38
TIMES = "\N{MULTIPLICATION SIGN}"

Row = dict[str, Any]


class Theme(NamedTuple):
    """Colours of a picture: text and axes, grid, what is ours, what it is compared with."""

    ink: str
    grid: str
    own: str
    peer: str


THEMES = {
    "light": Theme("#24292f", "#d8dee4", "#2a78d6", "#9aa3ad"),
    "dark": Theme("#e6edf3", "#30363d", "#4493f8", "#6e7681"),
}


class Plot(NamedTuple):
    """A picture of a file in `results/`.

    Fields: the file, the title, the settings measured (with the names of a row's values in braces), what draws it.
    """

    source: str
    title: str
    shape: str
    draw: Callable[[Figure, list[Row], Theme], None]


# ------------------------------------------------------------------------------------------ the plots


def draw_step(figure: Figure, rows: list[Row], theme: Theme) -> None:
    """Speed and memory of each configuration, beside the peer's; over our bars the ratio."""
    names = [f"{row['steps']} TTT steps\n{row['dtype']}" for row in rows]
    speed, memory = figure.subplots(1, 2)
    panels = [
        (speed, "tokens_per_s", "times_peer_tokens_per_s", "tokens/s (more is better)"),
        (memory, "memory_above_weights_gib", "times_peer_memory", "GiB above weights (less is better)"),
    ]
    for axes, key, ratio_key, label in panels:
        numbers = range(len(rows))
        own = axes.bar([n - BAR_WIDTH / 2 for n in numbers], [row[key] for row in rows], BAR_WIDTH, color=theme.own)
        peer_values = [row[f"peer_{key}"] for row in rows]
        peer = axes.bar([n + BAR_WIDTH / 2 for n in numbers], peer_values, BAR_WIDTH, color=theme.peer)
        axes.bar_label(own, [f"{row[ratio_key]}{TIMES}" for row in rows], padding=2, fontweight="bold")
        axes.set_xticks(numbers, names)
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        own.set_label("eagle3_ray")
        peer.set_label(rows[0]["peer"])
    figure.legend(handles=[own, peer], loc="outside upper right", ncols=2)


def draw_data(figure: Figure, rows: list[Row], theme: Theme) -> None:
    """Bytes that each way brings to a rank, a second of the CPU and a second of the clock."""
    row = rows[-1]
    ways = {"peer": "DataLoader", "task": "--pack-in task", "worker": "--pack-in worker"}
    colors = [theme.peer, theme.own, theme.own]
    panels = zip(figure.subplots(1, 2, sharey=True), ("bytes_per_cpu_s", "bytes_per_s"), strict=True)
    for (axes, key), unit in zip(panels, ("GB per CPU-second", "GB per second"), strict=True):
        values = [row[f"{way}_{key}"] / 1e9 for way in ways]
        label_bars(axes, axes.barh(list(ways.values()), values, 0.6, color=colors), values)
        axes.set_xlabel(f"{unit} (more is better)")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")


def label_bars(axes: Axes, bars: BarContainer, values: list[float]) -> None:
    """Write each bar's value, and how many times the first's it is."""
    first, *others = values
    times = [f"{value:.2f} ({value / first:.1f}{TIMES})" for value in others]
    axes.bar_label(bars, [f"{first:.2f}", *times], padding=3)
    axes.margins(x=0.32)


DRAFT = "hidden {hidden}, draft vocabulary {draft_vocab}, "
PLOTS = {
    "step": Plot(
        "step-cpu.jsonl", "Training step", DRAFT + "{tokens} tokens in {documents} half-supervised documents", draw_step
    ),
    "data": Plot(
        "data-cpu.jsonl",
        "Data path, from files to a rank",
        "hidden {hidden}, bins of {total_seq_len} tokens",
        draw_data,
    ),
}

# -------------------------------------------------------------------------------------- what all share


def read_rows(path: Path) -> list[Row]:
    """Return a result file's JSON objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def caption(rows: list[Row], shape: str) -> str:
    """Say on what, with which releases, when and under which settings the rows were measured."""
    machine = [device.replace("cpu x", "CPU cores: ") for device in distinct(rows, "device")]
    versions = [f"{name} {value}" for name in ("torch", "ray") for value in distinct(rows, name)]
    return ", ".join([*machine, *versions, *distinct(rows, "date")]) + "\n" + shape.format(**rows[-1])


def distinct(rows: Iterable[Row], name: str) -> list[str]:
    """Return the values that rows have under a name, each once."""
    return list(dict.fromkeys(str(row[name]) for row in rows if name in row))


def settings(name: str, theme: Theme) -> mpl.RcParams:
    """Return matplotlib's settings of a picture."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    found = {
        **dict.fromkeys(inked, theme.ink),
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "svg.hashsalt": name,  # ids that are the same each time
    }
    return mpl.RcParams(found)


def draw(name: str, theme: Theme) -> Figure:
    """Return a plot as a figure, with title and caption."""
    plot = PLOTS[name]
    rows = read_rows(RESULTS / plot.source)
    figure = Figure(figsize=(8, 3.4), layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.04))
    figure.suptitle(plot.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.supxlabel(caption(rows, plot.shape), x=0.01, ha="left", fontsize=7.5)
    plot.draw(figure, rows, theme)
    return figure


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        for theme_name, theme in THEMES.items():
            path = arguments.output / f"{name}-{theme_name}.{arguments.format}"
            with mpl.rc_context(settings(path.stem, theme)):
                metadata = {"Date": None, "Creator": None} if arguments.format == "svg" else None
                draw(name, theme).savefig(path, transparent=True, metadata=metadata, dpi=110)


if __name__ == "__main__":
    main()
