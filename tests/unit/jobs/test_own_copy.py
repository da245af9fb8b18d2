"""Every verb refuses, before it does anything else, to write into the copy of `ray job submit --working-dir`."""

from pathlib import Path

import pytest

from eagle3_ray.cli import main

COMMANDS = {
    "train": (["train", "--verifier-name-or-path", "v", "--save-path", "run"], "--save-path"),
    "train's logs": (
        ["train", "--verifier-name-or-path", "v", "--save-path", "/elsewhere", "--logger", "tensorboard"],
        "--log-dir",
    ),
    "generate": (
        ["generate", "--verifier-name-or-path", "v", "--conversations-path", "chats.jsonl", "--output-path", "out"],
        "--output-path",
    ),
    "vocab-mapping": (["vocab-mapping", "--target-vocab-size", "320"], "--output-path"),
    "demo": (["demo"], "--output-path"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_would_go_with_the_job_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flag = COMMANDS[name]
    own_copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    own_copy.mkdir(parents=True)
    monkeypatch.chdir(own_copy)
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} {own_copy}")
    assert list(own_copy.iterdir()) == []
