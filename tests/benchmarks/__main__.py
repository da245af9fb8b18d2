"""Every benchmark, one after the other, each in a process of its own; ends with a table of what they printed.

    python -m tests.benchmarks [--peer peer/bin/python] [--output build/bench]

Each prints one JSON object, which goes to `<benchmark>-<device>.jsonl` in the folder; the committed ones are in
`results/`, and `make plots` draws those. Compare ratios within one run: the rates of two
machines, or of a shared one at two times, say little. With a peer the step is timed against speculators.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

STEP = ("tests.benchmarks.step",)
RUNS: dict[str, tuple[str, ...]] = {
    "step, fp32, 3 TTT steps": STEP,
    "step, fp32, 7 TTT steps": (*STEP, "--steps", "7"),
    "step, bf16, 3 TTT steps": (*STEP, "--dtype", "bf16"),
    "tokens, 8k to 64k": ("tests.benchmarks.tokens",),
    "data": ("tests.benchmarks.data",),
    "plan": ("tests.benchmarks.plan",),
    "checkpoint": ("tests.benchmarks.checkpoint",),
    "workers": ("tests.benchmarks.workers",),
    "startup, 1 worker": ("tests.benchmarks.startup", "--workers", "1"),
    "startup, 2 workers": ("tests.benchmarks.startup", "--workers", "2"),
}
# What the table shows of each, if it was measured.
SHOWN = (
    "tokens_per_s", "share_of_matmul_rate", "memory_above_weights_gib", "times_peer_tokens_per_s", "times_peer_memory",
    "time_per_token_64k_over_8k", "bytes_per_token", "memory_off_line_frac",
    "worker_times_peer_bytes_per_cpu_s", "task_times_peer_bytes_per_cpu_s", "worker_wait_frac", "task_wait_frac",
    "plan_s", "plan_peak_mib", "refresh_changed_s", "refresh_changed_files_opened",
    "step_s", "stall_s", "blocking_save_s", "write_s",
    "efficiency", "control_efficiency", "wait_frac", "worker_mib", "grown_worker_mib", "driver_mib", "grown_driver_mib",
    "after_s", "parts_s", "command_s",
)  # fmt: skip


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of a virtual environment with speculators")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder of the JSON lines")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, object]] = {}
    lines: dict[Path, str] = {}
    for name, (module, *flags) in RUNS.items():
        peer = ["--peer", arguments.peer] if arguments.peer and module == STEP[0] else []
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", module, *flags, *peer], stdout=subprocess.PIPE, check=True)
        line = done.stdout.decode().strip().splitlines()[-1]
        found[name] = json.loads(line)
        print(line, flush=True)
        path = arguments.output / file_name(found[name])
        lines[path] = lines.get(path, "") + line + "\n"
        path.write_text(lines[path], encoding="utf-8")
    print("\n" + table(found))


def file_name(result: dict[str, object]) -> str:
    """Return the name of a result's file: `step-cpu.jsonl`, `step-nvidia-h100.jsonl`."""
    device = str(result["device"])
    return f"{result['benchmark']}-{'cpu' if device.startswith('cpu ') else device.lower().replace(' ', '-')}.jsonl"


def table(found: dict[str, dict[str, object]]) -> str:
    """Return a line for each figure of each benchmark."""
    lines = [f"{name:<26} {key:<36} {result[key]}" for name, result in found.items() for key in SHOWN if key in result]
    return "\n".join([f"{'benchmark':<26} {'figure':<36} value", *lines])


if __name__ == "__main__":
    main()
