"""Manifests as kubectl renders them: read strictly, and the few questions that every check asks of them."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent for path in (REPOSITORY / "k8s" / "overlays").glob("*/kustomization.yaml"))
SECRETS_TEMPLATE = REPOSITORY / "k8s" / "secrets.template.yaml"

Manifest = dict[str, Any]

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTPE]i?)?")
FACTORS = {"": 1.0, "m": 1e-3}
FACTORS |= {prefix: 1e3**power for power, prefix in enumerate("kMGTPE", start=1)}
FACTORS |= {f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGTPE", start=1)}


class ManifestError(Exception):
    """A folder cannot be rendered, or what it renders to is not Kubernetes' YAML."""


class StrictLoader(yaml.SafeLoader):
    """YAML as a strict API server reads it: no key twice; a timestamp is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ManifestError(f"line {node.start_mark.line + 1}: {', '.join(repeated)} stands there twice")
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def render(folder: Path) -> list[Manifest]:
    """Return what `kubectl kustomize` makes of a folder.

    Raises:
        ManifestError: There is no kubectl, or the folder cannot be rendered.
    """
    if shutil.which("kubectl") is None:
        raise ManifestError("kubectl: not found. It renders the manifests (no cluster is needed): install it.")
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ManifestError(f"{folder}: cannot be rendered: {run.stderr.strip()}")
    return parse(run.stdout)


def parse(text: str) -> list[Manifest]:
    """Read YAML documents.

    Raises:
        ManifestError: They are not YAML, or one of them is no object of a kind.
    """
    try:
        documents = [document for document in yaml.load_all(text, StrictLoader) if document is not None]
    except yaml.YAMLError as error:
        raise ManifestError(f"not YAML: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            raise ManifestError(f"not an object with a kind: {str(document)[:80]}")
    return documents


def title(manifest: Manifest) -> str:
    """Return `RayJob/eagle3-train`."""
    return f"{manifest['kind']}/{manifest.get('metadata', {}).get('name')}"


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Return the objects of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


@dataclass(frozen=True)
class PodGroup:
    """Pods of a RayJob that are alike: its head, or one of its groups of workers.

    Attributes:
        name: "head", or the group's.
        spec: the group's part of the RayJob.
        replicas: pods.
    """

    name: str
    spec: Mapping[str, Any]
    replicas: int

    @property
    def pod(self) -> Mapping[str, Any]:
        """The pods' PodSpec."""
        pod: Mapping[str, Any] = self.spec["template"]["spec"]
        return pod

    @property
    def container(self) -> Mapping[str, Any]:
        """Ray's container: KubeRay takes the first."""
        container: Mapping[str, Any] = self.pod["containers"][0]
        return container

    @property
    def environment(self) -> dict[str, str]:
        """The variables with values of their own."""
        return {item["name"]: item["value"] for item in self.container.get("env", []) if "value" in item}

    def amount(self, resource: str) -> float:
        """Return how much of a resource one pod has: its limit, else its request, as KubeRay reads it."""
        resources = self.container.get("resources", {})
        found = resources.get("limits", {}).get(resource, resources.get("requests", {}).get(resource, 0))
        return read_quantity(str(found))

    def volume_at(self, path: str) -> Mapping[str, Any] | None:
        """Return the volume that holds a path: that of the longest mount above it."""
        mounts = [
            mount
            for mount in self.container.get("volumeMounts", [])
            if f"{path}/".startswith(mount["mountPath"].rstrip("/") + "/")
        ]
        if not mounts:
            return None
        name = max(mounts, key=lambda mount: len(mount["mountPath"]))["name"]
        return next((volume for volume in self.pod.get("volumes", []) if volume["name"] == name), None)


def pod_groups(ray_job: Manifest) -> Iterator[PodGroup]:
    """Yield the head, then each group of workers."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    yield PodGroup("head", cluster["headGroupSpec"], 1)
    for group in cluster.get("workerGroupSpecs", []):
        yield PodGroup(group["groupName"], group, group.get("replicas", 1))


def read_quantity(text: str) -> float:
    """Return Kubernetes' `500m`, `8Gi`, `4` as a number.

    Raises:
        ManifestError: It is no quantity.
    """
    match = QUANTITY.fullmatch(text)
    if match is None or (match[2] or "") not in FACTORS:
        raise ManifestError(f"{text!r}: no quantity such as 4, 500m or 8Gi")
    return float(match[1]) * FACTORS[match[2] or ""]
