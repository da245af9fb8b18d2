"""What the README says about the project is so: metrics, files, messages, exit codes, commands."""

import re
import shlex
from pathlib import Path

from eagle3_ray import errors
from eagle3_ray.cli import read_settings
from eagle3_ray.metrics import metrics_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "eagle3_ray"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_metrics_table_is_made_from_the_one_table_of_metrics() -> None:
    assert README.split("<!-- metrics -->\n", 1)[1].split("<!-- /metrics -->", 1)[0] == metrics_table()


def test_every_file_of_the_reading_order_is_there() -> None:
    missing, found = [], 0
    for cell in re.findall(r"^\| \d+ \| (.+?) \|", section("Reading the code"), re.M):
        folder = PACKAGE
        for name in re.findall(r"`([^`]+)`", cell):
            path = next((p for p in (PACKAGE / name, folder / name, ROOT / name) if p.exists()), None)
            if path is None:
                missing.append(name)
            else:
                folder, found = path.parent, found + 1
    assert missing == [] and found > 20


def test_every_message_of_the_troubleshooting_table_is_one_the_program_prints() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that run over lines
    messages = [
        m
        for cell in re.findall(r"^\| (`.*?) \|", section("Troubleshooting"), re.M)
        for m in re.findall(r"`([^`]+)`", cell)
    ]
    # What varies is written as an ellipsis or a number.
    parts = [part.strip() for message in messages for part in re.split(r"…|\bv?\d+\b|nan", message) if part.strip()]
    assert len(messages) >= 8
    assert [part for part in parts if part not in code] == []


def test_the_exit_codes_are_the_errors_own() -> None:
    codes = {int(code): text for code, text in re.findall(r"(\d) ([a-z ]+)[,.]", README.split("Exit codes: ", 1)[1])}
    assert codes[2] == "usage" and errors.UsageError.exit_code == 2
    assert codes[3] == "data" and errors.DataError.exit_code == 3
    assert codes[4] == "checkpoint or export" and errors.CheckpointError.exit_code == errors.ExportError.exit_code == 4
    assert codes[5] == "cluster" and errors.ClusterError.exit_code == 5


def test_every_command_of_the_readme_is_understood() -> None:
    commands = [shlex.split(line) for line in re.findall(r"^eagle3-ray (.+)$", README, re.M)]
    assert {verb for verb, *_ in commands} >= {"train", "generate", "vocab-mapping", "export"}
    for verb, *arguments in commands:
        read_settings(verb, arguments)  # raises on a flag or value that does not exist


def test_every_test_of_the_table_of_faults_is_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", section("What survives what"))
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text("utf-8")]
    assert missing == [] and len(named) >= 9
