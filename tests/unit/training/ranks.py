"""Run one function on several gloo ranks, each a process of its own, without Ray; collect what rank 0 returns."""

import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], tmp_path: Path, *arguments: Any) -> Any:
    """Call `function(*arguments)` on every rank of a fresh process group and return rank 0's result."""
    folder = tmp_path / f"{function.__name__}-{world_size}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    try:
        mp.spawn(_run_rank, (world_size, function, str(folder), arguments), nprocs=world_size)
    except mp.ProcessExitedException as error:
        # A rank that a signal ended has told why on its own stderr, if at all.
        said = "; ".join((folder / f"stderr-{error.error_index}").read_text(errors="replace").split("\n")[-12:])
        raise RuntimeError(f"{error}: {said}") from error
    return pickle.loads((folder / "result").read_bytes())


def _run_rank(
    rank: int, world_size: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]
) -> None:
    with open(f"{folder}/stderr-{rank}", "wb") as stderr:
        os.dup2(stderr.fileno(), 2)
    torch.set_num_threads(1)
    # Loopback alone: whatever else on this host still calls a port that was given away is not to reach these ranks.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    value = function(*arguments)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(value))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # At once: FSDP's meshes keep parts of the group, whose threads may still run when an interpreter is taken down.
    os._exit(0)
