"""SIGTERM and Ctrl-C: the run saves, says how to go on, and going on leaves no seam."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.config import GenerateSettings, TrainSettings
from eagle3_ray.jobs.train import run
from tests.integration.test_train import SHAPE, assert_same_run, make_settings, read_metrics
from tests.makers import write_samples
from tests.unit.generation.world import MAX_SEQ_LEN, World

ROOT = Path(__file__).parents[2]
MANY_STEPS = {"bins_per_step": 1, "epochs": 1}  # one long epoch: a signal lands in its middle
NUM_EPOCHS = 5  # a checkpoint is told of while the next epoch runs, and maybe the one after it
MANY_EPOCHS = {"bins_per_step": 1, "epochs": NUM_EPOCHS, "train_frac": 0.01}  # a step an epoch, then a long validation

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


class Command:
    """`eagle3-ray VERB --config ... --log-format json` in a process group of its own, read line by line."""

    def __init__(self, verb: str, settings: TrainSettings | GenerateSettings, folder: Path) -> None:
        config = folder / f"{verb}.yaml"
        config.write_text(json.dumps(settings.model_dump(mode="json", exclude={"config"})))
        self.events: list[dict[str, Any]] = []
        self._unfinished = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eagle3_ray", verb, "--config", str(config), "--log-format", "json"],
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )

    def wait_for(self, event: str, timeout_s: float = 300.0) -> dict[str, Any]:
        """Read until an event comes, and return it."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while not (found := [line for line in self.events if line["event"] == event]):
            assert select.select([self.process.stdout], [], [], deadline - time.monotonic())[0], self.events
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, f"ended without {event}: {self.events}"
            *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
            self.events += map(json.loads, lines)
        return found[-1]

    def stop(self, number: signal.Signals) -> dict[str, Any]:
        """Send the signal, and return the last word."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)  # Ctrl-C goes to all processes of the terminal's group
        else:
            self.process.send_signal(number)
        last = self.wait_for("stopped")
        assert self.process.wait(120) == last["exit_code"] == 128 + number
        return last


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
