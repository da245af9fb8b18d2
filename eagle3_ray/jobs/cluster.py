"""The Ray that a job runs on: the one there is, or one of its own; and whether the workers fit into it."""

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.job_config import JobConfig

from eagle3_ray.console import warn
from eagle3_ray.errors import ClusterError, UsageError
from eagle3_ray.jobs.gcs_probe import check_cluster
from eagle3_ray.machine import SHARED_MEMORY, free_shared_memory_bytes, usable_cpus
from eagle3_ray.stopping import Stopped, keep_stop_signals
from eagle3_ray.storage import StoragePath

CPUS_FOR_TASKS = 1  # beside the workers, for the tasks that feed them: without one, streaming waits for ever
JOBS_OWN_COPY = "/runtime_resources/working_dir_files/"  # in the temporary folder of the Ray that runs the job
RAY_INIT_ERRORS = (OSError, RuntimeError, ValueError)  # OSError holds ConnectionError and TimeoutError


@dataclass(frozen=True)
class WorkerRequest:
    """What a group of workers takes.

    Attributes:
        num_workers: ranks; the most there may be of an elastic run.
        use_gpu: one GPU a worker.
        cpus_per_worker: CPUs each of them reserves.
        min_workers: the fewest that an elastic run goes on with; None of any other.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    min_workers: int | None = None


@contextmanager
def ray_session(num_cpus: int | None = None, job_metadata: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have a Ray for the length of a block.

    A Ray that this process has already joined is used and left as it is; else the cluster that `RAY_ADDRESS` names
    is joined; else a local one is started, and stopped at the end. A Ray of somebody else on the same machine is
    never joined by chance.

    Args:
        num_cpus: logical CPUs of a local Ray. Default: the machine's, and one more for the tasks that feed the workers.
        job_metadata: what a cluster's job page says of this driver. Of a submitted job it says what was given to `ray
            job submit --metadata-json`, which Ray does not let a driver change.

    Raises:
        ClusterError: The cluster cannot be reached, or no local Ray can be started.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_local(num_cpus or usable_cpus() + CPUS_FOR_TASKS)
    else:
        _join(address, dict(job_metadata or {}))
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: int) -> None:
    # A local Ray turns token authentication on by itself; its warning tells how to turn that off.
    # So does its warning of little shared memory, at length; ours is below.
    for name in ("ray._private.authentication.authentication_token_setup", "ray._private.services"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray Train's watch for nodes that are taken away is a process more to start; this node goes with the command.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    free_bytes = free_shared_memory_bytes()
    try:
        with _stop_told_by_ray():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,  # what concerns the user is told by the driver; the rest is in Ray's logs
            )
    except Exception as error:
        # A bare Exception is how Ray tells of a node that is not up in 30 s; any other kind is a bug.
        if type(error) is not Exception and not isinstance(error, RAY_INIT_ERRORS):
            raise
        raise ClusterError(
            f"no local Ray with {num_cpus} CPUs could be started ({_first_line(error)}). "
            "Look into /tmp/ray/session_latest/logs."
        ) from error
    slow_store = describe_slow_store(free_bytes, cluster_resources()["object_store_memory"])
    if slow_store is not None:
        warn(slow_store)


def describe_slow_store(free_bytes: int | None, store_bytes: float) -> str | None:
    """Return why a node's object store is slow and what to do, or None if it is not."""
    if free_bytes is None or free_bytes >= store_bytes:
        return None
    return (
        f"{SHARED_MEMORY} has {_in_mib(free_bytes)} free, Ray's object store takes {_in_mib(store_bytes)}: it is "
        f"on disk now, and slow. In a container, pass --shm-size {_in_gib(store_bytes)}."
    )


def _join(address: str, job_metadata: dict[str, str]) -> None:
    # A cluster's dashboard has a page for runs of Ray Train, which is empty unless the driver asks for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    try:
        check_cluster(address)
        with _stop_told_by_ray():
            ray.init(
                address=address,
                logging_level=logging.WARNING,
                log_to_driver=False,
                job_config=JobConfig(metadata=job_metadata),
            )
    except RAY_INIT_ERRORS as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: no Ray cluster can be joined there ({_first_line(error)}). "
            "Correct it, start the cluster, or unset it to run on this machine alone."
        ) from error


@contextmanager
def _stop_told_by_ray() -> Iterator[None]:
    """Take the signals back that ray.init has taken, and its way of telling of one that came meanwhile.

    Raises:
        Stopped: By SIGTERM within the block.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise Stopped(signal.SIGTERM) from None
        raise
    finally:
        keep_stop_signals()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def check_outlives_job(path: StoragePath, flag: str) -> None:
    """Refuse to write into the copy of `ray job submit --working-dir`, which is one node's and goes with the job.

    Raises:
        UsageError: Names the flag.
    """
    if JOBS_OWN_COPY in str(path):
        raise UsageError(
            f"{flag} {path}: lies in the job's own copy of the working directory, which Ray removes. "
            "Give an absolute path on storage that all nodes share."
        )


def cluster_resources() -> dict[str, float]:
    """Return what all nodes of the cluster have together, by Ray's names (`CPU`, `GPU`, ...)."""
    return {name: float(number) for name, number in ray.cluster_resources().items()}


def choose_workers(num_workers: int | None, use_gpu: bool | None, max_workers: int | None = None) -> WorkerRequest:
    """Fill in what was not asked for from what the cluster has, and check that it fits.

    Args:
        num_workers: ranks. Default: every GPU, or 1 on CPUs.
        use_gpu: default: if the cluster has any.
        max_workers: ranks of an elastic run, if there is room for them some time; `num_workers` must fit now.

    Returns:
        One CPU a worker beside its GPU; without GPUs, as many CPUs a worker as the cluster has for all of them.

    Raises:
        ClusterError: As in `check_workers_fit`.
    """
    num_gpus = int(cluster_resources().get("GPU", 0))
    if use_gpu is None:
        use_gpu = num_gpus > 0
    if num_workers is None:
        num_workers = max(num_gpus, 1) if use_gpu else 1
    check_workers_fit(num_workers, use_gpu, cpus_per_worker=1)
    most = num_workers if max_workers is None else max_workers
    cpus_per_worker = 1 if use_gpu else most_cpus_per_worker(most)
    return WorkerRequest(most, use_gpu, cpus_per_worker, None if max_workers is None else num_workers)


def most_cpus_per_worker(num_workers: int) -> int:
    """Return how many CPUs each of some workers can have, at least 1: they compute with as many threads."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for cpus in range((sum(nodes) - CPUS_FOR_TASKS) // num_workers, 1, -1):
        if sum(node // cpus for node in nodes) >= num_workers:
            return cpus
    return 1


def check_workers_fit(num_workers: int, use_gpu: bool, cpus_per_worker: int) -> None:
    """Refuse workers that the cluster would never start, instead of waiting for them.

    Each worker must find its CPUs and its GPU on one node, and one CPU must be left for the tasks that feed them.

    Raises:
        ClusterError: Says what was asked for, what is there, and what to do.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    most_on_nodes = sum(_num_workers_on(node, use_gpu, cpus_per_worker) for node in nodes)
    most = min(most_on_nodes, (num_cpus - CPUS_FOR_TASKS) // cpus_per_worker)
    if num_workers <= most:
        return
    asked_cpus = num_workers * cpus_per_worker + CPUS_FOR_TASKS
    asked = f"{asked_cpus} CPUs ({cpus_per_worker} each and {CPUS_FOR_TASKS} for the tasks that feed them)"
    if use_gpu:
        asked += f" and {counted(num_workers, 'GPU')} (1 each)"
    advice = [f"--num-workers {most}" if most == 1 else f"--num-workers {most} or fewer"] if most > 0 else []
    if use_gpu and num_gpus < num_workers:
        advice.append("--no-use-gpu")
    pass_flags = f"Pass {' or '.join(advice)}, or add" if advice else "Add"
    message = (
        f"{counted(num_workers, 'worker')} would take {asked}; the cluster has {counted(num_cpus, 'CPU')} and "
        f"{counted(num_gpus, 'GPU')} on {counted(len(nodes), 'node')}. {pass_flags} nodes to the cluster."
    )
    if use_gpu and num_gpus == 0:
        message += " A container sees GPUs only with `docker run --gpus all`, and a pod with a limit on nvidia.com/gpu."
    raise ClusterError(message)


def check_shared_memory(bin_bytes: int) -> None:
    """Refuse to send bins through the object store of a Ray of this machine alone that could not hold one in memory.

    Raises:
        ClusterError: Says what a bin takes and what there is.
    """
    free_bytes = free_shared_memory_bytes()
    is_here_alone = sum(node["Alive"] for node in ray.nodes()) == 1
    if is_here_alone and free_bytes is not None and bin_bytes > free_bytes:
        raise ClusterError(
            f"--pack-in task sends bins of {_in_mib(bin_bytes)} through {SHARED_MEMORY}, which has "
            f"{_in_mib(free_bytes)} free. Pass --pack-in worker, or give the container more: --shm-size "
            f"{_in_gib(8 * bin_bytes)}."
        )


def _in_mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _in_gib(num_bytes: float) -> str:
    """Return a size as Docker's flags take it, rounded up."""
    return f"{math.ceil(num_bytes / 2**30)}g"


def _num_workers_on(node: dict[str, float], use_gpu: bool, cpus_per_worker: int) -> int:
    """Return how many workers one node holds."""
    by_cpu = int(node.get("CPU", 0)) // cpus_per_worker
    return min(by_cpu, int(node.get("GPU", 0))) if use_gpu else by_cpu


def counted(number: int, noun: str) -> str:
    """Return a number of things as it is read: `1 worker`, `2 workers`."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"
