"""SIGTERM and Ctrl-C: the run saves, says how to go on, and going on leaves no seam."""

import signal
import time
from pathlib import Path

import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.jobs.train import run
from eagle3_ray.verbs import GenerateSettings
from tests.makers import write_samples
from tests.runs import SHAPE, Command, assert_same_run, make_settings, read_metrics
from tests.unit.generation.world import MAX_SEQ_LEN, World

MANY_STEPS = {"bins_per_step": 1, "epochs": 1}  # one long epoch: a signal lands in its middle
NUM_EPOCHS = 5  # a checkpoint is told of while the next epoch runs, and maybe the one after it
MANY_EPOCHS = {"bins_per_step": 1, "epochs": NUM_EPOCHS, "train_frac": 0.01}  # a step an epoch, then a long validation

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples for a hundred bins to train on."""
    return write_samples(tmp_path_factory.mktemp("stop") / "data", [100] * 120, **SHAPE).parent


def test_a_run_that_is_stopped_in_mid_epoch_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    def settings(folder: Path) -> TrainSettings:
        return make_settings(folder, data_path=data / "data", **MANY_STEPS)

    (tmp_path / "straight").mkdir()
    run(settings(tmp_path / "straight"))
    stopped_at: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        command = Command("train", settings(tmp_path), tmp_path)
        first = command.wait_for("progress")
        assert first["step"] > (stopped_at[-1] if stopped_at else 0)  # nothing is done twice, nothing is skipped
        last = command.stop(number)
        step = command.wait_for("checkpoint")["step"]
        folder = tmp_path / "run" / f"step-{step:06d}"
        assert last["message"] == (
            f"stopped by {number.name} at step {step}; saved {folder}; the same command goes on from there"
        )
        assert (folder / "COMMITTED").exists() and not (tmp_path / "run" / "0").exists()
        assert not any(name.startswith("val/") for name in read_metrics(folder))  # quick: without validation
        stopped_at.append(step)
    run(settings(tmp_path))
    assert_same_run(tmp_path, tmp_path / "straight", tmp_path, "0")


def test_an_epoch_stopped_before_its_validation_is_validated_when_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    def settings(folder: Path) -> TrainSettings:
        return make_settings(folder, data_path=data / "data", **MANY_EPOCHS)

    (tmp_path / "straight").mkdir()
    run(settings(tmp_path / "straight"))
    command = Command("train", settings(tmp_path), tmp_path)
    command.wait_for("checkpoint")  # of the first epoch
    command.stop(signal.SIGTERM)
    (stopped,) = (tmp_path / "run").glob("step-*")
    epoch = int(stopped.name.removeprefix("step-")) - 1
    assert not (tmp_path / "run" / str(epoch)).exists()
    run(settings(tmp_path))
    for name in map(str, range(NUM_EPOCHS)):
        assert_same_run(tmp_path, tmp_path / "straight", tmp_path, name)


def test_a_signal_before_the_first_step_ends_the_command_at_once(data: Path, tmp_path: Path) -> None:
    command = Command("train", make_settings(tmp_path, data_path=data / "data", **MANY_STEPS), tmp_path)
    command.wait_for("data")  # the workers are about to start
    last = command.stop(signal.SIGTERM)
    assert last["message"] == "stopped by SIGTERM; nothing was saved; the same command starts again"
    assert not list((tmp_path / "run").glob("*/COMMITTED"))


def test_generate_leaves_only_whole_samples_and_goes_on(tmp_path: Path) -> None:
    num_lines = 400
    world = World(tmp_path)
    world.conversations_path.write_text('{"text": "Hello there, how are you today?"}\n' * num_lines)
    settings = GenerateSettings(
        verifier_name_or_path=str(world.verifier_path),
        conversations_path=world.conversations_path,
        output_path=world.output_path,
        max_seq_len=MAX_SEQ_LEN,
        batch_tokens=MAX_SEQ_LEN,
        num_workers=1,
    )
    command = Command("generate", settings, tmp_path)
    assert command.wait_for("plan")["missing"] == num_lines
    deadline = time.monotonic() + 300
    while not world.times():
        assert time.monotonic() < deadline and command.process.poll() is None
        time.sleep(0.05)
    last = command.stop(signal.SIGTERM)
    assert last["message"] == (
        "stopped by SIGTERM; samples that are written stay, the same command generates the others"
    )
    written = world.times()
    assert 0 < len(written) < num_lines
    for name in written:
        world.read(int(name.removeprefix("data_").removesuffix(".pt")))
    world.run(batch_tokens=20 * MAX_SEQ_LEN)
    assert len(world.times()) == num_lines and written.items() <= world.times().items()  # none was written twice
