"""`finish.sh`, which Kubernetes runs before it stops a pod: the driver is told once, and waited for; so are ranks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.k8s.manifests import REPOSITORY

SCRIPT = REPOSITORY / "k8s" / "base" / "settings" / "finish.sh"
# The script signals by the names of processes: it must see none but those of the test.
PRIVATE = ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
DRIVER = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    with open(sys.argv[1], "a") as file:
        file.write("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("")
signal.pause()
"""


@pytest.fixture(autouse=True)
def _own_processes() -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a process namespace of its own needs unshare and root")
    if subprocess.run([*PRIVATE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")


def run_in_pod(commands: str, folder: Path) -> str:
    """Run lines of bash among no other processes and return what they print."""
    run = subprocess.run(
        [*PRIVATE, "bash", "-c", commands], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr == "", run.stderr
    return run.stdout


def test_the_driver_has_saved_before_the_pod_may_stop(tmp_path: Path) -> None:
    (tmp_path / "eagle3-ray").write_text(DRIVER)
    said = run_in_pod(
        f"""
        python3 {tmp_path}/eagle3-ray state & driver=$!
        until [ -e state ]; do sleep 0.1; done
        bash {SCRIPT}; echo "hook $?"; cat state; echo
        wait $driver; echo "driver $?"
        """,
        tmp_path,
    )
    assert said == "hook 0\nsaved\ndriver 143\n"


def test_a_worker_stays_as_long_as_its_ranks(tmp_path: Path) -> None:
    said = run_in_pod(
        f"""
        bash -c 'exec -a ray::RayTrainWorker.run sleep 5' & rank=$!
        until grep -qz ^ray:: /proc/$rank/cmdline; do sleep 0.1; done
        bash {SCRIPT}; echo "hook $?"
        [ -e /proc/$rank/cmdline ] && tr '\\0' ' ' < /proc/$rank/cmdline
        wait $rank; echo "rank $?"
        """,
        tmp_path,
    )
    assert said == "hook 0\nrank 0\n"


def test_a_pod_without_a_run_stops(tmp_path: Path) -> None:
    assert run_in_pod(f"bash {SCRIPT}; echo $?", tmp_path) == "0\n"
