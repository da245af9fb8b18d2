"""Two containers as a Ray cluster under a token: submitted jobs train across both, and survive the loss of one."""

from pathlib import Path

import pytest

from tests.containers.engine import Cluster, Containers, Finished, committed_steps, last_metrics, wait_until

JOB_TIMEOUT_S = 900
STEPS_BETWEEN_CHECKPOINTS = 5


@pytest.fixture(scope="module")
def two_hosts(containers: Containers, cluster: Cluster, one_host: Finished) -> Finished:
    """The short demo as a job of the cluster, under /data/two; verifier and conversations are the other demo's."""
    copied = containers.run("bash", "-c", "mkdir /data/two && cp -r /data/one/{verifier,conversations.jsonl} /data/two")
    assert copied.exit_code == 0, copied.output
    finished = cluster.submit("eagle3-ray", "demo", "--short", "--output-path", "/data/two", timeout_s=JOB_TIMEOUT_S)
    assert finished.exit_code == 0, finished.output
    return finished


def test_the_demo_trains_across_two_containers(cluster: Cluster, two_hosts: Finished) -> None:
    assert "draft     /data/two/run/best -> 2" in two_hosts.output, two_hosts.output
    nodes = cluster.nodes_of_train_workers()
    assert len(nodes) == 2 and len(set(nodes)) == 2


@pytest.mark.usefixtures("one_host", "two_hosts")
def test_two_hosts_learn_what_one_host_learns(data_dir: Path) -> None:
    one, two = last_metrics(data_dir / "one" / "run"), last_metrics(data_dir / "two" / "run")
    assert committed_steps(data_dir / "one" / "run") == committed_steps(data_dir / "two" / "run")
    assert "val/loss" in one and two == one


@pytest.mark.usefixtures("two_hosts")
def test_a_killed_worker_container_costs_nothing_but_time(
    cluster: Cluster, containers: Containers, data_dir: Path
) -> None:
    run_dir = data_dir / "killed"
    generations = len(cluster.nodes_of_train_workers()) // 2
    job = cluster.start_submit(
        *("eagle3-ray", "train", "--config", "/data/two/run/run.yaml", "--save-path", "/data/killed"),
        *("--checkpoint-every-steps", str(STEPS_BETWEEN_CHECKPOINTS), "--max-failures", "3"),
    )
    wait_until(lambda: bool(committed_steps(run_dir)), JOB_TIMEOUT_S, lambda: containers.logs(job))
    containers.remove(cluster.worker)
    untrained = (run_dir / "initial_metrics.json").stat()
    saved = committed_steps(run_dir)
    cluster.start_worker()
    finished = containers.wait(job, JOB_TIMEOUT_S)
    assert finished.exit_code == 0, finished.output
    undisturbed = committed_steps(data_dir / "two" / "run")
    assert max(saved) < min(undisturbed), "killed in the middle of the first epoch"
    assert len(cluster.nodes_of_train_workers()) >= 2 * generations + 4, "the ranks were started twice"
    # Only a run that begins at step 0 measures the untrained draft.
    assert (run_dir / "initial_metrics.json").stat().st_mtime_ns == untrained.st_mtime_ns
    assert last_metrics(run_dir) == last_metrics(data_dir / "two" / "run")


REFUSED = {
    "no token": ("--env=RAY_AUTH_MODE=disabled", "Unauthorized: Missing authentication token"),
    "wrong token": (f"--env=RAY_AUTH_TOKEN={'0' * 64}", "Forbidden: Invalid authentication token"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_submit_without_the_token_is_refused_at_once(
    cluster: Cluster, containers: Containers, data_dir: Path, kind: str
) -> None:
    option, answer = REFUSED[kind]
    job = cluster.start_submit("touch", f"/data/{kind}", options=[option])
    finished = containers.wait(job, 60)
    assert finished.exit_code == 1 and answer in finished.output, finished.output
    assert not (data_dir / kind).exists()
