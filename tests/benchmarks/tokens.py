"""Time a token and memory of a training step as the bin grows: both should be proportional to the tokens.

    python -m tests.benchmarks.tokens [--sizes 8192 16384 32768 65536 --document 1024 ...]

Bins of packed documents of a chat's length, so that attention grows with the tokens too, and not with their square.
The draft is small, so that all sizes fit a 2-core machine. Each size is a process of its own, for memory is that
process's peak. Needs torch and numpy alone, as `step.py` does. Prints one JSON object:

    rows                   tokens, microseconds a token of the fastest step, and memory above weights and optimizer
    time_per_token_*       a token's time in the largest bin, over its time in the smallest
    bytes_per_token        slope of the straight line that fits the memory of all sizes best
    memory_off_line_frac   the farthest that a size's memory is from this line, as a share of it
"""

import argparse
import datetime
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from tests.benchmarks.step import DTYPES, device_name, run_own


def read_arguments() -> argparse.Namespace:
    """The defaults take a minute and 4 GiB on a 2-core machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 256, "intermediate": 704, "heads": 4, "kv-heads": 2, "vocab": 4000, "draft-vocab": 2000,
        "document": 1024, "steps": 3, "repeats": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="tokens of the bins")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of each document's tail, 0..1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    return parser.parse_args()


def run_size(arguments: argparse.Namespace, num_tokens: int) -> dict[str, float]:
    """Time the step of one size in a new process, and return its row."""
    shape = argparse.Namespace(**vars(arguments), tokens=num_tokens, documents=num_tokens // arguments.document)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        own = pool.submit(run_own, shape).result()
    return {
        "tokens": num_tokens,
        "us_per_token": round(1e6 / own["tokens_per_s"], 2),
        "memory_above_weights_mib": round(own["memory_above_weights_bytes"] / 2**20, 1),
    }


def fit_memory(rows: list[dict[str, float]]) -> dict[str, float]:
    """Fit a straight line through the memory of all sizes: its slope, and how far they are from it."""
    tokens = np.array([row["tokens"] for row in rows])
    memory_bytes = np.array([row["memory_above_weights_mib"] for row in rows]) * 2**20
    slope, start = np.polyfit(tokens, memory_bytes, 1)
    line = start + slope * tokens
    return {
        "bytes_per_token": round(float(slope)),
        "memory_off_line_frac": round(float(np.abs(memory_bytes / line - 1).max()), 4),
    }


def main() -> None:
    """Time every size and print what was seen."""
    arguments = read_arguments()
    rows = [run_size(arguments, num_tokens) for num_tokens in arguments.sizes]
    first, last = rows[0], rows[-1]
    ratio_name = f"time_per_token_{last['tokens'] // 1024}k_over_{first['tokens'] // 1024}k"
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
