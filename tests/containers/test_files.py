"""The locks, the compose file and the continuous integration, read as files: they say what the project says."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagle3_ray.cli import read_settings
from eagle3_ray.config import TrainSettings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
GPU_ONLY = ("cuda-", "nvidia-", "triton")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return version and hashes of every package of a lock."""
    text = (DOCKER / f"requirements.{name}.lock").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    found = {}
    for entry in entries:
        pin = re.match(r"([\w.-]+)==(\S+)", entry)
        assert pin is not None, entry
        found[normal(pin.group(1))] = (pin.group(2), re.findall(r"--hash=sha256:([0-9a-f]{64})", entry))
    return found


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    return {normal(name): version for name, version in pins}


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("name", ["gpu", "cpu", "uv"])
def test_a_lock_pins_what_the_tests_run_with_by_hash_and_names_no_host(name: str, constraints: dict[str, str]) -> None:
    lock = read_lock(name)
    assert [package for package, (_, hashes) in lock.items() if not hashes] == []
    pinned = {package: version.partition("+")[0] for package, (version, _) in lock.items()}
    differing = {package for package in pinned.keys() & constraints.keys() if pinned[package] != constraints[package]}
    assert differing == set(), "run `make lock`"
    assert "://" not in (DOCKER / f"requirements.{name}.lock").read_text()


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_lock_holds_the_projects_dependencies_and_none_of_development(name: str, project: Any) -> None:
    lock = read_lock(name)
    assert names_of(project["dependencies"]) - lock.keys() == set(), "run `make lock`"
    # jsonschema is also Ray's.
    assert names_of(project["optional-dependencies"]["dev"]) & lock.keys() <= {"jsonschema"}


def test_the_locks_differ_in_torch_and_what_it_brings_for_gpus() -> None:
    gpu, cpu = read_lock("gpu"), read_lock("cpu")
    extra = gpu.keys() - cpu.keys()
    assert {"triton", "nvidia-nccl-cu13"} <= extra
    assert [package for package in extra if not package.startswith(GPU_ONLY)] == []
    assert cpu.keys() <= gpu.keys()
    assert {package for package in cpu if cpu[package] != gpu[package]} == {"torch"}
    assert cpu["torch"][0] == f"{gpu['torch'][0]}+cpu"


def test_the_builder_sees_only_what_the_dockerfile_copies() -> None:
    ignored, *kept = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"
    kept_paths = {line.removeprefix("!").rstrip("/") for line in kept if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.M)
    sources = {word for line in copied for word in line.split()}
    locks = {"docker/requirements.uv.lock", "${REQUIREMENTS}"}
    assert locks <= sources
    assert kept_paths == (sources - locks) | {"docker/requirements.*.lock"}


def test_compose_trains_with_settings_there_are_and_leaves_time_to_save() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    train = services["train"]
    verb, *flags = [re.sub(r"\$\{VERIFIER.*\}", "/data/verifier", word) for word in train["command"]]
    settings = read_settings(verb, flags)
    assert isinstance(settings, TrainSettings)
    assert settings.verifier_name_or_path == "/data/verifier" and settings.logger_names == ("tensorboard",)
    places = {volume.rpartition(":/")[2].partition(":")[0] for volume in train["volumes"]}
    assert places == {"data", "checkpoints", "cache/huggingface"}
    written = (settings.save_path, settings.log_dir, settings.d2t_path, settings.t2d_path)
    assert all(str(path).startswith("/checkpoints/") for path in written) and str(settings.data_path) == "/data"
    assert train["stop_grace_period"] == "10m" and train["read_only"]
    assert f"--logdir={settings.log_dir}" in services["tensorboard"]["command"]


def test_the_workflow_calls_only_targets_there_are() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {target for run in steps for target in re.findall(r"^make ([\w-]+)", run, re.M)}
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert called == {"check", "test", "demo-short", "image", "image-test", "k8s-check"}
    assert called <= targets
