"""What the cluster must have, and in which words a job is refused that it would never start."""

import pickle

import pytest
import ray

from eagle3_ray.errors import ClusterError
from eagle3_ray.jobs.cluster import WorkerRequest, check_workers_fit, choose_workers, ray_session


def _pretend(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[int, int]) -> None:
    """Make Ray tell of nodes of (CPUs, GPUs), and of a dead one that must not count."""
    alive = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    totals = {"CPU": float(sum(cpus for cpus, _ in nodes)), "GPU": float(sum(gpus for _, gpus in nodes))}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {name: number for name, number in totals.items() if number})


def _refusal(num_workers: int, use_gpu: bool, cpus_per_worker: int = 1) -> str:
    with pytest.raises(ClusterError) as info:
        check_workers_fit(num_workers, use_gpu, cpus_per_worker)
    assert info.value.exit_code == 5
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    return str(info.value)


def test_too_few_cpus_are_told_with_the_number_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (3, 0))
    check_workers_fit(2, False, 1)
    assert _refusal(4, False) == (
        "4 workers would take 5 CPUs (1 each and 1 for the tasks that feed them); the cluster has 3 CPUs and 0 GPUs on "
        "1 node. Pass --num-workers 2 or fewer, or add nodes to the cluster."
    )


def test_too_few_gpus_are_told_with_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (8, 1), (8, 0))
    check_workers_fit(1, True, 1)
    assert _refusal(2, True) == (
        "2 workers would take 3 CPUs (1 each and 1 for the tasks that feed them) and 2 GPUs (1 each); the cluster has "
        "16 CPUs and 1 GPU on 2 nodes. Pass --num-workers 1 or --no-use-gpu, or add nodes to the cluster."
    )


def test_gpus_asked_for_where_there_are_none_are_told_with_what_shows_them_to_a_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _pretend(monkeypatch, (8, 0))
    assert _refusal(2, True) == (
        "2 workers would take 3 CPUs (1 each and 1 for the tasks that feed them) and 2 GPUs (1 each); the cluster has "
        "8 CPUs and 0 GPUs on 1 node. Pass --no-use-gpu, or add nodes to the cluster. A container sees GPUs only with "
        "`docker run --gpus all`, and a pod with a limit on nvidia.com/gpu."
    )


def test_a_cluster_that_holds_no_worker_at_all_can_only_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (1, 0))
    assert _refusal(1, False).endswith("has 1 CPU and 0 GPUs on 1 node. Add nodes to the cluster.")


def test_a_worker_must_find_all_it_needs_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (3, 0), (3, 0), (3, 0))
    check_workers_fit(3, False, 2)
    assert "Pass --num-workers 3 or fewer" in _refusal(4, False, cpus_per_worker=2)  # 9 CPUs, but in threes
    _pretend(monkeypatch, (16, 0), (1, 4))  # GPUs where the CPUs are not
    assert "Pass --num-workers 1, or add nodes" in _refusal(4, True)


def test_one_cpu_is_left_for_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (4, 0))
    check_workers_fit(3, False, 1)
    assert "would take 5 CPUs" in _refusal(4, False)


def test_workers_are_chosen_by_what_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (8, 2), (8, 2))
    assert choose_workers(None, None) == WorkerRequest(4, True, 1)
    assert choose_workers(2, None) == WorkerRequest(2, True, 1)
    assert choose_workers(None, False) == WorkerRequest(1, False, 8)  # both nodes' CPUs cannot serve one worker
    _pretend(monkeypatch, (8, 0))
    assert choose_workers(None, None) == WorkerRequest(1, False, 7)  # one is left for the tasks
    assert choose_workers(2, None) == WorkerRequest(2, False, 3)
    assert choose_workers(7, None) == WorkerRequest(7, False, 1)
    _pretend(monkeypatch, (4, 0), (4, 0), (2, 0))
    assert choose_workers(3, None) == WorkerRequest(3, False, 2)  # 9 // 3 would fit on two nodes only
    assert choose_workers(1, None, max_workers=3) == WorkerRequest(3, False, 2, min_workers=1)
    assert choose_workers(2, None, max_workers=64) == WorkerRequest(64, False, 1, min_workers=2)  # there may be more
    with pytest.raises(ClusterError, match="10 workers would take 11 CPUs"):
        choose_workers(10, None, max_workers=64)
    with pytest.raises(ClusterError, match=r"1 worker would take .* and 1 GPU .* has 10 CPUs and 0 GPUs"):
        choose_workers(None, True)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "http://127.0.0.1:8265", "nonsense"])
def test_cluster_that_cannot_be_joined_is_told_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as info, ray_session():
        raise AssertionError("joined a cluster that is not there")
    assert str(info.value).startswith(f"RAY_ADDRESS={address}: no Ray cluster can be joined there (")
    assert str(info.value).endswith("Correct it, start the cluster, or unset it to run on this machine alone.")


def test_a_local_ray_that_is_not_up_in_time_is_no_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(ClusterError, match=r"no local Ray with \d+ CPUs could be started \(The current node timed out"):
        ray_session().__enter__()


def test_a_bug_in_the_start_of_a_local_ray_is_not_told_as_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise TypeError("init() got an unexpected keyword argument")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ray_session().__enter__()


def test_a_ray_that_is_joined_already_is_used_and_left(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # would fail, if it were looked at
    with ray_session():
        assert ray.cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


def test_session_reads_the_real_cluster(ray_cluster: None) -> None:
    check_workers_fit(3, False, 1)
    assert "the cluster has 4 CPUs and 0 GPUs on 1 node. Pass --num-workers 3 or fewer" in _refusal(4, False)
