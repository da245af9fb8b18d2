"""What a container limits: shared memory and CPUs, each as the kernel tells of it, in a mount namespace of the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.makers import write_samples

ROOT = Path(__file__).parents[2]
PARITY = Path(__file__).parents[1] / "parity" / "small"
SHAPE = {"hidden_size": 64, "vocab_size": 320}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def run_with(mount: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where something else is mounted."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, *command],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


DOCKERS_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm"


@pytest.mark.slow
def test_dockers_64_mb_of_shared_memory_are_told_in_a_line(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", [30, 40], **SHAPE)
    words = ["--data-path", str(tmp_path / "data"), "--token-freq-path", "absent.pt", "--output-path", str(tmp_path)]
    ended = run_with(DOCKERS_SHM, "-m", "eagle3_ray", "vocab-mapping", *words, "--target-vocab-size", "320")
    assert ended.returncode == 0, ended.stderr
    (warning,) = [line for line in ended.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: /dev/shm has 64 MiB free, Ray's object store takes ")
    assert "on disk now, and slow. In a container, pass --shm-size " in warning and warning.endswith("g.")
    assert "/dev/shm" not in ended.stderr  # Ray's own warning of it is a screen long


@pytest.mark.slow
def test_bins_that_shared_memory_cannot_hold_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", [30, 40], **SHAPE)
    words = ["--verifier-name-or-path", str(PARITY / "verifier"), "--data-path", str(tmp_path / "data")]
    words += ["--save-path", str(tmp_path / "run"), "--pack-in", "task", "--total-seq-len", "262144"]
    ended = run_with(DOCKERS_SHM, "-m", "eagle3_ray", "train", *words)
    assert ended.returncode == 5, ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "error: --pack-in task sends bins of 128 MiB through /dev/shm, which has 64 MiB free. Pass --pack-in worker, "
        "or give the container more: --shm-size 1g."
    )


USABLE_CPUS = "from eagle3_ray.machine import usable_cpus; print(usable_cpus())"


def test_a_containers_cpu_quota_counts() -> None:
    mount = "mount -t tmpfs tmpfs /sys/fs/cgroup && echo '150000 100000' > /sys/fs/cgroup/cpu.max"
    assert run_with(mount, "-c", USABLE_CPUS).stdout.strip() == "1"  # half a CPU is no CPU for Ray
    mount = "mount -t tmpfs tmpfs /sys/fs/cgroup && echo '20000 100000' > /sys/fs/cgroup/cpu.max"
    assert run_with(mount, "-c", USABLE_CPUS).stdout.strip() == "1"  # but one there must be


def test_the_cpus_a_process_is_pinned_to_count() -> None:
    pinned = f"import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); {USABLE_CPUS}"
    assert run_with("true", "-c", pinned).stdout.strip() == "1"
    expected = str(len(os.sched_getaffinity(0)))
    assert run_with("mount -t tmpfs tmpfs /sys/fs/cgroup", "-c", USABLE_CPUS).stdout.strip() == expected
