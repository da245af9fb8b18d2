"""A rank that hangs, for real: a process that stands still, and a file that never gives its bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.errors import ClusterError
from eagle3_ray.jobs.train import run
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, ThreadedRun, assert_same_run, make_settings, wait_for_train_workers

pytestmark = pytest.mark.usefixtures("ray_cluster")
HANG_TIMEOUT_S = 15.0  # more than a step takes, its imports included, on a machine with other work


def settings_of(folder: Path, **changes: Any) -> TrainSettings:
    return make_settings(folder, num_workers=2, checkpoint_every_steps=1, hang_timeout_s=HANG_TIMEOUT_S, **changes)


def make_folder(folder: Path) -> Path:
    write_samples(folder / "data", LENGTHS, **SHAPE)
    return folder


def train_past_first_checkpoint(settings: TrainSettings) -> ThreadedRun:
    """A run that goes on after its first checkpoint."""
    training = ThreadedRun(settings)
    training.wait_for((settings.save_path / "step-000001" / "COMMITTED").exists, "a checkpoint")
    return training


def test_a_worker_that_stands_still_is_named_and_the_workers_start_again_from_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm, hung = make_folder(tmp_path / "calm"), make_folder(tmp_path / "hung")
    run(settings_of(calm))
    training = train_past_first_checkpoint(settings_of(hung, max_failures=1))
    os.kill(wait_for_train_workers()[0], signal.SIGSTOP)
    assert training.join() == []
    assert_same_run(hung, calm, tmp_path)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "no progress" in line]
    assert "its process has gone silent; the workers are ended" in told and told.startswith("rank ")


def test_a_read_that_never_ends_is_named_with_its_files_and_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path)
    training = train_past_first_checkpoint(settings_of(folder, epochs=100))
    for path in (folder / "data").glob("*.pt"):
        pipe = folder / path.name
        os.mkfifo(pipe)  # whoever opens it to read waits for a writer
        pipe.rename(path)
    (error,) = training.join()
    assert isinstance(error, ClusterError) and "a worker was lost" in str(error) and error.exit_code == 5
    told = [line for line in capsys.readouterr().out.splitlines() if "no progress" in line]
    assert told and all("it waits for its bins (data_" in line for line in told)
