"""What KubeRay 1.7's operator makes of a RayJob: the containers' commands and variables, and the submission.

Written down from the operator's sources (`controllers/ray/common/pod.go`, `job.go`, `utils/dashboardclient`), so that
tests can run the same commands without a cluster. Left out is what only a cluster has: names of services, probes'
timing, labels.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from tests.k8s.manifests import Manifest, PodGroup, pod_groups

GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = 6379, 8265, 52365, 8080
# Of both probes for Ray 2.53 and newer, on the agent's port; the kubelet sends no token.
HEALTH_PATH = "/api/healthz"
SHELL = ["/bin/bash", "-c", "--"]
NO_SWITCH = ("log-color", "include-dashboard")  # options that take the words true and false

WAIT_FOR_GCS = """
SECONDS=0
while true; do
    if (( SECONDS <= 120 )); then
        if ray health-check --address {head}:{port} > /dev/null 2>&1; then
            echo "GCS is ready."
            break
        fi
        echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
    else
        if ray health-check --address {head}:{port}; then
            echo "GCS is ready. Any error messages above can be safely ignored."
            break
        fi
        echo "$SECONDS seconds elapsed: Still waiting for GCS to be ready."
    fi
    sleep 5
done
"""


@dataclass(frozen=True)
class Command:
    """A container's command line with the variables that are set for it."""

    words: list[str]
    environment: dict[str, str]


def head_command(job: Manifest, token: str) -> Command:
    """Return what the head's container runs."""
    group = next(pod_groups(job))
    params = {"dashboard-host": "0.0.0.0", **group.spec.get("rayStartParams", {})}
    return Command(
        [*SHELL, f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start --head {_flags(group, params)}"],
        _environment(group, "127.0.0.1", token),
    )


def wait_command(group: PodGroup, head: str, token: str) -> Command:
    """Return what the init container wait-gcs-ready of a worker runs."""
    environment = group.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "FQ_RAY_IP": head}
    return Command([*SHELL, WAIT_FOR_GCS.format(head=head, port=GCS_PORT)], environment)


def worker_command(group: PodGroup, head: str, token: str) -> Command:
    """Return what a worker's container runs; `head` is the head's service."""
    params = {"address": f"{head}:{GCS_PORT}", **group.spec.get("rayStartParams", {})}
    return Command(
        [*SHELL, f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {_flags(group, params)}"],
        _environment(group, head, token) | {"FQ_RAY_IP": head},
    )


def _flags(group: PodGroup, params: dict[str, str]) -> str:
    """Return `ray start`'s flags: what the manifest says, and what the operator fills in from the limits."""
    filled = {"metrics-export-port": str(METRICS_PORT), "dashboard-agent-listen-port": str(AGENT_PORT), **params}
    filled["block"] = "true"
    filled.setdefault("num-cpus", str(math.ceil(group.amount("cpu"))))
    filled.setdefault("memory", str(int(group.amount("memory"))))
    if group.amount("nvidia.com/gpu"):
        filled.setdefault("num-gpus", str(int(group.amount("nvidia.com/gpu"))))
    flags = []
    for option, value in sorted(filled.items()):
        if value.lower() not in ("true", "false") or option in NO_SWITCH:
            flags.append(f"--{option}={value}")
        elif value.lower() == "true":
            flags.append(f"--{option}")
    return " ".join(flags)


def _environment(group: PodGroup, head: str, token: str) -> dict[str, str]:
    added = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_PORT": str(GCS_PORT),
        "RAY_ADDRESS": f"{head}:{GCS_PORT}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    return added | group.environment


def submission(job: Manifest) -> dict[str, Any]:
    """Return the body that HTTPMode posts to /api/jobs/, with the header `x-ray-authorization: Bearer TOKEN`."""
    spec = job["spec"]
    assert not {"runtimeEnvYAML", "entrypointNumCpus", "entrypointResources"} & spec.keys(), "not written down here"
    body = {"entrypoint": spec["entrypoint"], "submission_id": spec["jobId"]}
    return body | ({"metadata": spec["metadata"]} if "metadata" in spec else {})


def submitter_command(job: Manifest, job_id: str, dashboard: str, token: str) -> Command:
    """Return what K8sJobMode's submitter runs once the dashboard answers; `bash -e`, as in its pod."""
    spec = job["spec"]
    metadata = ["--metadata-json", json.dumps(json.dumps(spec["metadata"]))] if spec.get("metadata") else []
    address = ["--address", dashboard]
    words = ["if", "!", "ray", "job", "status", *address, job_id, ">/dev/null", "2>&1", ";", "then"]
    words += ["ray", "job", "submit", *address, "--no-wait", *metadata, "--submission-id", job_id]
    words += ["--", spec["entrypoint"].strip(), ";", "fi", ";", "ray", "job", "logs", *address, "--follow", job_id]
    environment = {"PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return Command(["/bin/bash", "-ce", "--", " ".join(words)], environment)
