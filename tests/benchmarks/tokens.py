"""Time per token and memory of a training step as the bin grows: time should stay, memory grow in a straight line.

    python -m tests.benchmarks.tokens [--sizes 8192 16384 32768 65536 --document 1024 ...]

Bins of packed documents of a chat's length, so that attention grows with the tokens and not with their square. The
draft is small, so that all sizes fit a 2-core machine. Each size is a process of its own, whose peak its memory is;
the sizes take turns, so that noise hits all alike. Needs torch and numpy alone, as `step.py` does. Prints one JSON
object:

    rows                   of each size: microseconds a token of the fastest step; memory above weights and optimizer;
                           live memory, without what the C library keeps of freed tensors (on a GPU the same)
    time_per_token_*       a token's time in the largest bin, over its time in the smallest
    bytes_per_token        slope of the straight line that fits the live memory of all sizes best
    memory_off_line_frac   the farthest that a size's live memory is from this line, as a share of it
"""

import argparse
import datetime
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import numpy as np
import torch

from tests.benchmarks.step import DTYPES, device_name, run_own

# glibc then gives back every larger tensor when it is freed: slower, and the process's peak is that of live tensors.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Row = dict[str, float]


def read_arguments() -> argparse.Namespace:
    """The shape to time; the defaults fit a 2-core CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 256, "intermediate": 704, "heads": 4, "kv-heads": 2, "vocab": 4000, "draft-vocab": 2000,
        "document": 1024, "steps": 3, "repeats": 1, "turns": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="tokens of the bins")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of each document's tail, 0..1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    return parser.parse_args()


def run_fresh(arguments: argparse.Namespace, num_tokens: int, environment: dict[str, str]) -> dict[str, float]:
    """Time a step of so many tokens in a new process; as `step.run_own`."""
    shape = argparse.Namespace(**vars(arguments), tokens=num_tokens, documents=num_tokens // arguments.document)
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(run_own, shape).result()


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return a row of each size."""
    turns = [[run_fresh(arguments, size, {}) for size in arguments.sizes] for _ in range(arguments.turns)]
    live = (
        [run_fresh(arguments, size, GIVE_BACK) for size in arguments.sizes] if arguments.device == "cpu" else turns[0]
    )
    return [
        {
            "tokens": size,
            "us_per_token": round(min(1e6 / turn["tokens_per_s"] for turn in found), 2),
            "memory_above_weights_mib": round(max(turn["memory_above_weights_bytes"] for turn in found) / 2**20, 1),
            "live_memory_above_weights_mib": round(alive["memory_above_weights_bytes"] / 2**20, 1),
        }
        for size, alive, *found in zip(arguments.sizes, live, *turns, strict=True)
    ]


def fit_memory(rows: list[Row]) -> Row:
    """Fit a straight line through the live memory of all sizes: its slope, and how far they are from it."""
    tokens = np.array([row["tokens"] for row in rows])
    memory_bytes = np.array([row["live_memory_above_weights_mib"] for row in rows]) * 2**20
    slope, start = np.polyfit(tokens, memory_bytes, 1)
    line = start + slope * tokens
    return {
        "bytes_per_token": round(float(slope)),
        "memory_off_line_frac": round(float(np.abs(memory_bytes / line - 1).max()), 4),
    }


def main() -> None:
    """Measure every size and print what was seen."""
    arguments = read_arguments()
    rows = measure(arguments)
    first, last = rows[0], rows[-1]
    ratio_name = f"time_per_token_{last['tokens'] / 1024:g}k_over_{first['tokens'] / 1024:g}k"
    result = {
        "benchmark": "tokens",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": device_name(torch.device(arguments.device)),
        **{name: value for name, value in vars(arguments).items() if name not in ("device", "sizes")},
        "rows": rows,
        ratio_name: round(last["us_per_token"] / first["us_per_token"], 2),
        **fit_memory(rows),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
