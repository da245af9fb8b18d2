"""A commit is a commit, whatever befalls the run folder: proved with the real command on real disks."""

import os
import signal
from pathlib import Path

import pytest

from eagle3_ray.jobs.train import run
from eagle3_ray.training.run_folder import find_committed
from tests.integration.test_stop import Command
from tests.integration.test_train import LENGTHS, SHAPE, make_settings
from tests.makers import write_samples

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples and an undisturbed run of two epochs, three steps each."""
    folder = tmp_path_factory.mktemp("straight")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    run(make_settings(folder))
    return folder


def names(save_dir: Path) -> list[str]:
    """The whole checkpoints, oldest first."""
    return [checkpoint.path.name for checkpoint in find_committed(save_dir)]


# ------------------------------------------------------------------------------ one run at a time


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_killed(straight: Path, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, data_path=straight / "data", epochs=2000, checkpoint_every_steps=1)
    first = Command("train", settings, tmp_path)
    try:
        first.wait_for("checkpoint")
        # Neither command may touch what the first one writes, not even to start over.
        for changes in ({}, {"resume_from_checkpoint": False}):
            second = Command("train", settings.model_copy(update=changes), tmp_path)
            told = second.wait_for("error")["message"]
            assert second.process.wait(60) == 4
            assert f"{tmp_path / 'run'}: another run writes there, process {first.process.pid} on host" in told
        assert first.process.poll() is None
    finally:
        os.killpg(first.process.pid, signal.SIGKILL)  # Ray's workers have groups of their own, and die a little later
        first.process.wait()
    saved = find_committed(tmp_path / "run")
    third = Command("train", settings, tmp_path)
    assert third.wait_for("resume")["step"] >= saved[-1].step > 0
    third.wait_for("progress")
    third.stop(signal.SIGTERM)


# ------------------------------------------------------------------------------ by the clock


@pytest.mark.parametrize(
    ("minutes", "log_every_steps", "expected"),
    [
        # Always due: the order travels with a step, and is known at once where each step is logged.
        (1e-9, 1, ["step-000001", "step-000002", "0", "step-000004", "step-000005", "1"]),
        # Else it is known a step later. Of the first step, the outcome is always learnt at once.
        (1e-9, 100, ["step-000001", "0", "step-000005", "1"]),
        (1e6, 1, ["0", "1"]),
    ],
)
def test_two_ranks_save_together_when_the_clock_of_the_first_says_so(
    minutes: float, log_every_steps: int, expected: list[str], straight: Path, tmp_path: Path
) -> None:
    settings = make_settings(
        tmp_path,
        data_path=straight / "data",
        num_workers=2,
        checkpoint_every_minutes=minutes,
        log_every_steps=log_every_steps,
    )
    run(settings)
    assert names(tmp_path / "run") == expected
