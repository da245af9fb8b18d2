"""A run that is killed again and again, and the same run left in peace: both must end alike, bit for bit.

    python -m tests.faults.chaos [--steps 300 --kills 12 --seed 0]      (make chaos)

The command is `eagle3-ray train` as users type it, on two workers. While it trains, one of these happens:

    worker     SIGKILL of a worker: Ray Train starts the workers again
    stand      SIGSTOP of a worker: it makes no progress, is named, and the workers start again
    driver     SIGKILL of the command: what it leaves behind must end by itself, and the command is typed again
    raylet     SIGKILL of the node's Ray: the command ends with an error, and is typed again
    term       SIGTERM of the command: it saves, ends with 143, and is typed again

It stops by itself: after so many kills the run is left to end. Prints one JSON object, and ends with 1 if the two runs
differ.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_leaves_with_path

from eagle3_ray.machine import usable_cpus
from eagle3_ray.training.run_folder import latest_committed
from tests.makers import write_samples
from tests.runs import PARITY, ROOT, descendants, wait_until

LENGTHS = [40, 61, 33, 52, 70, 28, 45, 39, 64, 50, 36, 58] * 10  # some thirty steps an epoch
KINDS = ("worker", "stand", "driver", "raylet", "term")
GIVE_UP_S = 180.0  # for anything that should happen within seconds


def write_settings(folder: Path, num_steps: int) -> Path:
    """Return the file of a run's settings; its samples are made beside it."""
    write_samples(folder / "data", LENGTHS, hidden_size=64, vocab_size=320)
    settings = {
        "verifier_name_or_path": str(PARITY / "verifier"),
        "d2t_path": str(PARITY / "d2t.npy"),
        "t2d_path": str(PARITY / "t2d.npy"),
        "data_path": str(folder / "data"),
        "save_path": str(folder / "run"),
        "total_seq_len": 112,
        "train_frac": 0.9,
        "epochs": 100,
        "max_steps": num_steps,
        "lr": 1e-3,
        "bins_per_step": 2,
        "num_workers": 2,
        "use_gpu": False,
        "checkpoint_every_steps": 10,
        "hang_timeout_s": 6.0,
        "logger": "tensorboard",
        "log_dir": str(folder / "logs"),
        "log_every_steps": 1,
        "max_failures": -1,
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


class Command:
    """`eagle3-ray train` while it runs."""

    def __init__(self, settings: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._log = (settings.parent / "log.txt").open("ab")
        command = [sys.executable, "-m", "eagle3_ray", "train", "--config", str(settings)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log)
        self.began_s = time.monotonic()

    def find(self, part_of_name: str) -> list[int]:
        """Return the processes below it whose name holds this."""
        return [pid for pid, name in descendants(self.process.pid).items() if part_of_name in name]

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_over():
            self.process.terminate()
        self.process.wait()
        self._log.close()

    def is_over(self) -> bool:
        """Tell whether it has ended."""
        return self.process.poll() is not None

    def wait(self) -> int:
        """Return its exit code once it has ended."""
        return self.process.wait(GIVE_UP_S)


def count_saved(run: Path) -> int:
    """Return how many whole checkpoints there are."""
    return len(list(run.glob("*/COMMITTED")))


def wait_for_progress(command: Command, run: Path) -> None:
    """Return once there is another whole checkpoint, or the command has ended."""
    known = count_saved(run)
    wait_until(lambda: count_saved(run) > known or command.is_over(), "a checkpoint", GIVE_UP_S)


def count_steps_made(logs: Path) -> int:
    """Return how many steps were logged, those counted twice that were made again."""
    files = sorted(logs.rglob("events.out.tfevents.*"))
    events = (event for path in files for event in EventFileLoader(str(path)).Load())
    return sum(value.tag == "train/loss" for event in events for value in event.summary.value)


def strike(command: Command, kind: str, rng: random.Random) -> bool:
    """Let it happen; tells whether the command must be typed again."""
    if kind in ("worker", "stand"):
        victim = rng.choice(command.find("RayTrainWorker"))
        os.kill(victim, signal.SIGKILL if kind == "worker" else signal.SIGSTOP)
        return False
    left_behind = descendants(command.process.pid)
    if kind == "raylet":
        (victim,) = [pid for pid, name in left_behind.items() if "/raylet\0" in name or name.endswith("/raylet")]
        os.kill(victim, signal.SIGKILL)
    else:
        os.kill(command.process.pid, signal.SIGKILL if kind == "driver" else signal.SIGTERM)
    code = command.wait()
    expected = {"raylet": code not in (0, None), "driver": code == -signal.SIGKILL, "term": code == 143}
    assert expected[kind], f"after {kind} the command ended with {code}"
    wait_until(
        lambda: not any(map(is_alive, left_behind, left_behind.values())), f"the end of {left_behind}", GIVE_UP_S
    )
    return True


def is_alive(pid: int, name: str) -> bool:
    """Tell whether a process is still there, as itself."""
    try:
        found = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return found != "" and found.split("\0")[0].split(" ")[0] == name.split("\0")[0].split(" ")[0]


def run_in_chaos(settings: Path, kinds: list[str], rng: random.Random) -> dict[str, Any]:
    """Train to the end while these things happen; tells what it cost."""
    run = settings.parent / "run"
    began_s, survived, num_typed = time.monotonic(), Counter[str](), 1
    with contextlib.ExitStack() as commands:
        command = commands.enter_context(Command(settings))
        for kind in kinds:
            wait_for_progress(command, run)
            time.sleep(rng.uniform(0.0, 1.0))
            if command.is_over():
                break  # the run was faster
            must_type = strike(command, kind, rng)
            survived[kind] += 1
            print(f"{kind:<7} with {count_saved(run)} checkpoints stored", file=sys.stderr, flush=True)
            if must_type:
                command, num_typed = commands.enter_context(Command(settings)), num_typed + 1
        code = command.wait()
    assert code == 0, f"the last command ended with {code}"
    return {"survived": dict(survived), "typed": num_typed, "took_s": round(time.monotonic() - began_s, 1)}


def load_state(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Return every tensor and number of a checkpoint's full-precision state."""
    whole = folder / f"{checkpoint.parent.parent.name}.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    return {str(path): leaf for path, leaf in tree_leaves_with_path(torch.load(whole, weights_only=True))}


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names of what is not the same in every bit."""

    def is_same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    names = sorted(first.keys() | second.keys())
    return [name for name in names if name not in first or name not in second or not is_same(first[name], second[name])]


def compare(num_steps: int, kinds: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train in peace and in chaos; tells what was survived, what it cost, and what differs."""
    calm, chaos = (write_settings(folder / name, num_steps) for name in ("calm", "chaos"))
    began_s = time.monotonic()
    with Command(calm) as command:
        code = command.wait()
    assert code == 0, (calm.parent / "log.txt").read_text()
    calm_s = time.monotonic() - began_s
    found = run_in_chaos(chaos, kinds, random.Random(seed))
    last = [latest_committed(settings.parent / "run") for settings in (calm, chaos)]
    paths = [Path(str(one.path)) for one in last if one is not None]
    states = [load_state(path, folder) for path in paths]
    validations = [
        {name: value for name, value in one.metrics.items() if name.startswith("val/")}
        for one in last
        if one is not None
    ]
    return {
        "benchmark": "chaos",
        "date": datetime.date.today().isoformat(),
        "device": f"cpu x{usable_cpus()}",
        "torch": torch.__version__,
        "ray": ray.__version__,
        "steps": num_steps,
        **found,
        "calm_s": round(calm_s, 1),
        "repeated_steps": count_steps_made(chaos.parent / "logs") - num_steps,
        "lost_s": round(found["took_s"] - calm_s, 1),
        "tensors": len(states[0]),
        "differing": differing(*states) + differing(*validations),
    }


def main() -> None:
    """Do both and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = [KINDS[number % len(KINDS)] for number in range(arguments.kills)]
    random.Random(arguments.seed).shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="eagle3-chaos-") as name:
        found = compare(arguments.steps, kinds, arguments.seed, Path(name))
    print(json.dumps(found))
    sys.exit(1 if found["differing"] else None)


if __name__ == "__main__":
    main()
