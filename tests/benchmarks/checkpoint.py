"""What a checkpoint costs a step: the copy to host memory that it waits for, against writing in the step's way.

    python -m tests.benchmarks.checkpoint [--hidden 1024 --ranks 1 ...]

Needs no Ray, whose own part runs behind the training too. Seconds are medians; `stall_s` is that of a copy into
buffers that are there already, `first_stall_s` that of the first, which makes them. Prints one JSON object.
"""

import argparse
import datetime
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.machine import usable_cpus
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.checkpoint import HostState, write_checkpoint
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.saver import Background
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import StepSettings, train_step
from tests.benchmarks.step import make_bin, make_config

STEPS_BEHIND = 2


def read_arguments() -> argparse.Namespace:
    """The shape to time; the defaults fit a 2-core CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 1024, "intermediate": 2816, "heads": 16, "kv-heads": 4, "vocab": 16000, "draft-vocab": 8000,
        "tokens": 2048, "documents": 4, "steps": 3, "ranks": 1, "saves": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of each document's tail, 0..1")
    return parser.parse_args()


def build_training(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[Eagle3Draft, torch.optim.Optimizer, Callable[[], None]]:
    """Return a draft of random weights, its optimizer, and what makes one update. collective."""
    config = replace(make_config(arguments), verifier_name_or_path="verifier")
    torch.manual_seed(0)
    weights = dict(Eagle3Draft(config).state_dict()) if dist.get_rank() == 0 else None
    draft = build_sharded_draft(config, weights, device, dtype)
    optimizer = build_optimizer(draft.parameters(), 0.0)
    set_learning_rate(optimizer, 1e-4)
    head_weight = torch.randn(arguments.draft_vocab, arguments.hidden).mul_(0.02).to(device, dtype)
    head = TargetHead(head_weight, torch.ones(arguments.hidden, device=device, dtype=dtype), 1e-6)
    settings = StepSettings(arguments.steps, 1.0, 0.0, 0, 1.0, device, dtype)
    ready = make_ready(make_bin(arguments), settings.num_ttt_steps, len(draft.layers), device)

    def update() -> None:
        train_step(draft, optimizer, head, [ready], 0, settings).wait()

    return draft, optimizer, update


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes, work left on a GPU included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held_bytes(host: HostState) -> int:
    """Return the bytes of this rank's copy, its frozen embedding aside."""
    tensors = [leaf for leaf in tree_leaves(host.state) if isinstance(leaf, torch.Tensor)]
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def measure(rank: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Time steps and saves on one rank; rank 0 leaves what it found in result.json."""
    torch.set_num_threads(max(1, usable_cpus() // arguments.ranks))
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks
    )
    draft, optimizer, update = build_training(arguments, device, torch.bfloat16 if is_gpu else torch.float32)
    kept = torch.arange(arguments.vocab) < arguments.draft_vocab
    mapping = VocabMapping(torch.zeros(arguments.draft_vocab, dtype=torch.int64), kept)
    update()
    steps = [timed(update) for _ in range(arguments.saves)]
    host, background = HostState(draft, optimizer), Background()
    first_stall_s = timed(host.copy)

    def write(name: str) -> None:
        write_checkpoint(folder / name, host, mapping, {})

    def write_behind(name: str) -> None:
        writes.append(timed(functools.partial(write, name)))

    blocking: list[float] = []
    stalls: list[float] = []
    writes: list[float] = []
    behind: list[float] = []
    for number in range(arguments.saves):
        dist.barrier()
        blocking.append(timed(host.copy) + timed(functools.partial(write, f"blocking-{number}")))
        dist.barrier()
        stalls.append(timed(host.copy))
        background.start(functools.partial(write_behind, f"behind-{number}"))
        behind += [timed(update) for _ in range(STEPS_BEHIND)]
        background.wait()
    if rank == 0:
        num_weights = sum(p.numel() for p in draft.parameters() if p.requires_grad)
        stored = [path.stat().st_size for path in (folder / "behind-0").rglob("*") if path.is_file()]
        result = {
            "device": torch.cuda.get_device_name() if is_gpu else f"cpu x{usable_cpus()}",
            "weights": num_weights,
            "step_s": round(statistics.median(steps), 3),
            "stall_s": round(statistics.median(stalls), 4),
            "stall_steps": round(statistics.median(stalls) / statistics.median(steps), 4),
            "first_stall_s": round(first_stall_s, 4),
            "blocking_save_s": round(statistics.median(blocking), 3),
            "blocking_save_steps": round(statistics.median(blocking) / statistics.median(steps), 3),
            "write_s": round(statistics.median(writes), 3),
            "step_while_writing_s": round(statistics.median(behind[::STEPS_BEHIND]), 3),
            "host_bytes_per_weight": round(held_bytes(host) * arguments.ranks / num_weights, 2),
            "stored_bytes": sum(stored),
            "stored_bytes_per_weight": round(sum(stored) / num_weights, 2),
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Time it and print what was seen."""
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="eagle3-benchmark-") as folder:
        mp.spawn(measure, (arguments, Path(folder)), nprocs=arguments.ranks)
        found = json.loads(Path(folder, "result.json").read_text())
    result = {
        "benchmark": "checkpoint",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": found.pop("device"),
        **vars(arguments),
        **found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
