"""Run one function on several gloo ranks, each a process of its own, without Ray; collect what rank 0 returns."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], tmp_path: Path, *arguments: Any) -> Any:
    """Call `function(*arguments)` on every rank of a fresh process group and return rank 0's result."""
    store = tmp_path / f"store-{world_size}-{function.__name__}-{len(list(tmp_path.iterdir()))}"
    result = store.with_suffix(".result")
    mp.spawn(_run_rank, (world_size, function, str(store), str(result), arguments), nprocs=world_size)
    return pickle.loads(result.read_bytes())


def _run_rank(
    rank: int, world_size: int, function: Callable[..., Any], store: str, result: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    value = function(*arguments)
    if rank == 0:
        Path(result).write_bytes(pickle.dumps(value))
    dist.barrier()
    dist.destroy_process_group()
