"""What must hold between the manifests and this project: its versions, its image, its settings, its ranks."""

import contextlib
import functools
import io
import itertools
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle3_ray import __version__
from eagle3_ray.cli import read_settings
from eagle3_ray.errors import UsageError
from eagle3_ray.jobs.cluster import CPUS_FOR_TASKS
from eagle3_ray.schema import Settings
from eagle3_ray.verbs import VERBS
from tests.k8s.manifests import REPOSITORY, Manifest, of_kind, pod_groups, read_quantity

# Made by whoever runs the jobs, as k8s/README.md says; never in a rendered overlay.
SECRETS = {"eagle3-ray-token", "eagle3-credentials"}
COMPONENT = "app.kubernetes.io/component"
GPU = "nvidia.com/gpu"
TAGS = (__version__, f"{__version__}-cpu")
# May be lost with a pod.
FLEETING = {"log_dir"}


@functools.cache
def pinned_ray() -> str:
    """Return the release of Ray that constraints.txt pins."""
    pin = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin is not None
    return pin[1]


def versions(job: Manifest, _: list[Manifest]) -> Iterator[str]:
    """The operator derives commands and probes from rayVersion."""
    found = job["spec"]["rayClusterSpec"].get("rayVersion")
    if found != pinned_ray():
        yield f"rayVersion {found} must be that of constraints.txt, {pinned_ray()}"


def images(job: Manifest, _: list[Manifest]) -> Iterator[str]:
    """Ray refuses nodes whose Ray or Python differs, with a message that does not say so."""
    used = {group.name: group.container["image"] for group in pod_groups(job)}
    for group, image in used.items():
        if image != used["head"]:
            yield f"{group}: image {image} must be that of the head, {used['head']}"
        tag = image.rpartition("/")[2].partition(":")[2]
        if tag not in TAGS:
            yield f"{group}: image {image} must have the tag {' or '.join(TAGS)}, not {tag or 'none'}"


def references(job: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """What a pod names must be there, or it waits."""
    config_maps = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "ConfigMap")}
    claims = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "PersistentVolumeClaim")}
    secrets = {job["spec"]["rayClusterSpec"].get("authOptions", {}).get("secretName")} - {None}
    for group in pod_groups(job):
        for volume in group.pod.get("volumes", []):
            if "configMap" in volume and volume["configMap"]["name"] not in config_maps:
                yield f"{group.name}: the ConfigMap {volume['configMap']['name']} is not among these manifests"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{group.name}: the claim {claim} is not among these manifests"
        secrets |= {source["secretRef"]["name"] for source in group.container.get("envFrom", [])}
        secrets |= {
            item["valueFrom"]["secretKeyRef"]["name"]
            for item in group.container.get("env", [])
            if "secretKeyRef" in item.get("valueFrom", {})
        }
    for secret in sorted(secrets - SECRETS):
        yield f"the Secret {secret} is not one of those that k8s/README.md has you make: {', '.join(sorted(SECRETS))}"


def settings(job: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """The entrypoint must be a command of this project, whose settings are whole."""
    try:
        settings_of(job, manifests)
    except UsageError as error:
        yield str(error)


def settings_of(job: Manifest, manifests: list[Manifest]) -> tuple[str, Settings]:
    """Return the verb of a job's entrypoint and its settings, as the command line reads them on the head.

    Raises:
        UsageError: It is no such command, or its settings cannot be used.
    """
    program, *words = shlex.split(job["spec"]["entrypoint"])
    if program != "eagle3-ray" or not words or words[0] not in VERBS:
        raise UsageError(f"entrypoint {job['spec']['entrypoint']}: expected eagle3-ray and one of {', '.join(VERBS)}")
    files = [after for before, after in itertools.pairwise(words) if before == "--config"]
    return words[0], _read_settings(tuple(words), tuple((file, read_mounted(job, manifests, file)) for file in files))


@functools.cache  # three rules ask for the same
def _read_settings(words: tuple[str, ...], files: tuple[tuple[str, str], ...]) -> Settings:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as told:
        here = {path: Path(folder) / Path(path).name for path, _ in files}
        for path, text in files:
            here[path].write_text(text, encoding="utf-8")
        try:
            return read_settings(words[0], [str(here.get(word, word)) for word in words[1:]])
        except SystemExit as error:  # tyro's answer to an unknown flag
            raise UsageError(f"entrypoint eagle3-ray {shlex.join(words)}: {told.getvalue()}") from error


def read_mounted(job: Manifest, manifests: list[Manifest], path: str) -> str:
    """Return a file that the head mounts from a ConfigMap.

    Raises:
        UsageError: No ConfigMap of these manifests holds it.
    """
    volume = next(pod_groups(job)).volume_at(path) or {}
    for config_map in of_kind(manifests, "ConfigMap"):
        if (
            config_map["metadata"]["name"] == volume.get("configMap", {}).get("name")
            and Path(path).name in config_map["data"]
        ):
            text: str = config_map["data"][Path(path).name]
            return text
    raise UsageError(f"--config {path}: no ConfigMap among these manifests puts it there on the head")


def paths(job: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """Driver and ranks must see the same files, and find them again in the next cluster."""
    try:
        _, found = settings_of(job, manifests)
    except UsageError:
        return
    for field, value in found.model_dump().items():
        if isinstance(value, Path) and not value.is_absolute() and "://" not in str(value):
            yield f"{field} {value} must be an absolute path, or a URL: the folder that a job starts in is lost"
        elif str(value).startswith("/"):
            for group in pod_groups(job):
                volume = group.volume_at(str(value))
                if volume is None or ("persistentVolumeClaim" not in volume and field not in FLEETING):
                    yield f"{group.name}: {field} {value} must lie on a claim that the head and the workers mount"


def ranks(job: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """Each rank takes a CPU, and a GPU if there are any, on one node; tasks that feed them take another CPU."""
    try:
        _, found = settings_of(job, manifests)
    except UsageError:
        return
    workers = [group for group in pod_groups(job) if group.name != "head"]
    num_gpus = int(sum(group.amount(GPU) * group.replicas for group in workers))
    num_cpus = int(sum(group.amount("cpu") * group.replicas for group in workers))
    asked: int | None = found.model_dump().get("num_workers")
    num_ranks = asked if asked is not None else max(num_gpus, 1)
    places = sum(int(min(group.amount("cpu"), group.amount(GPU) or num_ranks)) * group.replicas for group in workers)
    if min(places, num_cpus - CPUS_FOR_TASKS) < num_ranks:
        yield (
            f"{num_ranks} ranks need {num_ranks + CPUS_FOR_TASKS} CPUs, {CPUS_FOR_TASKS} of them for tasks; the "
            f"workers have {num_cpus} CPUs, {num_gpus} GPUs and places for {places} ranks"
        )


def resources(job: Manifest, _: list[Manifest]) -> Iterator[str]:
    """Ray is told the limits; a pod that may be squeezed below them stalls its ranks."""
    for group in pod_groups(job):
        found: dict[str, Any] = group.container.get("resources", {})
        if found.get("requests") != found.get("limits") or not {"cpu", "memory"} <= found.get("limits", {}).keys():
            yield f"{group.name}: resources need requests equal to limits, of cpu and memory at least"
        elif not read_quantity(str(found["limits"]["cpu"])).is_integer():
            yield f"{group.name}: cpu {found['limits']['cpu']} must be whole: Ray would round it up"


def least_rights(job: Manifest, _: list[Manifest]) -> Iterator[str]:
    """A pod runs as in a namespace of the restricted standard, on a root that it cannot write to."""
    wanted_of_pod = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    wanted_of_container = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for group in pod_groups(job):
        for found, wanted in (
            (group.pod.get("securityContext", {}), wanted_of_pod),
            (group.container.get("securityContext", {}), wanted_of_container),
        ):
            for field, value in wanted.items():
                if found.get(field) != value:
                    yield f"{group.name}: securityContext needs {field}: {value}"
        for path in ("/tmp", "/home/ray"):
            if "emptyDir" not in (group.volume_at(path) or {}):
                yield f"{group.name}: {path} needs an emptyDir: the root is read-only"


def time_to_save(job: Manifest, _: list[Manifest]) -> Iterator[str]:
    """Whoever stops a job waits for its last checkpoint: Ray by its own limit, Kubernetes by the pod's."""
    for group in pod_groups(job):
        grace = group.pod.get("terminationGracePeriodSeconds", 30)
        wait = int(group.environment.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
        if not 60 <= wait <= grace:
            yield (
                f"{group.name}: RAY_JOB_STOP_WAIT_TIME_S {wait} must be 60 or more, and at most "
                f"terminationGracePeriodSeconds, {grace}"
            )
        command = group.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[-1:] != ["/etc/eagle3/finish.sh"]:
            yield f"{group.name}: preStop must run /etc/eagle3/finish.sh, or a stopped pod saves nothing"


def secret_values(manifest: Manifest) -> Iterator[str]:
    """A Secret in a repository is none."""
    if manifest["kind"] == "Secret":
        for field in ("data", "stringData"):
            for key, value in (manifest.get(field) or {}).items():
                if value:
                    yield f"{field}.{key} has a value: leave it empty here and make the Secret by hand"


def component(manifest: Manifest) -> Iterator[str]:
    """The commands of k8s/README.md choose by this label what they apply."""
    if COMPONENT not in manifest["metadata"].get("labels", {}):
        yield f"the label {COMPONENT} is needed: `kubectl apply -l` chooses by it"


JOB_RULES = (
    versions,
    images,
    references,
    settings,
    paths,
    ranks,
    resources,
    least_rights,
    time_to_save,
)
RULES = (secret_values, component)
