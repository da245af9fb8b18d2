"""Checks are told one by one, and end in the exit code of the first problem."""

import json

import pytest

from eagle3_ray.console import use_log_format
from eagle3_ray.errors import CheckpointError, DataError, Eagle3RayError
from eagle3_ray.jobs.findings import Report, Seen


def refuse(error: Eagle3RayError) -> Seen[None]:
    raise error


def test_each_check_is_a_line_and_the_advice_makes_it_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.check("first", lambda: Seen(None, "found"))
    report.check("second", lambda: Seen(None, "found", "Do it.", details=["more"]))
    report.finish()
    assert capsys.readouterr().out.split("\n") == [
        "ok       first         found",
        "warning  second        found. Do it.",
        "                       more",
        "2 checks: 1 ok, 1 warning",
        "",
    ]


def test_a_problem_skips_what_needs_it_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    data = report.check("data", lambda: refuse(DataError("no samples\n  at all")))
    steps = report.check("steps", lambda: Seen(data.value, "never"), [data])
    report.check("disk", lambda: Seen(steps.value, "never"), [steps])
    report.check("run folder", lambda: refuse(CheckpointError("damaged")))
    report.check("workers", lambda: Seen(None, "two"))
    with pytest.raises(DataError, match=r"5 checks: 2 problem, 2 skipped, 1 ok\. Mend .*: data, run folder\."):
        report.finish()
    assert capsys.readouterr().out.split("\n") == [
        "problem  data          no samples",
        "                       at all",
        "skipped  steps         needs data, see above",
        "skipped  disk          needs steps, see above",
        "problem  run folder    damaged",
        "ok       workers       two",
        "",
    ]


def test_in_json_a_check_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    use_log_format("json")
    try:
        report = Report()
        data = report.check("data", lambda: refuse(DataError("no samples\n  at all")))
        report.check("steps", lambda: Seen(data.value, "never"), [data])
        report.check("disk", lambda: Seen(None, "little", "Make room.", fields={"free_bytes": 3}))
    finally:
        use_log_format("text")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line["level"], line["check"], line["result"]) for line in lines] == [
        ("check", "error", "data", "problem"),
        ("check", "info", "steps", "skipped"),
        ("check", "warning", "disk", "warning"),
    ]
    assert lines[0]["message"] == "no samples\nat all" and lines[0]["exit_code"] == 3
    assert lines[2]["message"] == "little. Make room." and lines[2]["advice"] == "Make room."
    assert lines[2]["free_bytes"] == 3


def test_words_are_coloured_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Report().check("first", lambda: Seen(None, "found"))
    assert capsys.readouterr().out == "\033[32mok     \033[0m  first         found\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Report().check("first", lambda: Seen(None, "found"))
    assert capsys.readouterr().out == "ok       first         found\n"
