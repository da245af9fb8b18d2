"""A cluster that loses a node and gets another one: three raylets on this machine, and the real `train` on them."""

import json
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from eagle3_ray.jobs import fit
from tests.makers import write_samples
from tests.runs import SHAPE, ThreadedRun, make_settings, read_metrics

LENGTHS = [40, 61, 33, 52, 70, 28, 45, 39, 64, 50, 36, 58] * 12  # 17 steps an epoch
EPOCHS = 8


def num_workers_of(checkpoint: Path) -> int:
    record = json.loads((checkpoint / "run.json").read_text())
    assert isinstance(record["num_workers"], int)
    return record["num_workers"]


def test_a_run_goes_on_with_fewer_workers_and_takes_back_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "ELASTIC_RESIZE_S", 2.0)
    # Ray takes a lost node's CPUs for free for a while, and waits so long for workers there before it looks anew.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    for folder in (calm, hit):
        write_samples(folder / "data", LENGTHS, **SHAPE)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.connect()
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        training = ThreadedRun(
            make_settings(
                hit, num_workers="1:3", bins_per_step=3, epochs=EPOCHS, max_failures=2, checkpoint_every_steps=5
            )
        )
        run_folder = hit / "run"

        def has_saved_with(num_workers: int) -> bool:
            return any(num_workers_of(done.parent) == num_workers for done in run_folder.glob("*/COMMITTED"))

        training.wait_for(lambda: has_saved_with(3), "a checkpoint of three workers")
        cluster.remove_node(node, allow_graceful=False)
        training.wait_for(lambda: has_saved_with(2), "one of two")
        num_steps = max(read_step(done.parent) for done in run_folder.glob("*/COMMITTED"))
        cluster.add_node(num_cpus=1)
        training.wait_for(
            lambda: any(
                num_workers_of(done.parent) == 3 and read_step(done.parent) > num_steps
                for done in run_folder.glob("*/COMMITTED")
            ),
            "one of three again",
        )
        assert training.join() == []
        training = ThreadedRun(make_settings(calm, num_workers=1, bins_per_step=3, epochs=EPOCHS))
        assert training.join() == []
    finally:
        ray.shutdown()
        cluster.shutdown()
    last = str(EPOCHS - 1)
    found, expected = read_metrics(run_folder / last), read_metrics(calm / "run" / last)
    for name in ("val/loss", "val/loss_0", "val/loss_2"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def read_step(checkpoint: Path) -> int:
    step = json.loads((checkpoint / "run.json").read_text())["step"]
    assert isinstance(step, int)
    return step
