"""What KubeRay's operator makes of the smoke overlay (head, init container, worker, submitter) runs in the image."""

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.containers.engine import Containers, Finished, wait_until
from tests.k8s import operator
from tests.k8s.manifests import REPOSITORY, of_kind, pod_groups, render

OVERLAY = REPOSITORY / "k8s" / "overlays" / "smoke"
# KubeRay mounts as much as the pod may use; Ray takes 30 % of the machine's memory for its objects.
SHARED_MEMORY = "--shm-size=16g"


@dataclass(frozen=True)
class Ended:
    """What the containers that ran to their end have said."""

    wait_for_gcs: Finished
    submitter: Finished


@pytest.fixture(scope="module")
def ended(containers: Containers, data_dir: Path, one_host: Finished) -> Iterator[Ended]:
    """The operator's commands, one after the other, each in a container of the image; the pods run till the end."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders the manifests; it is not here")
    manifests = render(OVERLAY)
    job = next(j for j in of_kind(manifests, "RayJob") if j["metadata"]["name"] == "eagle3-vocab-mapping")
    _, workers = pod_groups(job)
    settings = data_dir / "settings"
    settings.mkdir()
    for name, text in of_kind(manifests, "ConfigMap")[0]["data"].items():
        (settings / name).write_text(text)
    (data_dir / "demo").symlink_to("one")
    (data_dir / "samples").symlink_to("one/data")

    token, network = secrets.token_hex(32), f"eagle3-test-{secrets.token_hex(4)}"
    subnet = f"10.78.{secrets.randbelow(256)}"
    head_ip, worker_ip = f"{subnet}.10", f"{subnet}.11"
    containers.call("network", "create", "--internal", f"--subnet={subnet}.0/24", network)

    def start(command: operator.Command, address: str) -> str:
        variables = [f"--env={name}={value}" for name, value in command.environment.items()]
        place = [f"--network={network}", f"--ip={address}", f"--volume={settings}:/etc/eagle3:ro", SHARED_MEMORY]
        shell, *words = command.words
        return containers.start(*words, options=[f"--entrypoint={shell}", *place, *variables])

    def wait_for(pod: str) -> None:
        probe = ("wget", "-q", "-O-", "-T5", "-t1", f"http://127.0.0.1:{operator.AGENT_PORT}{operator.HEALTH_PATH}")
        wait_until(lambda: "success" in containers.ask(pod, *probe), 300, lambda: containers.logs(pod))

    try:
        wait_for(start(operator.head_command(job, token), head_ip))
        init = start(operator.wait_command(workers, head_ip, token), worker_ip)
        wait_for_gcs = containers.wait(init, 300)
        wait_for(start(operator.worker_command(workers, head_ip, token), worker_ip))
        submitter = operator.submitter_command(job, "vocab", f"http://{head_ip}:{operator.DASHBOARD_PORT}", token)
        yield Ended(wait_for_gcs, containers.wait(start(submitter, f"{subnet}.12"), 300))
    finally:
        containers.close()
        containers.call("network", "rm", "--force", network)


def test_a_worker_pod_waits_for_the_head_and_finds_it(ended: Ended) -> None:
    assert ended.wait_for_gcs.exit_code == 0 and "GCS is ready." in ended.wait_for_gcs.output


def test_the_submitted_entrypoint_runs_with_the_settings_of_the_config_map(ended: Ended, data_dir: Path) -> None:
    assert ended.submitter.exit_code == 0, ended.submitter.output
    assert "wrote         /data/vocab/d2t.npy, /data/vocab/t2d.npy" in ended.submitter.output, ended.submitter.output
    offsets, kept = (np.load(data_dir / "vocab" / name) for name in ("d2t.npy", "t2d.npy"))
    assert np.array_equal(np.arange(len(offsets)) + offsets, np.flatnonzero(kept)) and len(offsets) == 320
