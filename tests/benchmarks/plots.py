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
LETTER_S = 0.14  # width of a letter in a bar of seconds: a piece that its name does not fit into has none
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


def draw_tokens(figure: Figure, rows: list[Row], theme: Theme) -> None:
    """A token's time, and the memory of a step with the straight line through it, over the size of the bin."""
    row = rows[-1]
    tokens = [size["tokens"] for size in row["rows"]]
    time, memory = figure.subplots(1, 2)
    time.plot(tokens, [size["us_per_token"] for size in row["rows"]], "o-", color=theme.own)
    time.set_ylabel("microseconds per token")
    live_gib = [size["live_memory_above_weights_mib"] / 2**10 for size in row["rows"]]
    slope_gib = row["bytes_per_token"] / 2**30
    start_gib = sum(live_gib) / len(tokens) - slope_gib * sum(tokens) / len(tokens)  # the line meets the mean
    line = [start_gib + slope_gib * size for size in tokens]
    memory.plot(tokens, line, color=theme.peer, label=f"{row['bytes_per_token'] / 2**10:.0f} KiB per token")
    memory.plot(tokens, live_gib, "o", color=theme.own, label="live tensors")
    peak_gib = [size["memory_above_weights_mib"] / 2**10 for size in row["rows"]]
    memory.plot(tokens, peak_gib, "_", color=theme.ink, label="peak of the process")
    memory.legend(loc="upper left")
    memory.set_ylabel("GiB above weights")
    for axes in (time, memory):
        axes.set_ylim(0, 1.15 * axes.dataLim.ymax)
        axes.set_xlim(left=0)
        axes.set_xticks(tokens, [f"{size / 1024:g}k" for size in tokens])
        axes.set_xlabel("tokens in the bin")


def draw_startup(figure: Figure, rows: list[Row], theme: Theme) -> None:
    """Where the time until the first step goes: a bar a number of workers, a piece a part."""
    axes = figure.subplots()
    names = [f"{row['workers']} worker{'s' * (row['workers'] > 1)}" for row in rows]
    for number, row in enumerate(rows):
        start_s = 0.0
        for turn, (part, seconds) in enumerate(row["parts_s"].items()):
            shade = (1.0, 0.7)[turn % 2]
            axes.barh(number, seconds, 0.55, left=start_s, color=theme.own, alpha=shade)
            if seconds >= LETTER_S * len(part):
                middle_s = start_s + seconds / 2
                axes.text(
                    middle_s, number, f"{part}\n{seconds:.1f}", ha="center", va="center", color="white", fontsize=7
                )
            start_s += seconds
        axes.text(start_s + 0.15, number, f"{row['after_s']:.1f} s", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds from the command to its first step (less is better)")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def draw_workers(figure: Figure, rows: list[Row], theme: Theme) -> None:
    """Rates of one worker, of two in one run, and of two that have nothing to do with one another."""
    row = rows[-1]
    ways = {"alone": "1 worker", "together": "2 workers", "apart": "2 runs of 1 worker"}
    axes = figure.subplots()
    values = [row[way] for way in ways]
    bars = axes.barh(list(ways.values()), values, 0.55, color=[theme.own, theme.own, theme.peer])
    axes.bar_label(bars, [f"{value:,.0f} ({value / values[0]:.2f}{TIMES})" for value in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("tokens/s (more is better)")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


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
    "tokens": Plot(
        "tokens-cpu.jsonl",
        "Training step over the size of the bin",
        DRAFT + "{dtype}, {steps} TTT steps, half-supervised documents of {document} tokens",
        draw_tokens,
    ),
    "workers": Plot(
        "workers-cpu.jsonl",
        "Training over workers",
        DRAFT + "bins of {tokens} tokens, one a worker and step; one thread a worker",
        draw_workers,
    ),
    "startup": Plot(
        "startup-cpu.jsonl", "Start", "data of the demo's size, a new Ray, nothing indexed before", draw_startup
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
