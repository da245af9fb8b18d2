"""Fixtures that more than one test module needs: one local Ray a module, and the recorded parity data."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle3_ray.console import use_log_format
from eagle3_ray.storage import ObjectPath, _open_filesystem

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(2)

PARITY = Path(__file__).parent / "parity" / "small"


@pytest.fixture(autouse=True)
def text_for_people() -> None:
    """A process speaks in one way; a command that an earlier test ran in this one may have asked for JSON."""
    use_log_format("text")


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of the recorded reference results (FACTS 8)."""
    return PARITY


@pytest.fixture(scope="module")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectPath]:
    """An empty bucket of an S3 server of this test module's own; before `ray_cluster`, so that its workers find it."""
    import boto3

    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with store_server(command, port, environment, tmp_path_factory.mktemp("s3")):
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield ObjectPath("s3://bucket")


@pytest.fixture(scope="module")
def gs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectPath]:
    """An empty bucket of a Google Cloud Storage emulator of this test module's own; before `ray_cluster`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
    ]
    with store_server(command, port, {"STORAGE_EMULATOR_HOST": url}, tmp_path_factory.mktemp("gs")):
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=test", b'{"name": "bucket"}', {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).close()
        yield ObjectPath("gs://bucket")


@contextlib.contextmanager
def store_server(command: list[str], port: int, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """Have a server run for the length of a block, and clients find it."""
    log_path = folder / "server.log"
    with pytest.MonkeyPatch.context() as patched, log_path.open("w") as log:
        for name, value in environment.items():
            patched.setenv(name, value)
        server = subprocess.Popen(command, stdout=log, stderr=log)
        _open_filesystem.cache_clear()
        try:
            wait_for_port(port, server, log_path)
            yield
        finally:
            server.terminate()
            server.wait()
            _open_filesystem.cache_clear()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


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
