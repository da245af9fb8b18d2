"""Runs of `train` that tests make, in this process, in a thread, or as a command; and what they left."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eagle3_ray.config import TrainSettings
from eagle3_ray.jobs.train import run
from eagle3_ray.verbs import GenerateSettings

ROOT = Path(__file__).parents[1]
PARITY = ROOT / "tests" / "parity" / "small"
LENGTHS = [40, 61, 33, 52, 70, 28, 45, 39, 64, 50, 36, 58]
SHAPE = {"hidden_size": 64, "vocab_size": 320}


def make_settings(folder: Path, **changes: Any) -> TrainSettings:
    """Ten samples to train on in five bins, two a step: three steps an epoch, two epochs."""
    fields: dict[str, Any] = {
        "verifier_name_or_path": str(PARITY / "verifier"),
        "data_path": folder / "data",
        "save_path": folder / "run",
        "log_dir": folder / "logs",
        "d2t_path": PARITY / "d2t.npy",
        "t2d_path": PARITY / "t2d.npy",
        "total_seq_len": 112,
        "train_frac": 0.8,
        "epochs": 2,
        "lr": 1e-3,
        "bins_per_step": 2,
        "num_workers": 1,
        "use_gpu": False,
        "log_every_steps": 1,
    }
    return TrainSettings(**(fields | changes))


def load_state(checkpoint: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint's full-precision state as one flat dict."""
    whole = tmp_path / f"{checkpoint.parent.name}-{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    flat: dict[str, torch.Tensor] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flatten(f"{prefix}/{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    flatten("", torch.load(whole, weights_only=True))
    return flat


def assert_same_run(found: Path, expected: Path, tmp_path: Path, name: str = "1") -> None:
    """The last checkpoints agree in every bit: weights, Adam's moments and steps, metrics."""
    state = load_state(found / "run" / name, tmp_path)
    wanted = load_state(expected / "run" / name, tmp_path)
    assert state.keys() == wanted.keys() and len(wanted) > 30
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    metrics, wanted_metrics = read_metrics(found / "run" / name), read_metrics(expected / "run" / name)
    validated = [name for name in wanted_metrics if name.startswith("val/")]
    assert {name: metrics[name] for name in validated} == {name: wanted_metrics[name] for name in validated}


def read_metrics(checkpoint: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((checkpoint / "run.json").read_text())["metrics"]
    return metrics


class ThreadedRun:
    """`train` in a thread of this process, while the test goes on."""

    def __init__(self, settings: TrainSettings) -> None:
        self.failures: list[BaseException] = []
        self._settings = settings
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self) -> None:
        try:
            run(self._settings)
        except BaseException as error:  # noqa: BLE001
            self.failures.append(error)

    def is_over(self) -> bool:
        """Tell whether it has ended."""
        return not self._thread.is_alive()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Return once the condition holds; fail if the run ends before, or after a while."""
        wait_until(lambda: condition() or self.is_over(), what)
        assert condition(), f"ended without {what}: {self.failures}"

    def join(self) -> list[BaseException]:
        """Return what it raised, once it has ended."""
        self._thread.join()
        return self.failures


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


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below one, by id, with what they are called."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            title = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile
        names[int(lines["Pid"])] = title.decode(errors="replace").rstrip("\0 ")
        parents[int(lines["Pid"])] = int(lines["PPid"])

    def is_below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return {child: name for child, name in names.items() if child != pid and is_below(child)}


def wait_for_train_workers() -> list[int]:
    """Return the ids of the Ray Train workers below this process, of one at least.

    Ray rewrites a worker's title with each call, and it is gone meanwhile.
    """
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid, name in descendants(os.getpid()).items() if "RayTrainWorker" in name]
        return len(found) > 0

    wait_until(look, "a worker")
    return found
