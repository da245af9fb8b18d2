"""What the benchmarks do beside measuring: no test here looks at a time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import plots
from tests.benchmarks.__main__ import file_name, table
from tests.benchmarks.tokens import fit_memory

ROOT = Path(__file__).parents[1]


def run_benchmark(module: str, *words: str) -> str:
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *words]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # more of them wait for one another where others run too
    return subprocess.run(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, check=True, text=True).stdout


def test_every_plot_is_made_from_the_committed_results_and_is_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        run_benchmark("plots", "--output", str(tmp_path / folder))
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {f"{name}-{theme}.svg" for name in plots.PLOTS for theme in ("light", "dark")}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_readme_shows_every_plot_for_light_and_dark_pages() -> None:
    shown = set(re.findall(r'(?:src|srcset)="([^"]+\.svg)"', (ROOT / "README.md").read_text(encoding="utf-8")))
    results = plots.RESULTS.relative_to(ROOT).as_posix()
    assert shown == {f"{results}/{name}-{theme}.svg" for name in plots.PLOTS for theme in plots.THEMES}
    assert [path for path in shown if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_caption_names_machine_release_and_date_of_every_row(name: str) -> None:
    plot = plots.PLOTS[name]
    rows = plots.read_rows(plots.RESULTS / plot.source)
    text = plots.caption(rows, plot.shape)
    for row in rows:
        assert f"torch {row['torch']}" in text and row["date"] in text
    assert text.startswith("CPU cores: 2, ")


def test_the_table_has_a_line_for_each_figure_that_was_measured() -> None:
    lines = table({"one": {"tokens_per_s": 5.5, "other": 1}, "two": {"plan_s": 0.7, "tokens_per_s": 2}}).splitlines()
    assert [line.split() for line in lines] == [
        ["benchmark", "figure", "value"],
        ["one", "tokens_per_s", "5.5"],
        ["two", "tokens_per_s", "2"],
        ["two", "plan_s", "0.7"],
    ]


def test_results_are_named_for_benchmark_and_device() -> None:
    assert file_name({"benchmark": "step", "device": "cpu x2"}) == "step-cpu.jsonl"
    assert file_name({"benchmark": "step", "device": "NVIDIA H100"}) == "step-nvidia-h100.jsonl"


def test_the_line_of_memory_is_the_one_through_its_points() -> None:
    rows = [{"tokens": n, "live_memory_above_weights_mib": 3.0 + n * 2 / 1024} for n in (1024, 2048, 8192)]
    assert fit_memory(rows) == {"bytes_per_token": 2048, "memory_off_line_frac": 0.0}
    rows[1]["live_memory_above_weights_mib"] *= 2
    assert fit_memory(rows)["memory_off_line_frac"] > 0.1


@pytest.mark.slow
def test_the_tokens_benchmark_runs() -> None:
    shape = {"hidden": 64, "intermediate": 64, "vocab": 200, "draft-vocab": 100, "document": 32, "turns": 1}
    flags = [f"--{name}={value}" for name, value in shape.items()]
    result = json.loads(run_benchmark("tokens", *flags, "--device=cpu", "--sizes", "1024", "2048"))
    assert [row["tokens"] for row in result["rows"]] == [1024, 2048]
    assert all(value > 0 for row in result["rows"] for value in row.values())
    assert result["time_per_token_2k_over_1k"] > 0
    assert result["bytes_per_token"] > 0
