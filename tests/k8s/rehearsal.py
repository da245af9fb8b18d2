"""The smoke overlay's jobs, run by the commands that KubeRay would run, in two pods of `pod.sh` and without an image.

    python -m tests.k8s.rehearsal FOLDER    in an outer `unshare`, see `test_operator_commands.py`

Prints what happened as one JSON object. The claims are folders in FOLDER; the token is a new one.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.k8s import operator
from tests.k8s.manifests import REPOSITORY, Manifest, PodGroup, of_kind, pod_groups, render
from tests.makers import write_samples

POD = str(Path(__file__).with_name("pod.sh"))
OVERLAY = REPOSITORY / "k8s" / "overlays" / "smoke"
VERIFIER = REPOSITORY / "tests" / "parity" / "small" / "verifier"
ADDRESSES = {"head": "10.77.0.1", "workers": "10.77.0.2"}
SAMPLES = [90, 120, 70, 110, 100, 80] * 8
SHAPE = {"hidden_size": 64, "vocab_size": 320}
# Programs and libraries, for which an image would stand.
MACHINE = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/sys", "/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl"]
TIMEOUT_S = 600.0
ALL_WORDS = r"cat /proc/[0-9]*/cmdline | tr '\0' '\n'"
SUPERVISORS = "$(grep -lz '^ray::.*JobSupervisor' /proc/[0-9]*/cmdline | sed 's/cmdline/environ/')"
CPUS_OF_NODES = """
import ray
ray.init(log_to_driver=False)
print(sorted(node["Resources"].get("CPU", 0) for node in ray.nodes()))
"""


class Pod:
    """A pod of one group, its container started again when it ends, as the kubelet does."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        self._words, self._log = words, log
        self.environment = environment
        self.is_restarted = True
        self.process = self._start()
        threading.Thread(target=self._keep_running, daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._words, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def _keep_running(self) -> None:
        # Ray's services give up after 30 s on a machine that is busy; on a cluster it is no different.
        while self.process.wait() and self.is_restarted:
            self.process = self._start()

    def run(self, *words: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run another command in it, as `kubectl exec` does."""
        return subprocess.run(
            [POD, "exec", str(self.process.pid), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def is_healthy(self) -> bool:
        """Probe it as the kubelet does: without a token."""
        return self.get(operator.HEALTH_PATH, operator.AGENT_PORT, None)[0] == 200

    def get(self, path: str, port: int, token: str | None, body: Any = None) -> tuple[int, str]:
        """Ask a pod over its network from here, which is another machine to it."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["x-ray-authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.environment['POD_IP']}:{port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)


class Rehearsal:
    """The machine around the pods: claims, token, mounts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(32)
        self.manifests = render(OVERLAY)
        for name in ("data", "checkpoints", "settings"):
            (folder / name).mkdir()
            (folder / name).chmod(0o777)
        (folder / "passwd").write_text("ray:x:1000:1000::/home/ray:/bin/bash\n")
        for file, text in of_kind(self.manifests, "ConfigMap")[0]["data"].items():
            (folder / "settings" / file).write_text(text)
        write_samples(folder / "data" / "samples", SAMPLES, **SHAPE)
        (folder / "data" / "samples").chmod(0o777)  # fsGroup makes claims writable
        shutil.copytree(VERIFIER, folder / "data" / "demo" / "verifier")

    def job(self, name: str) -> Manifest:
        """Return a RayJob of the overlay."""
        return next(job for job in of_kind(self.manifests, "RayJob") if job["metadata"]["name"] == name)

    def start(self, group: PodGroup, command: operator.Command, name: str | None = None) -> Pod:
        """Start a pod of a group with the volumes that its manifest mounts."""
        name = name or group.name
        mounts = self.folder / f"{name}.mounts"
        mounts.write_text("\n".join([*self._machine(), *self._volumes(group)]) + "\n")
        environment = {
            **command.environment,
            **{"HOME": "/home/ray", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            **{"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
            **{"PYTHONUNBUFFERED": "1", "POD_IP": ADDRESSES[group.name]},
        }
        words = [POD, "start", name, ADDRESSES[group.name], str(mounts), *command.words]
        return Pod(words, environment, self.folder / f"{name}.log")

    def _machine(self) -> list[str]:
        venv = Path(sys.executable).parent.parent
        folders = {*MACHINE, sys.base_prefix, str(venv), str(venv.resolve()), str(REPOSITORY)}
        found = sorted(folder for folder in folders if Path(folder).exists())
        return ["rw /dev /dev", *(f"ro {folder} {folder}" for folder in found), f"ro {self.folder}/passwd /etc/passwd"]

    def _volumes(self, group: PodGroup) -> list[str]:
        """Return the manifest's mounts; /dev/shm is the operator's."""
        volumes = {volume["name"]: volume for volume in group.pod["volumes"]}
        lines = ["tmp /dev/shm"]
        for mount in group.container["volumeMounts"]:
            volume, target = volumes[mount["name"]], mount["mountPath"]
            if "emptyDir" in volume:
                lines.append(f"tmp {target}")
            elif "configMap" in volume:
                lines.append(f"ro {self.folder}/settings {target}")
            else:
                lines.append(f"rw {self.folder}/{mount['name']} {target}")
        return lines


def wait_until(what: str, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Return the condition's value as soon as it is true.

    Raises:
        TimeoutError: It stayed false.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.5)
    raise TimeoutError(f"waited {timeout_s:.0f} s in vain: {what}")


def status_of(head: Pod, token: str, job_id: str) -> str:
    """Return a job's status as the operator reads it."""
    code, text = head.get(f"/api/jobs/{job_id}", operator.DASHBOARD_PORT, token)
    return str(json.loads(text)["status"]) if code == 200 else str(code)


def submit(head: Pod, token: str, body: dict[str, Any]) -> None:
    """Submit as HTTPMode does: the job is unknown, so it is posted."""
    assert status_of(head, token, body["submission_id"]) == "404"
    code, text = head.get("/api/jobs/", operator.DASHBOARD_PORT, token, body)
    assert code == 200, text


def run(folder: Path) -> dict[str, Any]:
    """Go through the story and return what happened."""
    stage = Rehearsal(folder)
    job = stage.job("eagle3-vocab-mapping")
    head_group, worker_group = pod_groups(job)
    facts: dict[str, Any] = {}

    head = stage.start(head_group, operator.head_command(job, stage.token))
    wait_until("the head is healthy", head.is_healthy)
    waiting = stage.start(worker_group, operator.wait_command(worker_group, ADDRESSES["head"], stage.token), "waiting")
    facts["wait_for_gcs"] = [waiting.process.wait(TIMEOUT_S), (folder / "waiting.log").read_text()]
    # The same pod's address: two interfaces that claim it would answer by turns.
    subprocess.run(["ip", "netns", "delete", "waiting"], check=True)
    worker = stage.start(worker_group, operator.worker_command(worker_group, ADDRESSES["head"], stage.token))
    wait_until("the worker is healthy", worker.is_healthy)
    facts["user"] = head.run("id", "-u").stdout.strip()
    facts["writing_to_the_root"] = head.run("touch", "/workspace/a").stderr
    cpus = head.run("python", "-c", CPUS_OF_NODES)
    facts["cpus"] = cpus.stdout or cpus.stderr

    body = operator.submission(job)
    facts["without_token"] = head.get("/api/jobs/", operator.DASHBOARD_PORT, None, body)
    facts["wrong_token"] = head.get("/api/jobs/", operator.DASHBOARD_PORT, "0" * 64, body)
    submit(head, stage.token, body)
    ended = wait_until("vocab-mapping ends", lambda: _ended(head, stage.token, body["submission_id"]))
    facts["vocab_mapping"] = [ended, head.run("ray", "job", "logs", body["submission_id"]).stdout]

    submitter = operator.submitter_command(job, "again", f"http://{ADDRESSES['head']}:8265", stage.token)
    head.environment |= submitter.environment
    again = head.run(*submitter.words)
    facts["submitter"] = [again.returncode, again.stdout + again.stderr]
    facts["stopped_pods"] = stop_while_training(stage, head, worker)
    return facts


def _ended(head: Pod, token: str, job_id: str) -> str | None:
    status = status_of(head, token, job_id)
    return status if status in ("SUCCEEDED", "FAILED", "STOPPED") else None


def stop_while_training(stage: Rehearsal, head: Pod, worker: Pod) -> dict[str, Any]:
    """Train, and stop both pods in the middle as Kubernetes does: preStop first, in both at once."""
    job = stage.job("eagle3-train")
    body = operator.submission(job)
    body["entrypoint"] += " --epochs 500 --checkpoint-every-steps 2"
    submit(head, stage.token, body)
    try:
        wait_until("a checkpoint", lambda: list((stage.folder / "checkpoints").glob("smoke/*/COMMITTED")))
    except TimeoutError as error:
        log = head.run("ray", "job", "logs", body["submission_id"]).stdout
        raise TimeoutError(f"{error}; {status_of(head, stage.token, body['submission_id'])}: {log}") from error
    supervisor = head.run("/bin/bash", "-c", f"grep -lz ^RAY_JOB_STOP_WAIT_TIME_S=240 {SUPERVISORS}").stdout
    head.is_restarted = worker.is_restarted = False
    hooks = [
        subprocess.Popen(
            [POD, "exec", str(pod.process.pid), *group.container["lifecycle"]["preStop"]["exec"]["command"]],
            env=pod.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for pod, group in zip((worker, head), reversed(list(pod_groups(job))), strict=True)
    ]
    codes = [hook.wait(TIMEOUT_S) for hook in hooks]
    ended = wait_until("train ends", lambda: _ended(head, stage.token, body["submission_id"]), 30)
    left = worker.run("/bin/bash", "-c", f"{ALL_WORDS} | grep -c '^ray::RayTrainWorker'").stdout
    log = head.run("ray", "job", "logs", body["submission_id"]).stdout
    return {"supervisor": supervisor, "hooks": codes, "status": ended, "ranks_left": int(left), "log": log}


def main() -> None:
    """Run in the folder that is named and print the facts."""
    # Named network namespaces are files there; this mount is ours alone.
    subprocess.run(["mount", "-t", "tmpfs", "run", "/run"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "link", "add", "pods", "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "10.77.0.100/24", "dev", "pods"], check=True)
    subprocess.run(["ip", "link", "set", "pods", "up"], check=True)
    os.environ.pop("http_proxy", None)
    print(json.dumps(run(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
