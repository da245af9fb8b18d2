"""What each node of the cluster sees: a task on every one of them, which looks around and writes nothing that stays."""

import contextlib
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eagle3_ray.config import TrainSettings
from eagle3_ray.console import warn
from eagle3_ray.data.sample_file import Problem, read_sample_file
from eagle3_ray.errors import ClusterError, Eagle3RayError
from eagle3_ray.model.verifier import VerifierInfo, load_final_norm
from eagle3_ray.model.verifier_name import to_folder
from eagle3_ray.storage import ObjectPath, StoragePath
from eagle3_ray.training.run_folder import check_writable
from eagle3_ray.versions import installed_versions

MUST_BE_EQUAL = ("python", "ray", "torch", "eagle3_ray")
NODE_TIMEOUT_S = 60.0  # a process that imports torch from a slow disk takes half of it


@dataclass(frozen=True)
class Places:
    """What every node must be able to use.

    Attributes:
        save_dir: A folder that the run folder lies or will lie in, and the name of a file that the driver wrote there;
            None where the driver itself cannot write.
        log_dir: Folder that the loggers write to, made by the first of them; None without loggers.
        samples: Paths of some samples.
        data_format_version: Of the samples.
        verifier: Whose tensors every worker reads; None if it comes from the hub, which would be asked for all of it.
    """

    save_dir: tuple[StoragePath, str] | None
    log_dir: StoragePath | None
    samples: tuple[str, ...]
    data_format_version: int
    verifier: VerifierInfo | None


@dataclass(frozen=True)
class NodeReport:
    """What a node's task saw.

    Attributes:
        host: The node's name for itself.
        versions: Of Python and of the packages that results depend on.
        problems: Of its places, each told as an error is.
        gpu_bytes: Memory of its smallest GPU; None without one.
    """

    host: str
    versions: Mapping[str, str]
    problems: tuple[str, ...]
    gpu_bytes: int | None


def check_nodes(settings: TrainSettings, verifier: VerifierInfo) -> None:
    """Have the other nodes look around before anything is trained; a warning for releases that differ harmlessly.

    Raises:
        ClusterError: A node does not answer, or a worker on it could not run.
    """
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return
    reports = ask_nodes(settings, settings.save_path, (), verifier)
    differing = check_versions(reports)
    if differing:
        warn(f"{'; '.join(differing)}. Better have the same on all nodes.")
    check_places(reports)


def ask_nodes(
    settings: TrainSettings, save_dir: StoragePath | None, samples: tuple[str, ...], verifier: VerifierInfo | None
) -> list[NodeReport]:
    """Have every node look at the places of a run. Errors as in `visit_nodes`.

    Args:
        settings: Of the run.
        save_dir: What of the run folder is there; None if this process cannot write there.
        samples: Paths of some samples.
        verifier: None if it is not known.
    """
    log_dir = settings.log_dir if settings.logger_names else None
    of_nodes = verifier if verifier is not None and lies_on_nodes(verifier) else None
    with contextlib.ExitStack() as stack:
        seen_by_all = None if save_dir is None else (save_dir, stack.enter_context(file_to_see(save_dir)))
        return visit_nodes(Places(seen_by_all, log_dir, samples, settings.data_format_version, of_nodes))


def check_versions(reports: list[NodeReport]) -> list[str]:
    """Return in words which nodes have other releases than this process, of packages that may differ.

    Raises:
        ClusterError: One of those that must be equal is not.
    """
    here = own_versions()
    differing = {
        f"{name} is {report.versions[name]} on {report.host}, {here[name]} here": name
        for report in reports
        for name in here
        if report.versions[name] != here[name]
    }
    if any(name in MUST_BE_EQUAL for name in differing.values()):
        raise ClusterError(f"{'; '.join(differing)}. Run the same image, or the same environment, on all nodes.")
    return list(differing)


def check_places(reports: list[NodeReport]) -> None:
    """Check that every node could use its places.

    Raises:
        ClusterError: Names each node that could not, and what.
    """
    problems = [f"{report.host}: {problem}" for report in reports for problem in report.problems]
    if problems:
        raise ClusterError("\n".join(["not every node can use all it needs:", *problems]))


def visit_nodes(places: Places) -> list[NodeReport]:
    """Have every node that is alive look around.

    Raises:
        ClusterError: A node has not answered, or cannot run a task of this program.
    """
    remote = ray.remote(num_cpus=0)(look_around)
    tasks = {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks[remote.options(scheduling_strategy=strategy).remote(places)] = node["NodeManagerHostname"]
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    reports, problems = [], [f"{tasks[task]} has not answered for {NODE_TIMEOUT_S:.0f} s" for task in late]
    for task in done:
        try:
            reports.append(ray.get(task))
        except RayError as error:
            problems.append(f"{tasks[task]}: {str(error).strip().splitlines()[-1]}")
    for task in late:
        ray.cancel(task, force=True)
    if problems:
        raise ClusterError(
            f"{len(problems)} of {len(tasks)} nodes cannot run a task: {'; '.join(problems)}. "
            "Install the same eagle3_ray on every node, or take the node away."
        )
    return reports


def look_around(places: Places) -> NodeReport:
    """See what a node has, in a task on it."""
    problems = []
    for look in (_look_at_save_dir, _look_at_log_dir, _look_at_samples, _look_at_verifier):
        try:
            look(places)
        except Eagle3RayError as error:
            problems.append(str(error))
    return NodeReport(socket.gethostname(), own_versions(), tuple(problems), smallest_gpu_bytes())


def own_versions() -> dict[str, str]:
    """Return the releases of Python, this program and its packages, in this process."""
    return {"python": platform.python_version(), **installed_versions()}


def smallest_gpu_bytes() -> int | None:
    """Return the memory of this machine's smallest GPU, whoever may use it; None without one, or without a driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return min((int(mib) * 2**20 for mib in listed if mib.isdigit()), default=None)


def existing_part(path: StoragePath) -> StoragePath:
    """Return a path if it is there, else the closest folder above it that is."""
    while isinstance(path, Path) and not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


@contextlib.contextmanager
def file_to_see(folder: StoragePath) -> Iterator[str]:
    """Have an empty file in a folder for the length of a block, by which nodes see that it is the same one.

    Raises:
        OSError: It cannot be written.
        StorageError: The object store cannot be written.
    """
    file = folder / f".seen-by-all-{uuid.uuid4().hex[:8]}"
    file.write_bytes(b"")
    try:
        yield file.name
    finally:
        file.unlink(missing_ok=True)


def _look_at_save_dir(places: Places) -> None:
    if places.save_dir is None:
        return
    folder, name = places.save_dir
    if not (folder / name).is_file():
        raise ClusterError(
            f"--save-path: {folder} is not the folder that the driver sees there. Put it on "
            "storage that all nodes share."
        )
    check_writable(folder)


def _look_at_log_dir(places: Places) -> None:
    if places.log_dir is not None:
        check_writable(existing_part(places.log_dir), "--log-dir")


def _look_at_samples(places: Places) -> None:
    for path in places.samples:
        found = read_sample_file(path, places.data_format_version, lambda _: ())
        if isinstance(found, Problem):
            raise ClusterError(f"{path}: {found.detail} {found.advice}")


def _look_at_verifier(places: Places) -> None:
    if places.verifier is not None:
        load_final_norm(places.verifier)


def lies_on_nodes(verifier: VerifierInfo) -> bool:
    """Tell whether a verifier is a folder, which every node must see, and not fetched from the hub."""
    folder = to_folder(verifier.name_or_path)
    return isinstance(folder, ObjectPath) or folder.is_dir()
