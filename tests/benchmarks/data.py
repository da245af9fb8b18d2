"""What the data path costs: bytes of samples a second, of the clock and of the CPU, from files to a bin of tensors.

    python -m tests.benchmarks.data [--hidden 4096 --files 60 --repeats 3 ...]

Writes v1 files into a temporary folder, has them in the page cache, and brings the same bins of 8192 positions to a
rank in three ways, in turns, so that noise hits all alike:

    worker, task   the two ways of `--pack-in`, as a rank of a training run has them: dealt by Ray Data, packed into
                   buffers that are used again. Charged with the CPU time of this process and of every process of Ray.
    peer           the way of speculators 0.3: torch's DataLoader over files, in this process (`num_workers=0`, which
                   spares it the way through shared memory); of each file `torch.load(weights_only=True)`, the
                   auxiliary layers concatenated, all states to float32; a collate function concatenates the samples
                   and the padding (at once, in one copy). Its batches are new memory each time. Charged with the CPU
                   time of this process.

A turn opens its stream anew; its first and last bins are not counted, for a path runs ahead of the bin looked at.
The bytes are those of the samples in their files (bf16 states, ids, mask), the same for all. `wait_frac` is the share
of its time that a consumer waits whose steps take 1.5 times as long as the path takes for a bin; they sleep. Prints
one JSON object.
"""

import argparse
import collections
import contextlib
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import ray
import torch
from ray.train import DataConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eagle3_ray.data.index import build_index
from eagle3_ray.data.packing import BinSchedule, plan_bins
from eagle3_ray.data.pipeline import BinSource, PackIn, bin_execution_options, build_bin_dataset, iter_step_bins
from eagle3_ray.data.samples import SampleSpec

NUM_AUX_LAYERS = 3
TOTAL_SEQ_LEN = 8192
MIN_TOKENS, MAX_TOKENS = 300, 1700
VOCAB_SIZE = 32000
STEP_OVER_PATH = 1.5
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PACK_IN: tuple[PackIn, ...] = ("worker", "task")


def read_arguments() -> argparse.Namespace:
    """The defaults take two minutes and 2 GiB on a 2-core machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 4096, "files": 60, "repeats": 3, "bins": 48, "peer-bins": 12, "wait-bins": 24, "settle-bins": 16,
        "warm-bins": 200,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def write_files(folder: str, num_files: int, hidden_size: int) -> None:
    """Samples of random states, which are parts of one block: drawing numbers would take longer than all else."""
    generator = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(MAX_TOKENS + NUM_AUX_LAYERS + 1, hidden_size, generator=generator).bfloat16()
    for number in range(num_files):
        num_tokens = int(torch.randint(MIN_TOKENS, MAX_TOKENS + 1, (1,), generator=generator))
        content = {
            "input_ids": torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator),
            "loss_mask": (torch.arange(num_tokens) >= num_tokens // 3).long(),
            "hidden_states": [states[layer : layer + num_tokens].clone() for layer in range(NUM_AUX_LAYERS + 1)],
        }
        torch.save(content, f"{folder}/{number:05}.pt")


def plan_source(folder: str, hidden_size: int) -> BinSource:
    """Index and plan the files as a run does."""
    spec = SampleSpec(1, hidden_size, NUM_AUX_LAYERS, VOCAB_SIZE, torch.ones(hidden_size), 1e-5)
    index = build_index(folder, spec)
    return BinSource(spec, index, plan_bins(index.num_tokens, index.num_supervised, TOTAL_SEQ_LEN, seed=0), seed=0)


def warm_page_cache(source: BinSource) -> None:
    """Read every byte of every file."""
    for path in source.index.paths:
        Path(source.index.root, path).read_bytes()


# ---------------------------------------------------------------------------------------- the paths


@contextlib.contextmanager
def open_stream(source: BinSource, pack_in: PackIn, num_bins: int) -> Iterator[Iterator[tuple[int, float]]]:
    """So many bins of a single rank, as (number, seconds waited), by the classes that a training run uses."""
    num_plan_bins = len(source.plan.bins)
    schedule = BinSchedule(num_plan_bins, 1, 1, epochs=-(-num_bins // num_plan_bins))
    dataset = build_bin_dataset(schedule, 0, num_bins)
    config = DataConfig(execution_options=bin_execution_options())
    node_ids = [ray.get_runtime_context().get_node_id()]
    shard = config.configure({"train": dataset}, 1, None, node_ids)[0]["train"]
    bins = (
        (item.bins[0], item.wait_s)
        for item in iter_step_bins(shard, source, schedule, 0, range(num_bins), pack_in, lambda packed: packed.number)
    )
    yield bins
    collections.deque(bins, maxlen=0)  # to its end: what it has begun belongs to no other turn


class PeerDataset(Dataset[dict[str, Tensor]]):
    """One file an item, in float32."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        content = torch.load(self._paths[number], map_location="cpu", weights_only=True)
        *aux_states, last_state = content["hidden_states"]
        return {
            "input_ids": content["input_ids"][1:],
            "loss_mask": content["loss_mask"][1:],
            "hidden_states": torch.cat(aux_states, dim=-1)[:-1].float(),
            "last_state": last_state[1:].float(),
        }


def collate_like_peer(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row of 8192 positions: samples, then zeros."""
    padding = TOTAL_SEQ_LEN - sum(len(sample["input_ids"]) for sample in samples)
    row = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        row[name] = torch.cat([*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])])[None]
    return row


@contextlib.contextmanager
def open_peer(source: BinSource) -> Iterator[Iterator[tuple[int, float]]]:
    """The same bins in the same order as a batch sampler has them."""
    order = [int(number) for epoch in range(100) for number in source.plan.epoch_order(epoch, source.seed)]
    loader = DataLoader(
        PeerDataset([f"{source.index.root}/{path}" for path in source.index.paths]),
        batch_sampler=[source.plan.bins[number].tolist() for number in order],
        collate_fn=collate_like_peer,
        num_workers=0,
    )
    yield ((number, 0.0) for number, _ in zip(order, loader, strict=False))


# ------------------------------------------------------------------------------------------ measuring


def cpu_s_of_tree() -> dict[int, float]:
    """CPU seconds of this process and of each one below it: Ray's and its workers'."""
    cpu_s, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                pid = int(folder.name)
                parents[pid] = int(fields[1])
                cpu_s[pid] = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S
    return {pid: used for pid, used in cpu_s.items() if is_below(pid, os.getpid(), parents)}


def cpu_s_of_this_process() -> dict[int, float]:
    """CPU seconds of this process alone."""
    return {os.getpid(): time.process_time()}


def is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    """Tell whether a process is another one or descends from it."""
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root


class Rate(NamedTuple):
    """What a turn saw."""

    bytes_per_cpu_s: float
    bytes_per_s: float
    s_per_bin: float


def measure(
    source: BinSource,
    bins: Iterator[tuple[int, float]],
    num_settle: int,
    num_bins: int,
    cpu_s: Callable[[], dict[int, float]],
) -> Rate:
    """Take bins as fast as they come, and count from the `num_settle`-th on."""
    token_bytes = 2 * (NUM_AUX_LAYERS + 1) * source.spec.hidden_size + 8 + 8
    for _ in range(num_settle):
        next(bins)
    start_s, start_cpu_s, num_bytes = time.perf_counter(), cpu_s(), 0
    for _ in range(num_bins):
        number, _ = next(bins)
        num_bytes += int(source.index.num_tokens[source.plan.bins[number]].sum()) * token_bytes
    used_s = time.perf_counter() - start_s
    # A process that has ended meanwhile was an idle one: Ray ends no other.
    used_cpu_s = sum(used - start_cpu_s.get(pid, 0.0) for pid, used in cpu_s().items())
    return Rate(num_bytes / used_cpu_s, num_bytes / used_s, used_s / num_bins)


def measure_wait(bins: Iterator[tuple[int, float]], num_settle: int, num_bins: int, step_s: float) -> float:
    """Share of its time that a consumer waits whose steps take so long."""
    for _ in range(num_settle):
        next(bins)
        time.sleep(step_s)
    start_s, wait_s = time.perf_counter(), 0.0
    for _ in range(num_bins):
        wait_s += next(bins)[1]
        time.sleep(step_s)
    return wait_s / (time.perf_counter() - start_s)


def run_turns(source: BinSource, arguments: argparse.Namespace) -> dict[str, list[Rate]]:
    """Every path in every turn, a different one first each time."""
    names = ["peer", *PACK_IN]
    found: dict[str, list[Rate]] = {name: [] for name in names}
    for turn in range(arguments.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "peer":
                with open_peer(source) as bins:
                    found[name].append(measure(source, bins, 1, arguments.peer_bins, cpu_s_of_this_process))
            else:
                with open_stream(source, cast(PackIn, name), arguments.bins + 2 * arguments.settle_bins) as bins:
                    rate = measure(source, bins, arguments.settle_bins, arguments.bins, cpu_s_of_tree)
                    found[name].append(rate)
    return found


def summarize(found: dict[str, list[Rate]], source: BinSource, arguments: argparse.Namespace) -> dict[str, object]:
    """Medians over the turns, ratios of them, and the waiting, which takes its step from the former."""
    result: dict[str, object] = {}
    median = {
        name: Rate(*(statistics.median(column) for column in zip(*rates, strict=True))) for name, rates in found.items()
    }
    for name, rate in median.items():
        result[f"{name}_bytes_per_cpu_s"] = round(rate.bytes_per_cpu_s)
        result[f"{name}_bytes_per_s"] = round(rate.bytes_per_s)
    for name in PACK_IN:
        rate, peer = median[name], median["peer"]
        result[f"{name}_times_peer_bytes_per_cpu_s"] = round(rate.bytes_per_cpu_s / peer.bytes_per_cpu_s, 2)
        result[f"{name}_times_peer_bytes_per_s"] = round(rate.bytes_per_s / peer.bytes_per_s, 2)
        with open_stream(source, name, arguments.wait_bins + 2 * arguments.settle_bins) as bins:
            step_s = STEP_OVER_PATH * rate.s_per_bin
            wait_frac = measure_wait(bins, arguments.settle_bins, arguments.wait_bins, step_s)
        result[f"{name}_ms_per_bin"] = round(rate.s_per_bin * 1e3, 1)
        result[f"{name}_wait_frac"] = round(wait_frac, 4)
    return result


def main() -> None:
    """Time it and print what was seen."""
    arguments = read_arguments()
    torch.set_num_threads(1)  # more of them would cost the peer CPU time
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="eagle3-data-") as folder, contextlib.ExitStack() as stack:
        write_files(folder, arguments.files, arguments.hidden)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        stack.callback(ray.shutdown)
        source = plan_source(folder, arguments.hidden)
        warm_page_cache(source)
        for pack_in in PACK_IN:  # their processes start and touch all of the object store that they will use
            with open_stream(source, pack_in, arguments.warm_bins):
                pass
        measured = summarize(run_turns(source, arguments), source, arguments)
        num_tokens = source.index.num_tokens
    result = {
        "benchmark": "data",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "device": f"cpu x{len(os.sched_getaffinity(0))}",
        **vars(arguments),
        "total_seq_len": TOTAL_SEQ_LEN,
        "tokens": int(num_tokens.sum()),
        "tokens_per_file": [int(np.min(num_tokens)), int(np.max(num_tokens))],
        "bins_of_plan": len(source.plan.bins),
        "peer": "DataLoader, torch.load, cat, float32, collate; num_workers 0",
        **measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
