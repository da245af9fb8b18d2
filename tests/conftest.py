"""Fixtures that more than one test module needs: one local Ray a module, and the recorded parity data."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(2)

PARITY = Path(__file__).parent / "parity" / "small"


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of the recorded reference results (FACTS 8)."""
    return PARITY


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of this test module's own, stopped when the module is done."""
    import ray

    # Unix socket paths end at 107 bytes: Ray's temp folder must be short, which pytest's is not.
    temp_dir = tempfile.mkdtemp(prefix="e3r-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        _temp_dir=temp_dir,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)
