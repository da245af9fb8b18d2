"""A commit is a commit, whatever befalls the run folder: proved with the real command on real disks."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.cli import main
from eagle3_ray.errors import CheckpointError
from eagle3_ray.jobs.train import run
from eagle3_ray.training.ray_snapshot import mend_snapshot
from eagle3_ray.training.run_folder import LOCK, RAY_SNAPSHOT, find_committed
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, Command, ThreadedRun, assert_same_run, make_settings, read_metrics

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


# ------------------------------------------------------------------------------ what stays

THREE_EPOCHS: dict[str, Any] = {"epochs": 3, "checkpoint_every_steps": 1}


@pytest.fixture(scope="module")
def everything(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that keeps the checkpoint of each of its nine steps."""
    folder = tmp_path_factory.mktemp("everything")
    run(make_settings(folder, data_path=straight / "data", **THREE_EPOCHS))
    return folder


def test_with_keep_last_a_run_and_its_resumption_end_the_same_with_the_newest_and_the_best(
    straight: Path, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = max(("0", "1", "2"), key=lambda name: read_metrics(everything / "run" / name)["val/expected_tokens"])
    settings = make_settings(tmp_path, data_path=straight / "data", keep_last=2, **THREE_EPOCHS)
    run(settings.model_copy(update={"max_steps": 7}))
    assert names(tmp_path / "run")[-2:] == ["1", "step-000007"] and len(names(tmp_path / "run")) <= 3
    assert (tmp_path / "run" / "best" / "COMMITTED").exists()
    run(settings)
    kept = ["step-000008", "2"]
    assert names(tmp_path / "run") == (kept if best == "2" else [best, *kept])
    assert os.readlink(tmp_path / "run" / "best") == best
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and not path.is_symlink()}
    assert folders == {best, *kept}
    assert_same_run(tmp_path, everything, tmp_path, "2")
    output = capsys.readouterr().out
    assert not [word for word in ("damaged", "gone", "half-written", "warning") if word in output], output
    # Ray's own list is of what is there, once a run has started from it.
    run(settings.model_copy(update={"epochs": 3, "max_steps": None}))
    assert mend_snapshot(tmp_path / "run") is None
    listed = json.loads((tmp_path / "run" / RAY_SNAPSHOT).read_text())["checkpoint_results"]
    assert {result["checkpoint_dir_name"] for result in listed} <= folders


def test_without_keep_best_only_the_newest_stays_and_is_best(straight: Path, tmp_path: Path) -> None:
    run(make_settings(tmp_path, data_path=straight / "data", keep_last=1, keep_best=False, checkpoint_every_steps=1))
    assert names(tmp_path / "run") == ["1"] and os.readlink(tmp_path / "run" / "best") == "1"
    assert_same_run(tmp_path, straight, tmp_path)


# ------------------------------------------------------------------------------ a disk that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that makes the run folder a disk of so many bytes."""
    claim = tmp_path / "run"

    def mount(num_bytes: int) -> Path:
        claim.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(claim)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
        return claim

    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    yield mount
    if claim.is_mount():
        subprocess.run(["umount", str(claim)], check=True)


MISSING = r"{}: a checkpoint takes \d+\.\d MiB, the disk has room for \d+\.\d MiB: \d+\.\d MiB are missing\. Make room"


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_a_worker_starts(
    straight: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    save_dir = disk(2**20)
    for changes in ({}, {"resume_from_checkpoint": False}):
        with pytest.raises(CheckpointError, match=MISSING.format(re.escape(str(save_dir)))) as caught:
            run(make_settings(tmp_path, data_path=straight / "data", **changes))
        assert caught.value.exit_code == 4
        assert [path.name for path in save_dir.iterdir()] == [LOCK]


def test_a_run_that_fills_its_disk_up_ends_before_the_save_that_finds_no_room_and_goes_on_once_there_is(
    straight: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    save_dir = disk(5 * 2**20)  # a checkpoint takes 1.1 MiB, and with what may be around it 2.2
    settings = make_settings(tmp_path, data_path=straight / "data", checkpoint_every_steps=1)
    for _ in range(2):  # by the save, then by the command that is typed again
        with pytest.raises(CheckpointError, match=MISSING.format(re.escape(str(save_dir)))):
            run(settings)
        assert names(save_dir) == ["step-000001", "step-000002", "0"] and not (save_dir / "step-000004").exists()
    for name in ("step-000001", "step-000002"):
        shutil.rmtree(save_dir / name)
    run(settings.model_copy(update={"keep_last": 1}))
    assert names(save_dir)[-1] == "1" and len(names(save_dir)) <= 2
    assert_same_run(tmp_path, straight, tmp_path)


def test_a_disk_that_is_full_in_the_middle_of_a_save_ends_the_run_and_leaves_the_checkpoint_before(
    straight: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """A pipe in the place of config.json holds the second save up between its state, which fits, and its weights."""
    save_dir = disk(8 * 2**20)
    settings = make_settings(tmp_path, data_path=straight / "data")
    pipe = save_dir / "1" / "config.json"
    pipe.parent.mkdir()
    os.mkfifo(pipe)  # whoever opens it to write waits for a reader
    training = ThreadedRun(settings)
    training.wait_for((pipe.parent / "state" / ".metadata").exists, "a save that is held up")
    assert not training.is_over(), training.failures
    fill(save_dir / "filler")
    pipe.read_text()  # and so the save goes on
    (error,) = training.join()
    assert isinstance(error, CheckpointError) and error.exit_code == 4
    assert re.match(MISSING.format(re.escape(str(save_dir))), str(error)), str(error)
    assert names(save_dir) == ["0"] and not (save_dir / "1").exists()
    (save_dir / "filler").unlink()
    run(settings)
    assert_same_run(tmp_path, straight, tmp_path)


def fill(path: Path) -> None:
    """Fill a disk up with one file."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# ------------------------------------------------------------------------------ Ray's own list


def cut_short(save_dir: Path) -> None:
    snapshot = save_dir / RAY_SNAPSHOT
    snapshot.write_bytes(snapshot.read_bytes()[:-20])


def delete(save_dir: Path) -> None:
    (save_dir / RAY_SNAPSHOT).unlink()


def delete_newest_folder(save_dir: Path) -> None:
    shutil.rmtree(save_dir / "step-000004")


def delete_older_folder(save_dir: Path) -> None:
    shutil.rmtree(save_dir / "step-000001")
    (save_dir / "step-000002" / "COMMITTED").unlink()  # as a removal that was killed leaves it
    shutil.rmtree(save_dir / "step-000002" / "state")


@pytest.fixture(scope="module")
def paused(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, paused after its fourth step, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("paused")
    run(make_settings(folder, data_path=straight / "data", checkpoint_every_steps=1, max_steps=4))
    return folder


@pytest.mark.parametrize(
    ("damage", "told", "newest"),
    [
        (cut_short, "Ray's list of checkpoints was damaged and is now {}/checkpoint_manager_snapshot.json.broken", 4),
        (delete_newest_folder, "Ray's list of checkpoints was damaged and is now {}/", 3),
        (delete, "Ray's list of checkpoints is gone from {}; the checkpoints themselves are used", 4),
        (delete_older_folder, "", 4),
    ],
)
def test_a_run_whose_list_ray_would_not_start_from_goes_on_from_what_is_on_disk_and_says_so(
    damage: Callable[[Path], None],
    told: str,
    newest: int,
    straight: Path,
    paused: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_dir = tmp_path / "run"
    shutil.copytree(paused / "run", save_dir, symlinks=True)
    damage(save_dir)
    settings, config = make_settings(tmp_path, data_path=straight / "data"), tmp_path / "train.yaml"
    config.write_text(json.dumps(settings.model_dump(mode="json", exclude={"config"})))
    assert main(["train", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.split("\n")
    about_the_list = [line for line in lines if "Ray's list" in line]
    assert [line.startswith(told.format(save_dir)) for line in about_the_list] == ([True] if told else []), lines
    assert any(line.startswith("going on from ") and f"(step {newest} of 6)" in line for line in lines), lines
    assert_same_run(tmp_path, straight, tmp_path)
