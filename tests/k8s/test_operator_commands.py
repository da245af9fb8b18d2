"""The commands that KubeRay makes of the smoke overlay do what they should, run in namespaces in place of pods."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.k8s import operator
from tests.k8s.manifests import REPOSITORY, of_kind, pod_groups, render

TOOLS = ("kubectl", "unshare", "nsenter", "setpriv", "ip")
PRIVATE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def _cannot_run() -> str | None:
    """Return why pods cannot be played here."""
    if "EAGLE3_REHEARSAL" not in os.environ:
        return "`make k8s-rehearsal` runs it; it takes minutes"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)}: not here"
    if os.geteuid() != 0 or subprocess.run([*PRIVATE, "true"], capture_output=True, check=False).returncode:
        return "namespaces of its own need root and CAP_SYS_ADMIN"
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rehearsal's folder: the claims, and what the pods print."""
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    """What happened when the smoke overlay's jobs were run."""
    reason = _cannot_run()
    if reason is not None:
        pytest.skip(reason)
    run = subprocess.run(
        [*PRIVATE, sys.executable, "-m", "tests.k8s.rehearsal", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
    assert run.returncode == 0, f"{run.stderr}\n{logs}"
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_pods_run_without_rights_on_a_root_they_cannot_write_to(facts: dict[str, Any]) -> None:
    assert facts["user"] == "1000"
    assert "Read-only file system" in facts["writing_to_the_root"]


@pytest.mark.slow
def test_a_worker_waits_until_the_head_is_ready(facts: dict[str, Any]) -> None:
    code, log = facts["wait_for_gcs"]
    assert code == 0
    assert "GCS is ready." in log


@pytest.mark.slow
def test_only_the_workers_have_cpus(facts: dict[str, Any]) -> None:
    assert facts["cpus"].strip() == "[0, 3.0]"


@pytest.mark.slow
def test_a_submission_without_the_right_token_is_refused(facts: dict[str, Any]) -> None:
    assert [facts["without_token"][0], facts["wrong_token"][0]] == [401, 403]


@pytest.mark.slow
def test_a_job_submitted_over_http_writes_to_the_claim(facts: dict[str, Any], folder: Path) -> None:
    status, log = facts["vocab_mapping"]
    assert status == "SUCCEEDED", log
    assert "wrote         /data/vocab/d2t.npy, /data/vocab/t2d.npy" in log
    # Both sides of the mapping agree: draft id + offset is the verifier's id, and exactly those are kept.
    offsets, kept = (np.load(folder / "data" / "vocab" / name) for name in ("d2t.npy", "t2d.npy"))
    assert np.array_equal(np.arange(len(offsets)) + offsets, np.flatnonzero(kept))
    assert len(offsets) == 320


@pytest.mark.slow
def test_the_submitter_of_the_other_mode_follows_the_job_to_its_end(facts: dict[str, Any]) -> None:
    code, log = facts["submitter"]
    assert code == 0, log
    assert "wrote         /data/vocab/d2t.npy, /data/vocab/t2d.npy" in log


@pytest.mark.slow
def test_pods_that_are_stopped_wait_for_the_driver_to_end(facts: dict[str, Any]) -> None:
    stopped = facts["stopped_pods"]
    assert stopped["hooks"] == [0, 0]
    assert stopped["ranks_left"] == 0
    # Not STOPPED, which the operator takes for complete: a failed job is tried again and goes on.
    assert stopped["status"] == "FAILED", stopped["log"]


@pytest.mark.slow
def test_ray_leaves_a_stopped_driver_time_to_save(facts: dict[str, Any]) -> None:
    # Ray reads the variable in the process that starts the driver; without it the driver is killed after 3 s.
    assert facts["stopped_pods"]["supervisor"].startswith("/proc/")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests; it is not here")
def test_limits_become_flags_of_ray_start() -> None:
    job = next(
        job
        for job in of_kind(render(REPOSITORY / "k8s" / "overlays" / "multi-node"), "RayJob")
        if job["metadata"]["name"] == "eagle3-train"
    )
    head, workers = pod_groups(job)
    assert (
        operator.head_command(job, "t")
        .words[-1]
        .endswith(
            "; ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0 "
            "--memory=8589934592 --metrics-export-port=8080 --num-cpus=0"
        )
    )
    command = operator.worker_command(workers, "head-svc", "t")
    assert command.words[-1].endswith(
        "; ray start --address=head-svc:6379 --block --dashboard-agent-listen-port=52365 "
        "--memory=274877906944 --metrics-export-port=8080 --num-cpus=32 --num-gpus=8"
    )
    assert command.environment["RAY_AUTH_TOKEN"] == "t"
    assert head.name == "head"
