"""What this process may use of its machine, which in a container is less than what the machine has."""

import os
import sys

from ray._private.utils import get_num_cpus  # reads the quotas of containers; no public name of Ray does

SHARED_MEMORY = "/dev/shm"


def usable_cpus() -> int:
    """Return how many CPUs this process gets: the least of the machine's, its affinity's and its container's quota."""
    num_cpus = int(get_num_cpus(override_docker_cpu_warning=True))
    if sys.platform == "linux":
        num_cpus = min(num_cpus, len(os.sched_getaffinity(0)))
    return max(num_cpus, 1)


def free_shared_memory_bytes() -> int | None:
    """Return what is free in /dev/shm, where Ray keeps objects; None where there is no such folder."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize
