"""The CPU image: what is in it, what it may do, and what it says to those who run it wrongly."""

import json
import re
from pathlib import Path

import pytest

from tests.containers.engine import Containers, Finished

ROOT = Path(__file__).parents[2]
PYPROJECT_VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "eagle3_ray" / "__init__.py").read_text())

SEALED = """
import importlib, os, pkgutil, ray, torch, eagle3_ray
drawing = []
modules = [m.name for m in pkgutil.walk_packages(eagle3_ray.__path__, "eagle3_ray.") if not m.name.endswith("__main__")]
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":  # `report` alone draws, and says so
            raise
        drawing.append(name)
try:
    open("/opt/venv/written", "w")
    written = True
except OSError:
    written = False
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
rights = os.getuid(), os.getgid(), int(status["CapBnd"], 16), written, torch.cuda.is_available()
print("FOUND", len(modules), *rights, *drawing)
"""

INSTALLED = """
import importlib.metadata, json
print("FOUND", json.dumps({d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""


def found(finished: Finished) -> str:
    """What a script printed behind the word FOUND."""
    assert finished.exit_code == 0, finished.output
    return next(line for line in finished.output.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")


def test_every_module_imports_without_network_on_a_read_only_root_without_any_right(containers: Containers) -> None:
    words = found(containers.run("python", "-c", SEALED, options=["--network=none"])).split()
    assert int(words[0]) > 30
    assert words[1:6] == ["1000", "1000", "0", "False", "False"]
    assert words[6:] == ["eagle3_ray.report.page", "eagle3_ray.report.plots"]


def test_the_image_holds_what_the_lock_names_and_the_project(containers: Containers) -> None:
    installed = json.loads(found(containers.run("python", "-c", INSTALLED, options=["--network=none"])))
    lock = (ROOT / "docker" / "requirements.cpu.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.M))
    assert PYPROJECT_VERSION is not None
    assert installed == {**locked, "eagle3-ray": PYPROJECT_VERSION.group(1)}


def test_the_cpu_image_stays_under_2_1_gb(containers: Containers) -> None:
    assert 1.0e9 < containers.image_bytes() < 2.1e9


def test_the_first_word_is_a_verb_or_a_program(containers: Containers) -> None:
    assert PYPROJECT_VERSION is not None
    version = containers.run("--version")
    assert (version.exit_code, version.output.strip()) == (0, f"eagle3-ray {PYPROJECT_VERSION.group(1)}")
    assert "ray, version 2.60.0" in containers.run("ray", "--version").output
    mistyped = containers.run("trian")
    assert mistyped.exit_code == 2 and "did you mean train?" in mistyped.output


@pytest.mark.usefixtures("one_host")
def test_a_report_says_where_it_can_be_made(containers: Containers) -> None:
    finished = containers.run("report", "/data/one/run", "--output-path", "/tmp/report.html")
    assert finished.exit_code == 2, finished.output
    assert "eagle3-ray[report]" in finished.output and "Traceback" not in finished.output, finished.output


def test_programs_that_kuberay_calls_are_on_the_path_of_a_plain_shell(containers: Containers) -> None:
    # KubeRay replaces the entrypoint by `/bin/bash -c --`; its probes call wget.
    finished = containers.run(
        "-c", "type -P ray python eagle3-ray wget", options=["--entrypoint=/bin/bash", "--network=none"]
    )
    assert finished.exit_code == 0 and len(finished.output.split()) == 4, finished.output


@pytest.mark.usefixtures("one_host")
def test_gpus_that_are_not_there_are_named_at_once(containers: Containers) -> None:
    finished = containers.run("train", "--config", "/data/one/run/run.yaml", "--save-path", "/data/gpu", "--use-gpu")
    assert finished.exit_code == 5
    assert "0 GPUs" in finished.output and "--no-use-gpu" in finished.output, finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("save_path", ["/checkpoints", "/checkpoints/run"])
@pytest.mark.usefixtures("one_host")
def test_a_checkpoint_folder_that_cannot_be_written_is_named_at_once(
    containers: Containers, tmp_path: Path, save_path: str
) -> None:
    tmp_path.chmod(0o555)  # nobody may write, and root's right to is dropped
    finished = containers.run(
        *("train", "--config", "/data/one/run/run.yaml", "--save-path", save_path),
        options=[f"--volume={tmp_path}:/checkpoints"],
    )
    assert finished.exit_code == 4, finished.output
    assert f"error: {save_path}: cannot be written to (Permission denied)" in finished.output, finished.output
    assert "Traceback" not in finished.output
