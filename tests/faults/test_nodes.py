"""A second node that does not see what the driver sees: a raylet that lives in a mount namespace of its own."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import eagle3_ray
from eagle3_ray.errors import ClusterError
from eagle3_ray.jobs.train import run
from tests.makers import write_samples
from tests.runs import SHAPE, make_settings

pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="a mount namespace of its own needs unshare and root"
)
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def add_node() -> Iterator[Callable[[str], None]]:
    """Add a node to a cluster of one; before its raylet starts, a shell command changes what it sees."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes: list[subprocess.Popen[bytes]] = []

    def add(prepare: str) -> None:
        start = shlex.join([str(RAY), "start", f"--address={cluster.address}", "--num-cpus=2", "--block"])
        command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-ec"]
        nodes.append(subprocess.Popen([*command, f"{prepare}; exec {start}"], stdout=subprocess.DEVNULL))
        cluster.connect()
        deadline = 60
        for _ in range(deadline * 5):
            if sum(node["Alive"] for node in ray.nodes()) == 2:
                return
            time.sleep(0.2)
        pytest.fail(f"the second node has not joined within {deadline} s")

    try:
        yield add
    finally:
        ray.shutdown()
        for node in nodes:
            node.kill()
            node.wait()
        cluster.shutdown()


def test_a_node_that_does_not_share_the_save_path_is_named_before_anything_is_trained(
    add_node: Callable[[str], None], tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", [40, 61, 33, 52], **SHAPE)
    save_path = tmp_path / "run"
    save_path.mkdir()
    add_node(f"mount -t tmpfs tmpfs {shlex.quote(str(save_path))}")
    with pytest.raises(ClusterError, match="not every node can use all it needs") as raised:
        run(make_settings(tmp_path, num_workers=2))
    assert f"--save-path: {save_path} is not the folder that the driver sees there." in str(raised.value)
    assert [path.name for path in save_path.iterdir()] == ["run.lock"]


def test_a_node_with_another_release_is_named_before_anything_is_trained(
    add_node: Callable[[str], None], tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", [40, 61, 33, 52], **SHAPE)
    ours = Path(eagle3_ray.__file__)
    other = tmp_path / "older.py"
    other.write_text(ours.read_text().replace(f'"{eagle3_ray.__version__}"', '"0.0.1"'))
    add_node(shlex.join(["mount", "--bind", str(other), str(ours)]))
    with pytest.raises(ClusterError, match=f"eagle3_ray is 0.0.1 on .*, {eagle3_ray.__version__} here"):
        run(make_settings(tmp_path, num_workers=2))
