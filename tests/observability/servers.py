"""A Ray head and a Prometheus, as real as on a cluster: processes of their own, on free ports, killed at the end."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.observability.dashboard import FOLDER

ROOT = Path(__file__).parents[2]
SCRAPE_EVERY_S = 4  # also how long Ray's agent may take to answer; it keeps what a process left behind for 20 s


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(look: Callable[[], Any], what: str, timeout_s: float = 240.0) -> Any:
    """Return the first true thing that `look` finds."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = look()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.5)


@contextmanager
def running(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have a server for the length of a block; it and what it started are killed at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Head:
    """A Ray head node, reached under a token."""

    env: dict[str, str]
    gcs_address: str
    dashboard: str
    service_discovery: Path

    def get(self, path: str) -> Any:
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def do(self, command: list[str], **env: str) -> str:
        """Run a command as somebody who knows the token; return what it printed."""
        done = subprocess.run(command, env=self.env | env, cwd=ROOT, text=True, capture_output=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def ray_head(folder: Path) -> Iterator[Head]:
    """Start a head with dashboard, jobs, metrics and a token."""
    # Unix socket paths end at 107 bytes: Ray's temp folder must be short, which pytest's is not.
    temp_dir = Path(tempfile.mkdtemp(prefix="e3o-", dir="/tmp"))
    gcs, dashboard = free_port(), free_port()
    env = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    }
    env |= {
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Fixed ports otherwise, which another Ray on this machine may have.
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={temp_dir}"),
        *(f"--metrics-export-port={free_port()}", f"--ray-client-server-port={free_port()}"),
        *(f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={512 * 2**20}"),
    ]
    try:
        with running(command, folder / "ray.log", env):
            head = Head(
                env=env,
                gcs_address=f"127.0.0.1:{gcs}",
                dashboard=f"http://127.0.0.1:{dashboard}",
                service_discovery=temp_dir / "prom_metrics_service_discovery.json",
            )
            wait_for(lambda: head.get("/api/version"), "Ray's dashboard")
            wait_for(head.service_discovery.exists, "Ray's list of what to scrape")
            yield head
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus server."""

    url: str

    def get(self, path: str, **parameters: str | float) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as answer:
            content = json.load(answer)
        assert content["status"] == "success", content
        return content["data"]

    def ask(self, query: str, time_s: float | None = None) -> list[dict[str, Any]]:
        """Return the series of an instant query: [{"metric": labels, "value": [time, text]}]."""
        found = self.get("query", query=query, **({} if time_s is None else {"time": time_s}))
        assert found["resultType"] == "vector"
        series: list[dict[str, Any]] = found["result"]
        return series

    def follow(self, query: str, start_s: float, end_s: float) -> list[tuple[float, float]]:
        """Return (time, value) of the one series of a query, second by second, where it has a value."""
        (series,) = self.get("query_range", query=query, start=start_s, end=end_s, step=1)["result"]
        return [(float(time_s), float(value)) for time_s, value in series["values"]]


@contextmanager
def prometheus(folder: Path, head: Head) -> Iterator[Prometheus]:
    """Start Prometheus with the project's scrape config; only where the list lies and the intervals are changed."""
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    for shipped, ours in (
        ("/tmp/ray/prom_metrics_service_discovery.json", str(head.service_discovery)),
        ("scrape_interval: 15s", f"scrape_interval: {SCRAPE_EVERY_S}s"),
        ("refresh_interval: 10s", "refresh_interval: 1s"),
    ):
        assert config.count(shipped) == 1
        config = config.replace(shipped, ours)
    (folder / "prometheus.yml").write_text(config)
    port = free_port()
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with running(command, folder / "prometheus.log"):
        server = Prometheus(f"http://127.0.0.1:{port}")
        # A gauge of Ray's own: the head is scraped.
        wait_for(lambda: server.ask("ray_node_cpu_count"), "Prometheus to scrape Ray", timeout_s=600)
        yield server
