"""Training over one and over two workers, by the whole of `train`: tokens/s, waiting for data, memory.

    python -m tests.benchmarks.workers [--hidden 512 --tokens 2048 --steps 16 ...]

Each worker computes with one thread and has one bin a step, so two of them do twice the work; what they do beyond a
single one's is shared here by cores that also share their caches and their memory. So the control is two runs of one
worker each, side by side, which have nothing to tell one another. Every run is a process of its own with a Ray of its
own; rates are of the second half of its steps. Prints one JSON object:

    alone, together, apart    tokens/s of one worker, of two in one run, and of two runs with one each
    efficiency                together over twice alone; control_efficiency: apart over twice alone
    wait_frac                 share of their time that two workers wait for data
    worker_mib, driver_mib    most memory of a worker and of the driver, two workers; grown_*: at four times the samples
"""

import argparse
import datetime
import json
import os
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import ray
import torch

from eagle3_ray.config import TrainSettings
from eagle3_ray.demo.tiny_verifier import VerifierRecipe
from eagle3_ray.jobs import train
from eagle3_ray.jobs.cluster import CPUS_FOR_TASKS, ray_session
from eagle3_ray.machine import usable_cpus
from eagle3_ray.training.run_folder import latest_committed
from eagle3_ray.training.startup import Laps
from tests.benchmarks.inputs import train_flags, write_inputs

WORKERS = 2
TIMES_SAMPLES = 4


def read_arguments() -> argparse.Namespace:
    """The shape to train; the defaults fit a 2-core CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 512, "intermediate": 1408, "vocab": 4000, "draft-vocab": 2000,
        "tokens": 2048, "document": 1024, "steps": 16,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def make_inputs(folder: Path, arguments: argparse.Namespace, times: int) -> None:
    """Make a verifier and `times` the samples that two workers need for all steps, in a new folder."""
    folder.mkdir()
    recipe = VerifierRecipe(
        hidden_size=arguments.hidden,
        num_train_tokens=0,
        intermediate_size=arguments.intermediate,
        num_layers=8,
        vocab_size=arguments.vocab,
    )
    num_samples = times * WORKERS * arguments.steps * arguments.tokens // arguments.document
    write_inputs(folder, recipe, [arguments.document] * num_samples, arguments.draft_vocab)


def train_on(folder: Path, save_dir: Path, num_workers: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train for the steps asked for; return what was measured in the second half of them, and the most memory."""
    settings = TrainSettings.model_validate(
        train_flags(folder)
        | {
            "save_path": str(save_dir),
            "total_seq_len": arguments.tokens,
            "num_workers": num_workers,
            "use_gpu": False,
            "train_frac": 1.0,
            "max_steps": arguments.steps,
            "log_every_steps": arguments.steps // 2,
        }
    )
    with ray_session(num_workers + CPUS_FOR_TASKS):  # a CPU, and so a thread, for each worker
        train.train_draft(settings, Laps())
    saved = latest_committed(settings.save_path)
    assert saved is not None
    return {
        "tokens_per_s": saved.metrics["train/tokens_per_s"],
        "wait_frac": saved.metrics["train/data_wait_frac"],
        "worker_mib": saved.metrics["train/peak_memory_bytes"] / 2**20,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Train alone, together, apart, and together on more samples."""
    for name, times in (("data", 1), ("grown", TIMES_SAMPLES)):
        make_inputs(folder / name, arguments, times)
    found = {}
    for name, inputs, num_workers, num_runs in (
        ("alone", "data", 1, 1),
        ("together", "data", WORKERS, 1),
        ("apart", "data", 1, WORKERS),
        ("grown", "grown", WORKERS, 1),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(num_runs, mp_context=get_context("spawn")) as pool:
            runs = [
                pool.submit(train_on, folder / inputs, folder / f"run-{name}-{number}", num_workers, arguments)
                for number in range(num_runs)
            ]
            found[name] = [run.result() for run in runs]
    [alone], [together], [grown] = found["alone"], found["together"], found["grown"]
    apart = sum(run["tokens_per_s"] for run in found["apart"])
    return {
        "alone": round(alone["tokens_per_s"], 1),
        "together": round(together["tokens_per_s"], 1),
        "apart": round(apart, 1),
        "efficiency": round(together["tokens_per_s"] / WORKERS / alone["tokens_per_s"], 3),
        "control_efficiency": round(apart / WORKERS / alone["tokens_per_s"], 3),
        "wait_frac": round(together["wait_frac"], 5),
        "worker_mib": round(together["worker_mib"], 1),
        "driver_mib": round(together["driver_mib"], 1),
        "grown_worker_mib": round(grown["worker_mib"], 1),
        "grown_driver_mib": round(grown["driver_mib"], 1),
    }


def main() -> None:
    """Measure and print what was seen."""
    arguments = read_arguments()
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="eagle3-benchmark-") as name:
        found = measure(Path(name), arguments)
    result = {
        "benchmark": "workers",
        "date": datetime.date.today().isoformat(),
        "device": f"cpu x{usable_cpus()}",
        "torch": torch.__version__,
        "ray": ray.__version__,
        **vars(arguments),
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
