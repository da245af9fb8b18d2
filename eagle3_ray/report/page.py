"""Headline, figures and tables -> one HTML page, which fetches nothing, runs nothing, and is light or dark as asked."""

from collections.abc import Iterable, Sequence
from html import escape

from eagle3_ray import __version__
from eagle3_ray.report import tables
from eagle3_ray.report.plots import Drawing
from eagle3_ray.report.reading import RunRecord
from eagle3_ray.report.tables import Headline, Table

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f8fa; --ink: #24292f; --soft: #57606a; --grid: #d8dee4;
  --run-0: #2a78d6; --run-1: #d9480f; --run-2: #2b8a3e; --run-3: #9c36b5; --run-4: #c2255c; --run-5: #0b7285;
  --run-6: #b8860b; --run-7: #5c677d; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9198a1;
  --grid: #30363d; --run-0: #4493f8; --run-1: #ff922b; --run-2: #51cf66; --run-3: #cc5de8; --run-4: #f06595;
  --run-5: #22b8cf; --run-6: #ffd43b; --run-7: #adb5bd; } }
body { margin: 0 auto; max-width: 1040px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h1, h2, td, th, summary, .text, li { overflow-wrap: anywhere; }
p, figcaption, .text, footer { color: var(--soft); margin: .3rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { flex: 1 1 260px; background: var(--card); border-left: 4px solid; border-radius: 6px; padding: .7rem 1rem; }
.card b { display: block; overflow-wrap: anywhere; } .number { font-size: 2.1rem; line-height: 1.25; font-weight: 650; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  min-width: 5.5rem; }
thead th { white-space: nowrap; }
tbody th { font-weight: 400; color: var(--soft); width: 40%; } td.best { font-weight: 700; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 700; }
footer { margin-top: 2.5rem; font-size: .85rem; }
@media print { figure, tr { break-inside: avoid; } }
"""
# Whatever a name of a run or a setting holds, nothing is fetched or run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build_page(runs: Sequence[RunRecord], drawings: Sequence[Drawing]) -> str:
    """Return the page of some runs."""
    title = f"Training of {', '.join(run.label for run in runs)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _cards([tables.headline(run) for run in runs]),
        f"<p>{escape(tables.explain_tokens(runs))}</p>",
        _notes(runs),
        *(_section(table) for table in _first_tables(runs)),
        *(_figure(drawing) for drawing in drawings),
        *(_section(table) for table in _last_tables(runs)),
        f"<details><summary>All settings</summary>{_table(tables.all_settings(runs))}</details>",
        f"<footer>Made by eagle3-ray {__version__} from {_paths(runs)}.</footer>",
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _first_tables(runs: Sequence[RunRecord]) -> Iterable[Table]:
    """Return what stands above the figures: what several runs differ in, and what they reached."""
    if len(runs) > 1:
        yield tables.differing_settings(runs)
    yield tables.final_numbers(runs)


def _last_tables(runs: Sequence[RunRecord]) -> Iterable[Table]:
    for run in runs:
        evaluations = tables.evaluations(run)
        if evaluations is not None:
            yield evaluations
        if run.checkpoints:
            yield tables.checkpoints(run)
    yield tables.data(runs)
    yield tables.machines(runs)


def _cards(headlines: Sequence[Headline]) -> str:
    cards = [
        f'<div class="card" style="border-color: var(--run-{number % 8})"><b>{escape(headline.label)}</b>'
        f'<div class="number">{escape(headline.number)}</div><div class="text">{escape(headline.text)}</div></div>'
        for number, headline in enumerate(headlines)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _notes(runs: Sequence[RunRecord]) -> str:
    items = [f"<li>{escape(run.label)}: {escape(note)}</li>" for run in runs for note in run.notes]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _figure(drawing: Drawing) -> str:
    title, caption = escape(drawing.spec.title), escape(drawing.spec.caption)
    return f"<h2>{title}</h2><figure><figcaption>{caption}</figcaption>{drawing.svg}</figure>"


def _section(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>{_table(table)}"


def _table(table: Table) -> str:
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    if not table.rows:
        return note
    columns = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for row in table.rows:
        marks = [' class="best"' if number == row.best else "" for number in range(len(row.cells))]
        cells = "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, row.cells, strict=True))
        rows.append(f"<tr><th>{escape(row.name)}</th>{cells}</tr>")
    head = f"<thead><tr><th></th>{columns}</tr></thead>"
    return f'{note}<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _paths(runs: Sequence[RunRecord]) -> str:
    return ", ".join(escape(str(run.path)) for run in runs)
