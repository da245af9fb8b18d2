"""A run folder is read as it was written; what is amiss with it is told, and what was cut short is left out."""

import json
from pathlib import Path, PurePosixPath

import pytest

from eagle3_ray.errors import CheckpointError, DataError
from eagle3_ray.report.figures import MAX_POINTS, choose_figures, thin
from eagle3_ray.report.reading import Series, read_runs, short_names
from eagle3_ray.training.plan_file import read_plan
from tests.unit.report.folders import PLAN_RECORD, make_run


def test_series_are_those_logged_and_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    assert run.series("train/lr") == Series([*range(1, 9)], [0.001 / step for step in range(1, 9)])
    assert run.series("train/grad_norm").steps == [1, 2, 4, 5, 6, 7, 8]
    assert run.series("val/expected_tokens") == Series([0, 4, 8], [1.0, 1.96, 1.92])
    assert run.series("val/lr") == Series([], [])
    assert run.num_ttt_steps == 2 and run.steps_per_epoch == 4 and list(run.notes) == []
    assert run.best is not None and run.best.path.name == "0" and run.untrained["val/expected_tokens"] == 1.0
    assert run.settings["lr"] == 0.001


def test_the_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_plan(make_run(tmp_path / "run") / "plan.json") == PLAN_RECORD
    assert read_plan(tmp_path / "absent.json") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"training": 1}'])
def test_a_damaged_plan_is_told(tmp_path: Path, text: str) -> None:
    (make_run(tmp_path / "run") / "plan.json").write_text(text)
    with pytest.raises(DataError, match=r"run/plan\.json: cannot be read .*Move it away"):
        read_runs([tmp_path / "run"])


def test_a_run_without_plan_settings_and_checkpoints_is_read_and_it_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("plan.json", "run.yaml", "0/COMMITTED", "1/COMMITTED"):
        (folder / name).unlink()
    (run,) = read_runs([folder])
    assert (run.plan, run.best, run.settings, run.steps_per_epoch) == (None, None, {}, None)
    assert list(run.notes) == ["There is no plan.json: nothing is known of packing, machine and epochs."]


def test_a_last_line_cut_short_is_left_out_and_it_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-10])
    (run,) = read_runs([folder])
    assert run.series("val/loss").steps == [0, 4]
    assert list(run.notes) == ["The last line of metrics.jsonl was cut short, as by a kill, and is left out."]


def test_what_cannot_be_used_is_told_of_all_runs_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    silent = make_run(tmp_path / "silent")
    (silent / "metrics.jsonl").unlink()
    damaged = make_run(tmp_path / "damaged")
    lines = (damaged / "metrics.jsonl").read_text().splitlines(keepends=True)
    (damaged / "metrics.jsonl").write_text("".join([lines[0], "{oops}\n", *lines[1:]]))
    with pytest.raises(DataError) as caught:
        read_runs([tmp_path / name for name in ("absent", "file", "empty", "silent", "damaged")])
    told = str(caught.value).split("\n")
    assert told[0] == f"{tmp_path}/absent: is not there; expected a run folder, which --save-path of train names."
    assert told[1] == f"{tmp_path}/file: is a file; expected a run folder, which --save-path of train names."
    nothing = "it holds neither run.yaml nor a checkpoint nor metrics.jsonl."
    assert told[2] == f"{tmp_path}/empty: is no run folder: {nothing}"
    assert told[3].startswith(f"{silent}: metrics.jsonl holds no logged point: the run has not logged one yet")
    assert told[4].startswith(f"{damaged}/metrics.jsonl: line 2 cannot be read (") and "Take the line out" in told[4]
    assert len(told) == 5 and caught.value.exit_code == 3


def test_damaged_settings_and_checkpoints_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "run.yaml").write_text("- lr")
    with pytest.raises(DataError, match=r"^\S+/run/run\.yaml: expected lines of the form"):
        read_runs([folder])
    (folder / "1" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run/1: committed, but model\.safetensors is gone"):
        read_runs([folder])


def test_evaluations_are_read_where_they_can_be(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "0" / "evaluation.json").write_text(json.dumps({"speedup": 1.5}))
    (folder / "1" / "evaluation.json").write_text("{")
    (run,) = read_runs([folder])
    assert run.evaluations == {"0": {"speedup": 1.5}}
    (note,) = run.notes
    assert note.startswith("1/evaluation.json cannot be read (") and note.endswith("and is left out.")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/run"], ["run"]),
        (["/a/run", "/a/other"], ["run", "other"]),
        (["/a/run", "/b/run", "/b/other"], ["a/run", "b/run", "b/other"]),
        (["/a/x/run", "/b/x/run"], ["a/x/run", "b/x/run"]),
        (["/run", "/run/run"], ["run", "run/run"]),
        (["/x/run", "/x/run/run"], ["x/run", "run/run"]),
    ],
)
def test_names_are_as_short_as_tells_runs_apart(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(PurePosixPath(path)) for path in paths]) == names


def test_many_points_become_the_means_of_neighbours() -> None:
    few = Series([*range(MAX_POINTS)], [1.0] * MAX_POINTS)
    assert thin(few) == few
    many = Series([*range(1, 11)], [float(value) for value in range(1, 11)])
    assert thin(many, max_points=4) == Series([3, 6, 9, 10], [2.0, 5.0, 8.0, 10.0])


def test_figures_are_those_that_something_was_logged_for(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    figures = {spec.name: [panel.metric for panel in spec.panels] for spec in choose_figures([run])}
    assert list(figures) == ["tokens", "loss", "acceptance", "accuracy", "optimizer", "speed"]
    assert figures["loss"] == ["loss", "loss_0", "loss_1"] and figures["acceptance"] == ["cond_acc_0", "cond_acc_1"]
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "time_s": 1, "metrics": {"val/loss": 1.5}}\n')
    assert [spec.name for spec in choose_figures(read_runs([tmp_path / "run"]))] == ["loss"]
