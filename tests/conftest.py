"""Fixtures that more than one test module needs: one local Ray a module, and the recorded parity data."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from botocore.config import Config

from eagle3_ray.storage import ObjectPath, _open_filesystem

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
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectPath]:
    """An empty bucket of an S3 server of this test module's own; before `ray_cluster`, so that its workers find it."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    log_path = tmp_path_factory.mktemp("s3") / "server.log"
    with pytest.MonkeyPatch.context() as patched, log_path.open("w") as log:
        for name, value in environment.items():
            patched.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        _open_filesystem.cache_clear()
        client = boto3.client("s3", config=Config(retries={"max_attempts": 10, "mode": "standard"}))
        try:
            wait_for_port(port, server, log_path)
            client.create_bucket(Bucket="bucket")
            yield ObjectPath("s3://bucket")
        finally:
            server.terminate()
            server.wait()
            _open_filesystem.cache_clear()


def wait_for_port(port: int, server: "subprocess.Popen[bytes]", log_path: Path) -> None:
    """Return once the server answers; fail with its output if it ends or takes a minute."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert server.poll() is None and time.monotonic() < deadline, log_path.read_text()
        time.sleep(0.1)


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
