"""How a rank comes to hold what it trains with: a state on an object store is fetched once for all ranks of a node."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from eagle3_ray.storage import ObjectPath
from eagle3_ray.training.rank import share_state
from tests.unit.training.ranks import run_on_ranks


def fetch_state(path: ObjectPath) -> list[Any]:
    """Where each rank finds the state, and what is there; all of them at once, before one is done with it."""
    found: list[Any] = [None] * dist.get_world_size()
    with share_state(path).as_directory() as folder:
        dist.all_gather_object(found, (folder, Path(folder, "weights").read_bytes()))
    return found


def test_ranks_of_a_node_share_one_copy_of_a_state(s3_bucket: ObjectPath, tmp_path: Path) -> None:
    (s3_bucket / "state" / "weights").write_bytes(b"content")
    first, second = run_on_ranks(2, fetch_state, tmp_path, s3_bucket / "state")
    assert first == second and first[1] == b"content"
