"""A node that Ray is told will go, and then goes: three raylets on this machine, and the real `train` on them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from eagle3_ray.jobs.train import run
from eagle3_ray.training.run_folder import INITIAL_METRICS
from tests.makers import write_samples
from tests.runs import SHAPE, ThreadedRun, assert_same_run, descendants, make_settings

LENGTHS = [40, 61, 33, 52, 70, 28, 45, 39, 64, 50, 36, 58] * 144  # some two hundred steps
PREEMPTION = 2  # of Ray's reasons to drain a node: it will be taken away, whatever runs on it


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head for two workers, so that a third has to go elsewhere."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # a Ray of its own has none
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        made.connect()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def drain(node_id: str) -> None:
    """What a cloud's notice becomes: the node goes in half a minute."""
    deadline_ms = int((time.time() + 30) * 1000)
    client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    is_accepted, reason = client.drain_node(node_id, PREEMPTION, "spot instance", deadline_ms)
    assert is_accepted, reason


def test_the_ranks_save_before_their_node_goes_and_go_on_bit_for_bit(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    for folder in (calm, hit):
        write_samples(folder / "data", LENGTHS, **SHAPE)
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    # One epoch: where one ends, its own checkpoint would stand for the one that the notice asks for, or replace it.
    run(make_settings(calm, num_workers=3, bins_per_step=3, epochs=1))
    # Ray Train counts it as a failure if it hears of the lost worker before it hears of the lost node.
    training = ThreadedRun(make_settings(hit, num_workers=3, bins_per_step=3, epochs=1, max_failures=1))
    training.wait_for((hit / "run" / INITIAL_METRICS).exists, "the untrained draft's validation")
    # A notice that comes before Ray Train's watcher is up is seen by it all the same, but this run is short.
    training.wait_for(lambda: "ray::PreemptionWatcher" in descendants(os.getpid()).values(), "Ray Train's watcher")
    drain(node.node_id)
    training.wait_for(lambda: any((hit / "run").glob("step-*/COMMITTED")), "a checkpoint")
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2)
    assert training.join() == []
    assert_same_run(hit, calm, tmp_path, name="0")
    told = [line for line in capsys.readouterr().out.splitlines() if "about to be taken away" in line]
    assert len(told) == 1 and "the node of rank" in told[0] and "saving after this step" in told[0]
