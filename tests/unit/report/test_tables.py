"""What the tables say, against numbers worked out by hand from the folders that `make_run` makes."""

import json
from dataclasses import replace
from pathlib import Path

from eagle3_ray.report import tables
from eagle3_ray.report.reading import RunRecord, read_runs
from eagle3_ray.report.tables import NOTHING, Table
from eagle3_ray.training.plan_file import write_plan
from tests.unit.report.folders import PLAN_RECORD, make_run


def rows_of(table: Table) -> dict[str, tuple[str, ...]]:
    return {row.name: row.cells for row in table.rows}


def two_runs(tmp_path: Path) -> list[RunRecord]:
    paths = [make_run(tmp_path / "one"), make_run(tmp_path / "two", scale=1.5, num_ttt_steps=3, lr=0.01, seed=3)]
    return read_runs(paths)


def test_the_headline_is_the_best_checkpoint(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    assert tables.headline(run) == (
        "run",
        "1.96",
        "expected tokens per verification: checkpoint 0 (step 4, epoch 1) is the best of 2; 1.00 before training",
    )
    said = tables.explain_tokens([run])
    assert "a greedy chain of 2 drafted tokens. The verifier's own token is counted: 1 is no gain." in said


def test_the_headline_of_a_run_without_checkpoint_or_validation(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    assert tables.headline(replace(run, checkpoints=())).text == "no checkpoint yet; last logged after step 8"
    unvalidated = [replace(checkpoint, metrics={}) for checkpoint in run.checkpoints]
    told = tables.headline(replace(run, checkpoints=unvalidated, plan=None))
    assert told[1:] == (NOTHING, "checkpoint 1 (step 8), the newest: nothing was validated")


def test_final_numbers_are_the_best_checkpoints_and_the_better_is_marked(tmp_path: Path) -> None:
    table = tables.final_numbers(two_runs(tmp_path))
    rows = rows_of(table)
    assert table.columns == ("one", "two")
    assert rows["expected tokens per verification"] == ("1.960", "2.940")
    assert rows["acceptance of drafted token 2"] == ("40.0%", "40.0%")
    assert rows["acceptance of drafted token 3"] == (NOTHING, "30.0%")
    assert rows["last training loss"] == ("0.5000", "0.7500")
    assert rows["tokens/s, median"] == ("450", "450") and rows["waiting for data, mean"] == ("25.00%", "25.00%")
    assert rows["peak memory of a worker"] == ("8.00 GiB", "8.00 GiB") and rows["updates left out"] == ("1", "1")
    assert rows["steps made"] == ("8 of 8", "8 of 8") and rows["first logged (UTC)"][0] == "2023-11-14 22:13:20"
    marked = {row.name: row.best for row in table.rows if row.best is not None}
    assert marked == {"expected tokens per verification": 1}  # ties, and losses of two kinds, are not


def test_settings_that_differ_are_listed_and_what_a_run_is_called_is_not(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    table = tables.differing_settings(runs)
    assert rows_of(table) == {"lr": ("0.001", "0.01"), "seed": ("none", "3")}
    assert "These runs differ in --seed: their numbers may not be" in tables.explain_tokens(runs)
    assert rows_of(tables.all_settings(runs))["loss"] == ("kl", "kl")
    assert rows_of(tables.all_settings(runs))["logger"] == ('""', '""')
    same = tables.differing_settings([runs[0], runs[0]])
    assert same.rows == () and same.note == "They differ in none."


def test_packing_is_told_with_what_was_dropped_of_both_parts(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    (first / "quarantine.jsonl").write_text("{}\n{}\n")
    (second / "plan.json").unlink()
    rows = rows_of(tables.data(read_runs([first, second])))
    assert rows["samples"] == ("100", NOTHING) and rows["tokens"] == ("10,000", NOTHING)
    assert rows["of them filled"] == ("87.5%", NOTHING)
    assert rows["samples without a supervised token, dropped"] == ("4", NOTHING)
    assert rows["samples longer than a bin, cut"] == ("6", NOTHING)
    assert rows["bad files left out"] == ("2", "0")
    write_plan(second / "plan.json", replace(PLAN_RECORD, validation=None))
    rows = rows_of(tables.data(read_runs([second])))
    assert rows["samples"] == ("90",) and rows["bins to validate on"] == ("0",)


def test_machines_and_versions_are_told(tmp_path: Path) -> None:
    rows = rows_of(tables.machines(read_runs([make_run(tmp_path / "run")])))
    assert rows["workers"] == ("2 with 3 CPUs and a GPU each",) and rows["GPUs of the cluster"] == ("2 H100",)
    assert rows["the driver's machine"] == ("16 CPUs (A Processor)",) and rows["its memory"] == ("64.0 GiB",)
    assert rows["torch"] == ("2.13.0",)


def test_every_checkpoint_is_listed(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    table = tables.checkpoints(run)
    assert table.columns == ("step", "loss", "accepted 1", "accepted 2", "tokens")
    assert rows_of(table) == {
        "0 (best)": ("4", f"{3 / 1.96:.4f}", "50.0%", "40.0%", "1.960"),
        "1": ("8", f"{3 / 1.92:.4f}", "50.0%", "40.0%", "1.920"),
    }


def test_of_an_evaluation_what_fits_a_cell_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    content = {
        "tokens_per_verification": 2.34567,
        "acceptance": [0.5, 0.25],
        "speedup": 1.5,
        "more": {"a": 1},
        "no": [],
    }
    (folder / "0" / "evaluation.json").write_text(json.dumps(content))
    (folder / "1" / "evaluation.json").write_text(json.dumps({"prompts": 80}))
    (run,) = read_runs([folder])
    table = tables.evaluations(run)
    assert table is not None and table.columns == ("checkpoint 0", "checkpoint 1")
    assert rows_of(table) == {
        "tokens_per_verification": ("2.346", NOTHING),
        "acceptance": ("0.5 0.25", NOTHING),
        "speedup": ("1.5", NOTHING),
        "prompts": (NOTHING, "80"),
    }
    assert tables.evaluations(replace(run, evaluations={})) is None
