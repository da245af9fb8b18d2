"""Containers of one image, through the command line of Docker or podman; and two of them as a Ray cluster."""

import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# As docker/README.md tells users to run it: nothing of the image can be written, no right is left.
HARDENED = (
    "--read-only",
    "--tmpfs=/tmp:mode=1777,exec",
    "--tmpfs=/home/ray:mode=1777",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--shm-size=512m",
)
OBJECT_STORE = "--object-store-memory=300000000"


def find_engine() -> list[str] | None:
    """Return how the container engine of this machine is called, or None."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return ["docker"]
    if shutil.which("podman"):
        # Debian 12's crun fails on hosts with the first version of control groups.
        return ["podman", *(["--runtime=runc"] if shutil.which("runc") else [])]
    return None


@dataclass(frozen=True)
class Finished:
    """A container that ran to its end.

    Attributes:
        exit_code: that of its program.
        output: stdout and stderr as they came.
    """

    exit_code: int
    output: str = field(repr=False)


class Containers:
    """Runs containers of an image; removes every one that is left when it is closed."""

    def __init__(self, engine: list[str], image: str, data_dir: Path) -> None:
        self._engine = engine
        self._image = image
        self._data_dir = data_dir  # /data in every container
        self._names: list[str] = []
        # podman sets limits of its own, and starts nothing where the machine's are lower.
        limits = ("--ulimit=nofile=16384:16384", "--ulimit=nproc=16384:16384")
        self._at_once = ("--time=0",) if engine[0] == "podman" else ()  # podman's `rm` first asks, Docker's kills
        self._options = (*HARDENED, *(limits if engine[0] == "podman" else ()))

    def run(self, *words: str, options: Sequence[str] = (), timeout_s: float = 120) -> Finished:
        """Run a container to its end."""
        return self.wait(self.start(*words, options=options), timeout_s)

    def start(self, *words: str, options: Sequence[str] = ()) -> str:
        """Start a container and return its name."""
        name = f"eagle3-test-{secrets.token_hex(4)}"
        self._names.append(name)
        mount = f"--volume={self._data_dir}:/data"
        self.call("run", "--detach", f"--name={name}", *self._options, mount, *options, self._image, *words)
        return name

    def wait(self, name: str, timeout_s: float) -> Finished:
        """Wait for a container's end and remove it."""
        try:
            exit_code = self.call("wait", name, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.logs(name)}") from None
        finished = Finished(int(exit_code), self.logs(name))
        self.remove(name)
        return finished

    def exec(self, name: str, *words: str) -> str:
        """Run a program in a running container and return what it printed."""
        return self.call("exec", name, *words)

    def ask(self, name: str, *words: str) -> str:
        """Return what a program prints in a container that may not be up yet, or not be well; nothing if it fails."""
        try:
            return self.exec(name, *words)
        except AssertionError:
            return ""

    def logs(self, name: str) -> str:
        """Return what a container has printed so far."""
        return subprocess.run(
            [*self._engine, "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout

    def remove(self, name: str) -> None:
        """Remove a container that is left; if it runs it is killed, without the chance to say goodbye."""
        if name not in self._names:
            return
        self.call("rm", "--force", *self._at_once, name)
        self._names.remove(name)

    def image_bytes(self) -> int:
        """Return the image's size, unpacked."""
        return int(self.call("image", "inspect", "--format={{.Size}}", self._image))

    def call(self, *words: str, timeout_s: float = 60) -> str:
        """Run a command of the engine and return what it printed on stdout."""
        done = subprocess.run([*self._engine, *words], capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words[0]}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def close(self) -> None:
        """Remove every container that is left."""
        for name in list(self._names):
            self.remove(name)


class Cluster:
    """Containers as the nodes of a Ray cluster that wants a token, on a network that leads nowhere else.

    Two ranks get two CPUs each, and no node has room for both: they sit on two nodes. One CPU feeds them. They compute
    with one thread each all the same, as on one host, so that sums have one order everywhere.
    """

    HEAD_CPUS, WORKER_CPUS = 3, 2

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self.network = f"eagle3-test-{secrets.token_hex(4)}"
        subnet = f"10.79.{secrets.randbelow(256)}"
        self.head_ip, self._worker_ip = f"{subnet}.10", f"{subnet}.11"
        self._token = secrets.token_hex(32)
        self.head = self.worker = ""
        containers.call("network", "create", "--internal", f"--subnet={subnet}.0/24", self.network)

    def start_head(self) -> None:
        """Start the head node and wait until it is well."""
        words = ("--head", f"--node-ip-address={self.head_ip}", "--dashboard-host=0.0.0.0")
        self.head = self._start_node(self.head_ip, self.HEAD_CPUS, *words)

    def start_worker(self) -> None:
        """Start the other node and wait until it is well."""
        words = (f"--address={self.head_ip}:6379", f"--node-ip-address={self._worker_ip}")
        self.worker = self._start_node(self._worker_ip, self.WORKER_CPUS, *words)

    def start_submit(self, *words: str, options: Sequence[str] = ()) -> str:
        """Start a container that submits a job, follows it and ends as it does; return the container's name."""
        options = (f"--network={self.network}", f"--env=RAY_AUTH_TOKEN={self._token}", *options)
        address = f"http://{self.head_ip}:8265"
        return self._containers.start("ray", "job", "submit", f"--address={address}", "--", *words, options=options)

    def submit(self, *words: str, timeout_s: float) -> Finished:
        """Submit a job and wait for its end."""
        return self._containers.wait(self.start_submit(*words), timeout_s)

    def nodes_of_train_workers(self) -> list[str]:
        """Return the node of each rank that was ever started on this cluster, dead ones too."""
        listed = self._containers.exec(
            self.head, "ray", "list", "actors", "--filter=class_name=RayTrainWorker", "--format=json", "--limit=1000"
        )
        return [actor["node_id"] for actor in json.loads(listed)]

    def close(self) -> None:
        """Remove the nodes, what else was started and is left, and the network."""
        self._containers.close()
        self._containers.call("network", "rm", "--force", self.network)

    def _start_node(self, address: str, num_cpus: int, *words: str) -> str:
        options = (
            f"--network={self.network}",
            f"--ip={address}",
            f"--env=RAY_AUTH_TOKEN={self._token}",
            "--env=OMP_NUM_THREADS=1",
        )
        node = self._containers.start(
            "ray", "start", *words, f"--num-cpus={num_cpus}", OBJECT_STORE, "--block", options=options
        )
        probe = (
            "wget",
            "--quiet",
            "--timeout=5",
            "--tries=1",
            "--output-document=-",
            "http://127.0.0.1:52365/api/healthz",
        )

        wait_until(
            lambda: "success" in self._containers.ask(node, *probe),
            300,
            lambda: f"the node is not well:\n{self._containers.logs(node)}",
        )
        return node


def wait_until(is_so: Callable[[], bool], timeout_s: float, describe: Callable[[], str]) -> None:
    """Ask until it is so.

    Raises:
        AssertionError: It took longer; the text is what `describe` returns.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.5)


def committed_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's whole checkpoints, oldest first; `best` is one of them again."""
    markers = [path for path in run_dir.glob("*/COMMITTED") if not path.parent.is_symlink()]
    return sorted(json.loads(path.read_text())["step"] for path in markers)


def last_metrics(run_dir: Path) -> dict[str, float]:
    """Return what validation measured at a run's newest checkpoint."""
    records = [json.loads((path.parent / "run.json").read_text()) for path in run_dir.glob("*/COMMITTED")]
    newest = max(records, key=lambda record: int(record["step"]))
    return {name: value for name, value in newest["metrics"].items() if name.startswith("val/")}
