"""What comes before the first bin, and how it grows: planning a million samples, looking at a folder again.

    python -m tests.benchmarks.plan [--samples 1000000 --files 20000 ...]

plan      lengths of 300 to 1700 tokens packed into bins of 8192; memory is what the process takes at its peak, and
          above what it took before.
cache     facts of as many files as there are samples, written to the index cache and read from it; what the driver
          holds of them while it makes the index.
worker    a process of Ray's gets the `BinSource` of as many samples: what it then holds itself, and maps of the object
          store, which a machine's processes share.
refresh   a folder of tiny v1 files: indexed for the first time, then with nothing changed, then with some files
          changed. Files opened are counted by the kernel (inotify), whoever opens them.

Prints one JSON object. Seconds are measured for the numbers given in it, none is extrapolated.
"""

import argparse
import ctypes
import datetime
import json
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import ray
import torch

from eagle3_ray.data.folder import FileStamp, list_sample_files
from eagle3_ray.data.index import SampleIndex, build_index
from eagle3_ray.data.index_cache import FileFacts, read_index_cache, write_index_cache
from eagle3_ray.data.packing import plan_bins
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.data.source import BinSource

TOTAL_SEQ_LEN = 8192
IN_OPEN = 0x20  # <sys/inotify.h>
IN_Q_OVERFLOW = 0x4000
SPEC = SampleSpec(1, 16, 3, 1000, torch.ones(16), 1e-5)

Result = TypeVar("Result")


def read_arguments() -> argparse.Namespace:
    """The defaults take a minute and a half on a 2-core machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"samples": 1_000_000, "files": 20_000, "changed": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What work returns, and its seconds."""
    start_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start_s


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Held(NamedTuple):
    """Memory of a process in bytes: its own, and mapped from Ray's object store."""

    own: int
    shared: int


def held_bytes() -> Held:
    """What this process holds."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return Held(own, shared)


def measure_plan(num_samples: int) -> tuple[BinSource, dict[str, object]]:
    """Plan that many samples, and make the source of their bins."""
    num_tokens = np.random.default_rng(0).integers(300, 1701, num_samples)
    before_bytes = peak_bytes()
    plan, plan_s = timed(lambda: plan_bins(num_tokens, num_tokens // 2, TOTAL_SEQ_LEN, seed=0))
    found: dict[str, object] = {
        "plan_s": round(plan_s, 2),
        "plan_peak_mib": round(peak_bytes() / 2**20),
        "plan_peak_above_start_mib": round((peak_bytes() - before_bytes) / 2**20),
        "plan_bins": len(plan.bins),
        "plan_fill_frac": round(plan.fill_frac, 4),
    }
    paths = [f"part_{number // 10_000:04}/data_{number}.pt" for number in range(num_samples)]
    return BinSource(SPEC, SampleIndex("/data", paths, num_tokens, num_tokens // 2, 0), plan, 0), found


def measure_cache(folder: str, source: BinSource) -> dict[str, object]:
    """Write the facts of the source's files, and read them."""
    stamps = [FileStamp(number, number) for number in range(len(source.index.paths))]
    facts = [FileFacts(True, tokens, tokens // 2, False) for tokens in source.index.num_tokens.tolist()]
    files = dict(zip(source.index.paths, zip(stamps, facts, strict=True), strict=True))
    _, write_s = timed(lambda: write_index_cache(folder, SPEC, files))
    before = held_bytes()
    read, read_s = timed(lambda: read_index_cache(folder, SPEC))
    held = held_bytes().own - before.own
    assert read == files
    return {
        "cache_write_s": round(write_s, 2),
        "cache_read_s": round(read_s, 2),
        "cache_read_held_mib": round(held / 2**20),
    }


# --------------------------------------------------------------------------------------- in a worker


@ray.remote
def grow_by(refs: "list[ray.ObjectRef[BinSource]]") -> Held:
    """Fetch a source as a worker does, look at all of its bins, and tell what more is held then."""
    before = held_bytes()
    source = ray.get(refs[0])
    for number in range(len(source.plan.bins)):
        source.files_of_bin(number)
    after = held_bytes()
    return Held(after.own - before.own, after.shared - before.shared)


def measure_worker(source: BinSource) -> dict[str, object]:
    """What a worker holds of a source; twice, for the first time code and allocators grow too."""
    held = [ray.get(grow_by.remote([ray.put(source)])) for _ in range(2)][-1]
    num_samples = len(source.index.paths)
    return {
        "worker_own_bytes_per_sample": round(held.own / num_samples, 1),
        "worker_shared_bytes_per_sample": round(held.shared / num_samples, 1),
    }


# ---------------------------------------------------------------------------------------- the folder


class OpenedFiles:
    """The kernel's notes of which files of a folder are opened."""

    def __init__(self, folder: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._descriptor, folder.encode(), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())

    def take(self) -> set[str]:
        """Names of the samples opened since the last call."""
        names: set[str] = set()
        while True:
            try:
                notes = os.read(self._descriptor, 2**20)
            except BlockingIOError:
                return {name for name in names if name.endswith(".pt")}
            while notes:
                _, mask, _, num_bytes = struct.unpack_from("iIII", notes)
                assert not mask & IN_Q_OVERFLOW, "more files were opened than the kernel can note"
                names.add(notes[16 : 16 + num_bytes].rstrip(b"\0").decode())
                notes = notes[16 + num_bytes :]


def write_file(path: Path, num_tokens: int) -> None:
    """A tiny sample."""
    content = {
        "input_ids": torch.arange(num_tokens),
        "loss_mask": torch.ones(num_tokens, dtype=torch.int64),
        "hidden_states": [3 * torch.randn(num_tokens, 16).bfloat16() for _ in range(4)],
    }
    torch.save(content, path)


def measure_refresh(folder: str, num_files: int, num_changed: int) -> dict[str, object]:
    """Index a folder, and again with nothing and with something changed."""
    paths = [Path(folder, f"data_{number}.pt") for number in range(num_files)]
    for number, path in enumerate(paths):
        write_file(path, 8 + number % 25)
    _, first_s = timed(lambda: build_index(folder, SPEC))
    _, list_s = timed(lambda: list_sample_files(folder))
    opened = OpenedFiles(folder)
    _, unchanged_s = timed(lambda: build_index(folder, SPEC))
    num_opened = len(opened.take())
    for path in paths[:: num_files // num_changed][:num_changed]:
        write_file(path, 40)
    opened.take()
    index, changed_s = timed(lambda: build_index(folder, SPEC))
    assert int((index.num_tokens == 40).sum()) == num_changed
    return {
        "index_first_s": round(first_s, 2),
        "index_list_s": round(list_s, 2),
        "refresh_unchanged_s": round(unchanged_s, 2),
        "refresh_unchanged_files_opened": num_opened,
        "refresh_changed_s": round(changed_s, 2),
        "refresh_changed_files_opened": len(opened.take()),
    }


def main() -> None:
    """Measure all of it and print what was seen."""
    arguments = read_arguments()
    torch.manual_seed(0)
    source, measured = measure_plan(arguments.samples)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="eagle3-plan-") as folder:
        measured |= measure_cache(folder, source)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        measured |= measure_worker(source)
        for pack in Path(folder).rglob("*.parquet"):
            pack.unlink()
        measured |= measure_refresh(folder, arguments.files, arguments.changed)
        ray.shutdown()
    result = {
        "benchmark": "plan",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "device": f"cpu x{len(os.sched_getaffinity(0))}",
        **vars(arguments),
        "total_seq_len": TOTAL_SEQ_LEN,
        **measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
