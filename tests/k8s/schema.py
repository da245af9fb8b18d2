"""A strict check of custom resources against their definition's openAPIV3Schema, without a cluster.

As an API server with `fieldValidation=Strict`: unknown fields are errors, defaults are filled in before required
fields are looked for, and lists of type map or set hold nothing twice. CEL rules are not evaluated. A keyword that
this checker does not know is an error of the checker, not silently skipped.

The kinds that come with Kubernetes are checked by hand (`builtin_problems`), except for a claim's spec: the RayJob's
definition holds its schema, because a pod may carry the template of a claim.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.manifests import Manifest

Schema = Mapping[str, Any]

DEFINITION = Path(__file__).parent / "crds" / "ray.io_rayjobs.yaml"
OBJECT_META = {"name", "namespace", "labels", "annotations"}  # of the fields a manifest may set, those we use
CLAIM_SPEC = "rayClusterSpec.headGroupSpec.template.spec.volumes.ephemeral.volumeClaimTemplate.spec"
DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")

TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
KNOWN = {
    *("type", "format", "properties", "required", "items", "additionalProperties", "default", "enum", "pattern"),
    *("minimum", "maxLength", "minLength", "minItems", "nullable", "anyOf"),
    *("x-kubernetes-int-or-string", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    *("x-kubernetes-map-type", "x-kubernetes-validations"),
}


@functools.cache
def ray_job_schema() -> Schema:
    """Return the schema of ray.io/v1 RayJob."""
    definition = yaml.load(DEFINITION.read_text(encoding="utf-8"), yaml.CSafeLoader)
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    schema: Schema = versions["v1"]["schema"]["openAPIV3Schema"]
    return schema


@functools.cache
def claim_schema() -> Schema:
    """Return the schema of a PersistentVolumeClaim's spec."""
    schema: Schema = ray_job_schema()["properties"]["spec"]
    for step in CLAIM_SPEC.split("."):
        schema = schema["properties"][step]
        schema = schema.get("items", schema)
    return schema


def problems_of(manifest: Manifest) -> Iterator[str]:
    """Yield what an API server would refuse an object for."""
    kind = (manifest.get("apiVersion"), manifest["kind"])
    yield from _metadata_problems(manifest.get("metadata"))
    if kind == ("ray.io/v1", "RayJob"):
        body = {key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "metadata")}
        known = {"spec": ray_job_schema()["properties"]["spec"]}
        yield from check_value(body, {"type": "object", "properties": known, "required": ["spec"]}, "")
    elif kind[0] == "v1" and kind[1] in BUILTIN_KINDS:
        yield from BUILTIN_KINDS[kind[1]](manifest)
    else:
        yield f"apiVersion {kind[0]}, kind {kind[1]}: there is no check for this kind; write one, or leave it out"


def check_value(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """Yield what is wrong with a value, each with its path."""
    unknown = schema.keys() - KNOWN
    assert not unknown, f"{path}: the definition uses {sorted(unknown)}, which this checker does not know"
    if value is None and schema.get("nullable"):
        return
    if schema.get("x-kubernetes-int-or-string"):
        if not (TYPES["integer"](value) or isinstance(value, str)):
            yield f"{path}: must be a whole number or text, found {value!r}"
        elif isinstance(value, str):
            yield from _check_limits(value, schema, path)
        return
    if not TYPES[schema["type"]](value):
        yield f"{path}: must be of type {schema['type']}, found {value!r}"
        return
    yield from _check_limits(value, schema, path)
    if isinstance(value, dict):
        yield from _check_object(value, schema, path)
    elif isinstance(value, list):
        yield from _check_list(value, schema, path)


def _check_limits(value: Any, schema: Schema, path: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: must be one of {', '.join(map(str, schema['enum']))}, found {value!r}"
    if "pattern" in schema and re.search(schema["pattern"], value) is None:
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{path}: must be at least {schema['minimum']}, found {value}"
    shortest = schema.get("minLength", schema.get("minItems", 0))
    if shortest and len(value) < shortest:
        yield f"{path}: must hold at least {shortest}, found {len(value)}"
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        yield f"{path}: must hold at most {schema['maxLength']} characters, found {len(value)}"


def _check_object(value: dict[str, Any], schema: Schema, path: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", []):
        if value.get(name) is None and "default" not in properties.get(name, {}):
            yield f"{path}.{name}: is required"
    for name, item in value.items():
        if name in properties:
            yield from check_value(item, properties[name], f"{path}.{name}")
        elif isinstance(others, dict):
            yield from check_value(item, others, f"{path}.{name}")
        else:
            yield f"{path}.{name}: no such field"


def _check_list(value: list[Any], schema: Schema, path: str) -> Iterator[str]:
    for number, item in enumerate(value):
        yield from check_value(item, schema["items"], f"{path}[{number}]")
    keys, kind = schema.get("x-kubernetes-list-map-keys"), schema.get("x-kubernetes-list-type")
    if kind == "map" and keys:
        defaults = {key: schema["items"]["properties"][key].get("default") for key in keys}
        names = [tuple(item.get(key, defaults[key]) for key in keys) for item in value if isinstance(item, dict)]
    else:
        names = [(item,) for item in value] if kind == "set" else []
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"{path}: holds {name} twice"


def _metadata_problems(metadata: Any) -> Iterator[str]:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        yield ".metadata.name: is required"
        return
    for name in sorted(metadata.keys() - OBJECT_META):
        yield f".metadata.{name}: no such field"
    for field in ("labels", "annotations"):
        for key, value in metadata.get(field, {}).items():
            if not isinstance(value, str):
                yield f".metadata.{field}.{key}: must be of type string, found {value!r}"


def _claim_problems(manifest: Manifest) -> Iterator[str]:
    yield from _unknown_fields(manifest, {"spec"})
    yield from check_value(manifest.get("spec"), claim_schema(), ".spec")
    spec = manifest.get("spec") or {}
    if not spec.get("accessModes") or not spec.get("resources", {}).get("requests", {}).get("storage"):
        yield ".spec: accessModes and resources.requests.storage are required"


def _data_problems(manifest: Manifest) -> Iterator[str]:
    own = {"ConfigMap": {"data", "binaryData", "immutable"}, "Secret": {"data", "stringData", "immutable", "type"}}
    yield from _unknown_fields(manifest, own[manifest["kind"]])
    for field in ("data", "stringData", "binaryData"):
        for key, value in (manifest.get(field) or {}).items():
            if DATA_KEY.fullmatch(key) is None:
                yield f".{field}.{key}: a key holds letters, digits, -, _ and . only"
            if not isinstance(value, str):
                yield f".{field}.{key}: must be of type string, found {value!r}"


def _unknown_fields(manifest: Manifest, own: set[str]) -> Iterator[str]:
    for name in sorted(manifest.keys() - own - {"apiVersion", "kind", "metadata"}):
        yield f".{name}: no such field"


BUILTIN_KINDS: dict[str, Callable[[Manifest], Iterator[str]]] = {
    "PersistentVolumeClaim": _claim_problems,
    "ConfigMap": _data_problems,
    "Secret": _data_problems,
}
