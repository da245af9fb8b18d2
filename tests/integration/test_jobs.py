"""`ray job submit` to a head with a token: what travels, what the job's end tells, and that `ray job stop` saves.

And what joining that head by RAY_ADDRESS tells without its token, or from other versions.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.makers import write_samples

ROOT = Path(__file__).parents[2]
PARITY = Path(__file__).parents[1] / "parity" / "small"
SHAPE = {"hidden_size": 64, "vocab_size": 320}
HANG_S = 120.0  # quiet machines take some seconds; Ray itself goes on trying a bad token for half a minute, silently

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Head:
    """A Ray head of this module's own.

    Attributes:
        address: of its GCS, what RAY_ADDRESS names.
        dashboard: what `ray job` talks to.
        environment: of a process that may use it.
    """

    address: str
    dashboard: str
    environment: dict[str, str]

    def ray(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run `ray job ...` as a user does."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        environment = self.environment | {"RAY_API_SERVER_ADDRESS": self.dashboard}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)

    def get(self, path: str) -> Any:
        """Return what the dashboard answers."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=token), timeout=60) as reply:
            return json.load(reply)

    def logs(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        text: str = self.get(f"/api/jobs/{job_id}/logs")["logs"]
        return text


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with token authentication, its dashboard, and a home of its own, without a token file in it."""
    temp_dir = tempfile.mkdtemp(prefix="e3j-", dir="/tmp")  # a short path, for Unix sockets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": temp_dir,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    gcs, dashboard, client, agent = free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--object-store-memory=300000000"]
    with_its_parent = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    process = subprocess.Popen(
        [*with_its_parent, *command, f"--temp-dir={temp_dir}"],
        env=environment,
        cwd=temp_dir,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    found = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
    try:
        wait_for_dashboard(found, process)
        yield found
    finally:
        process.terminate()  # with --block, it ends all that it has started
        process.wait(120)
        shutil.rmtree(temp_dir, ignore_errors=True)


def wait_for_dashboard(head: Head, process: "subprocess.Popen[bytes]", timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "no head came up"
        try:
            head.get("/api/jobs/")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout after some use."""
    folder = tmp_path_factory.mktemp("checkout") / "eagle3"
    for name in ("eagle3_ray", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "parity"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    for name in (".venv/bin/python", ".git/config", "data/data_0.pt", "checkpoints/0/state/0.distcp", "logs/events"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "verifier").mkdir()
    (folder / "verifier" / "model.safetensors").write_bytes(b"x")
    return folder


def test_a_checkout_travels_as_the_package_and_little_else(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    # As `ray job submit --working-dir` does, with the folders that it leaves out by default.
    create_package(str(checkout), package, include_gitignore=True, excludes=[".git", ".venv", "__pycache__"])
    names = set(zipfile.ZipFile(package).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "eagle3_ray").rglob("*.py")}
    assert sources <= names and len(sources) > 40
    stray = {name for name in names if not name.startswith("eagle3_ray/") and "/" in name.rstrip("/")}
    assert stray == set()
    assert not {name for name in names if name.endswith((".pt", ".safetensors", ".distcp"))}
    assert package.stat().st_size < 1_000_000  # Ray does not compress; its limit is 500 MiB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples for some 900 steps: seconds pass until `ray job stop` has started and said its word."""
    return write_samples(tmp_path_factory.mktemp("jobs") / "data", [100] * 1000, **SHAPE)


def train_command(data: Path, save_path: Path) -> list[str]:
    flags = {
        "verifier-name-or-path": str(PARITY / "verifier"),
        "data-path": str(data),
        "save-path": str(save_path),
        "d2t-path": str(PARITY / "d2t.npy"),
        "t2d-path": str(PARITY / "t2d.npy"),
        "total-seq-len": "112",
        "epochs": "1",
        "num-workers": "1",
        "log-every-steps": "1",
        "log-format": "json",
    }
    return [
        "python",
        "-m",
        "eagle3_ray",
        "train",
        *(word for name, value in flags.items() for word in (f"--{name}", value)),
    ]


def events_in(logs: str, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


RUNTIME_ENV = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}})


def test_a_job_that_fails_tells_the_commands_exit_code(head: Head, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = train_command(tmp_path / "empty", tmp_path / "run")
    ended = head.ray("job", "submit", "--submission-id=bad", "--working-dir=.", "--", *command, cwd=checkout)
    assert ended.returncode == 1, ended.stdout + ended.stderr  # Ray's CLI knows only 0 and 1; the job knows more
    info = head.get("/api/jobs/bad")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 3)
    (error,) = events_in(head.logs("bad"), "error")
    assert error["exit_code"] == 3 and "no .pt files" in error["message"]


def test_a_run_folder_that_would_go_with_the_job_is_refused(head: Head, checkout: Path, tmp_path: Path) -> None:
    command = train_command(tmp_path, Path("checkpoints"))  # relative to the copy that Ray makes
    head.ray("job", "submit", "--submission-id=relative", "--working-dir=.", "--", *command, cwd=checkout)
    assert head.get("/api/jobs/relative")["driver_exit_code"] == 2
    (error,) = events_in(head.logs("relative"), "error")
    assert error["message"].startswith("error: --save-path /") and "which Ray removes" in error["message"]


def test_a_job_that_is_stopped_saves_and_the_same_one_goes_on(
    head: Head, checkout: Path, data: Path, tmp_path: Path
) -> None:
    def submit(job_id: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = ["job", "submit", f"--submission-id={job_id}", "--working-dir=.", f"--runtime-env-json={RUNTIME_ENV}"]
        return head.ray(*words, *more, "--", *train_command(data, tmp_path / "run"), cwd=checkout)

    assert submit("first", "--no-wait").returncode == 0
    deadline = time.monotonic() + 400
    while not events_in(head.logs("first"), "progress"):
        assert time.monotonic() < deadline and head.get("/api/jobs/first")["status"] in ("PENDING", "RUNNING")
        time.sleep(0.2)
    assert head.ray("job", "stop", "first").returncode == 0
    assert head.get("/api/jobs/first")["status"] == "STOPPED"
    logs = head.logs("first")
    (stopped,) = events_in(logs, "stopped")
    step = events_in(logs, "checkpoint")[-1]["step"]
    assert stopped["message"].startswith(f"stopped by SIGTERM at step {step}; saved ") and stopped["exit_code"] == 143
    assert (tmp_path / "run" / f"step-{step:06d}" / "COMMITTED").exists() and not (tmp_path / "run" / "0").exists()
    ended = submit("second")
    assert ended.returncode == 0, ended.stdout
    logs = head.logs("second")
    assert [event["step"] for event in events_in(logs, "resume")] == [step]
    assert events_in(logs, "done") and (tmp_path / "run" / "0" / "COMMITTED").exists()
    assert "\r" not in logs and "Traceback" not in logs


# ------------------------------------------------------------------------------ joining by RAY_ADDRESS


def join(head: Head, data: Path, **changes: str | None) -> str:
    """What a command that joins the head complains of; `changes` are to its environment."""
    environment = head.environment | {"RAY_ADDRESS": head.address}
    for name, value in changes.items():
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
    words = ["vocab-mapping", "--data-path", str(data), "--target-vocab-size", "320", "--token-freq-path", "absent.pt"]
    ended = subprocess.run(
        [sys.executable, "-m", "eagle3_ray", *words],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=data,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert ended.returncode == 5, ended.stdout + ended.stderr
    (message,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith(f"error: RAY_ADDRESS={head.address}") and "Traceback" not in ended.stderr
    return message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RAY_AUTH_TOKEN": "another"}, "refuses the one of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": None}, "no token is found"),
        ({"RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}, "who send none (RAY_AUTH_MODE is not set)"),
    ],
    ids=["wrong", "missing", "mode not set"],
)
def test_a_token_that_is_wrong_or_missing_is_named_at_once(
    changes: dict[str, str | None], text: str, head: Head, data: Path
) -> None:
    message = join(head, data, **changes)
    assert text in message and "Set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN" in message


REWRITE_METADATA = """
import json, sys
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import InternalKVPutRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
request = InternalKVPutRequest(
    key=b"CLUSTER_METADATA", namespace=b"cluster", value=json.dumps(json.loads(sys.argv[2])).encode(), overwrite=True
)
with init_grpc_channel(sys.argv[1]) as channel:
    InternalKVGcsServiceStub(channel).InternalKVPut(request, timeout=30)
"""


def test_a_cluster_of_other_versions_is_refused_with_both(head: Head, data: Path) -> None:
    """Last in this file: from here on the head says that it is of other versions, which is all that Ray looks at."""
    metadata = {"ray_version": "2.40.0", "python_version": "3.9.1", "ray_init_cluster": False}
    command = [sys.executable, "-c", REWRITE_METADATA, head.address, json.dumps(metadata)]
    subprocess.run(command, env=head.environment, check=True, timeout=120)
    message = join(head, data)
    assert "the cluster runs Ray 2.40.0 on Python 3.9.1, this command Ray " in message
    assert f"on Python {'.'.join(map(str, sys.version_info[:3]))}. Use the image" in message
