"""What the world does to a run without breaking anything: clocks, the order of files, keys in the environment."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from eagle3_ray.jobs.train import run
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, Command, assert_same_run, make_settings

pytestmark = pytest.mark.usefixtures("ray_cluster")
KEY = "0123456789abcdef0123456789abcdef01234567"  # as long as one of W&B's


def test_other_times_and_another_order_of_the_files_change_nothing(tmp_path: Path) -> None:
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    write_samples(calm / "data", LENGTHS, **SHAPE)
    run(make_settings(calm))
    shutil.copytree(calm / "data", moved / "data")
    run(make_settings(moved, max_steps=4))
    # As from another machine: copied the other way round, last changed in times to come, or long ago.
    (moved / "data").rename(moved / "old")
    (moved / "data").mkdir()
    for number, path in enumerate(sorted((moved / "old").glob("*.pt"), reverse=True)):
        shutil.copy(path, moved / "data" / path.name)
        seconds = time.time() + 86400 if number % 2 else 1.0
        os.utime(moved / "data" / path.name, (seconds, seconds))
    run(make_settings(moved))
    assert_same_run(moved, calm, tmp_path)


def test_a_key_in_the_environment_is_nowhere_on_disk_and_nowhere_in_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY[::-1])
    write_samples(tmp_path / "data", LENGTHS, **SHAPE)
    command = Command("train", make_settings(tmp_path, logger="tensorboard,wandb,trackio", epochs=200), tmp_path)
    command.wait_for("checkpoint")
    command.stop(signal.SIGTERM)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = [path for path in files if any(key.encode() in path.read_bytes() for key in (KEY, KEY[::-1]))]
    assert found == [] and any("wandb" in str(path) for path in files)
    assert not any(key in str(command.events) for key in (KEY, KEY[::-1]))
