"""From the command to its first step: `eagle3-ray train` as users run it, on data of the demo's size.

    python -m tests.benchmarks.startup [--runs 3]

A random verifier and random samples of the demo's shape are made on the spot; each run starts a Ray of its own, has no
index cache and no earlier checkpoint, and ends after a few steps. The parts are those that the command tells itself; a
part's figure is the median over the runs, `after_s` that of the whole. The whole command takes `command_s`, which
includes saving, and stopping Ray.

Prints one JSON object.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from eagle3_ray.data.index_cache import CACHE_DIR
from eagle3_ray.flags import flag_name
from eagle3_ray.jobs.demo import FULL, TTT_STEPS
from eagle3_ray.machine import usable_cpus
from tests.benchmarks.inputs import train_flags, write_inputs

MEAN_TOKENS = 230  # of the demo's conversations


def train(folder: Path, save_dir: Path, num_workers: int) -> dict[str, Any]:
    """Run the command; return what it told of its first step, and the seconds it took as a whole."""
    flags = train_flags(folder) | {
        "save_path": save_dir,
        "logger": "tensorboard",
        "total_seq_len": FULL.total_seq_len,
        "ttt_steps": TTT_STEPS,
        "num_workers": num_workers,
        "max_steps": 3,
        "log_format": "json",
    }
    words = [word for name, value in flags.items() for word in (flag_name(name), str(value))]
    command = [sys.executable, "-m", "eagle3_ray", "train", "--no-use-gpu", *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    start_s = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    command_s = time.perf_counter() - start_s
    lines = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    [told] = [line for line in lines if line["event"] == "first_step"]
    return {"parts_s": told["parts_s"], "after_s": told["after_s"], "command_s": command_s}


def main() -> None:
    """Run the command some times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eagle3-benchmark-") as name:
        folder = Path(name)
        lengths = np.random.default_rng(0).integers(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2, FULL.num_prompts)
        write_inputs(folder, FULL.verifier, lengths.tolist(), FULL.draft_vocab_size)
        found = []
        for number in range(arguments.runs):
            shutil.rmtree(folder / "data" / CACHE_DIR, ignore_errors=True)
            found.append(train(folder, folder / f"run-{number}", arguments.workers))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 2)

    result = {
        "benchmark": "startup",
        "date": datetime.date.today().isoformat(),
        "device": f"cpu x{usable_cpus()}",
        "torch": torch.__version__,
        "ray": ray.__version__,
        **vars(arguments),
        "after_s": median([run["after_s"] for run in found]),
        "slowest_after_s": round(max(run["after_s"] for run in found), 2),
        "parts_s": {part: median([run["parts_s"][part] for run in found]) for part in found[0]["parts_s"]},
        "command_s": median([run["command_s"] for run in found]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
