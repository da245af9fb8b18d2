"""What a command tells: text as it always was, or an object a line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from eagle3_ray.cli import main
from eagle3_ray.console import complain, say, use_log_format, warn

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def text_again() -> Iterator[None]:
    yield
    use_log_format("text")


def test_text_goes_to_stdout_and_what_ends_the_command_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo", "data", samples=3)
    warn("little memory")
    complain("error: no samples", exit_code=3)
    assert capsys.readouterr() == ("one\ntwo\nwarning: little memory\n", "error: no samples\n")


def test_json_is_an_object_a_line_on_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    use_log_format("json")
    before = datetime.now(UTC).replace(microsecond=0)
    say('one\n"two"', "data", samples=3)
    warn("little memory")
    complain("error: no samples", exit_code=3)
    stdout, stderr = capsys.readouterr()
    lines = [json.loads(line) for line in stdout.splitlines()]
    for line in lines:
        time = line.pop("time")
        assert time.endswith("Z") and before <= datetime.fromisoformat(time) <= datetime.now(UTC)
    assert lines == [
        {"level": "info", "event": "data", "message": 'one\n"two"', "samples": 3},
        {"level": "warning", "event": "warning", "message": "little memory"},
        {"level": "error", "event": "error", "message": "error: no samples", "exit_code": 3},
    ]
    assert stderr == ""


@pytest.mark.parametrize("flags", [["--log-format", "json"], ["--log-format=json"]])
def test_errors_of_settings_are_told_in_json_too(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "0", *flags]) == 2
    line = json.loads(capsys.readouterr().out)
    assert line["level"] == "error" and line["error"] == "UsageError" and line["exit_code"] == 2
    assert "--epochs 0: must be at least 1" in line["message"]
    assert main(["train", "--epochs", "0"]) == 2  # the next command speaks text again
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bug_is_told_in_json_with_its_traceback() -> None:
    script = "from eagle3_ray.console import use_log_format\nuse_log_format('json')\n1 / 0"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = json.loads(ended.stdout)
    assert (line["event"], line["message"]) == ("bug", "ZeroDivisionError: division by zero")
    assert "Traceback" in line["traceback"] and (ended.returncode, ended.stderr) == (1, "")
