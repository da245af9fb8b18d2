"""What a checkpoint takes is known before it is written, and what is missing is told to the byte."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.errors import CheckpointError
from eagle3_ray.storage import ObjectPath
from eagle3_ray.training import disk_space
from eagle3_ray.training.checkpoint import HostState, write_checkpoint
from eagle3_ray.training.disk_space import (
    PART_BYTES,
    REST_BYTES,
    check_room,
    checkpoint_bytes,
    count_missing_bytes,
    held_bytes,
    make_room,
)
from eagle3_ray.training.ema import build_ema
from eagle3_ray.training.optim import build_draft_optimizer, set_learning_rate
from eagle3_ray.training.step import train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.test_run_folder import write_checkpoint as write_whole
from tests.unit.training.test_run_folder import write_parts
from tests.unit.training.world import (
    build_draft,
    filler,
    load_config,
    load_mapping,
    load_ready_bins,
    load_target_head,
    step_settings,
)

MIB = 2**20


ADAMW, MUON = OptimizerSettings(), OptimizerSettings(optimizer="muon")
AVERAGED = OptimizerSettings(ema_decay=0.9)


def store(case: str, folder: str, settings: OptimizerSettings) -> None:
    """A checkpoint after an update. collective."""
    draft = build_draft(case)
    optimizer, ema = build_draft_optimizer(draft, settings), build_ema(draft, settings.ema_decay)
    set_learning_rate(optimizer, 1e-3)
    rows = [*load_ready_bins(), filler()][dist.get_rank() :: dist.get_world_size()]
    train_step(draft, optimizer, load_target_head(), rows, 0, step_settings())
    host = HostState(draft, optimizer, ema)
    host.copy()
    write_checkpoint(Path(folder), host, load_mapping(), {})


@pytest.mark.parametrize(
    ("case", "num_ranks", "settings"),
    [
        ("one_layer", 1, ADAMW),
        ("two_layers", 1, ADAMW),
        ("one_layer", 3, ADAMW),
        ("one_layer", 1, MUON),
        ("one_layer", 3, AVERAGED),
    ],
    ids=["one layer", "two layers", "three ranks", "muon", "averaged"],
)
def test_a_checkpoint_takes_what_was_foretold_and_little_less(
    case: str, num_ranks: int, settings: OptimizerSettings, tmp_path: Path
) -> None:
    run_on_ranks(num_ranks, store, tmp_path, case, str(tmp_path / "run" / "0"), settings)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    stored_bytes, foretold_bytes = (
        sum(path.stat().st_size for path in files),
        checkpoint_bytes(load_config(case), num_ranks, settings),
    )
    assert stored_bytes < held_bytes(tmp_path / "run") < foretold_bytes
    assert foretold_bytes - stored_bytes < REST_BYTES + PART_BYTES * 4 * 40 * num_ranks  # no more than 40 tensors


class Small(NamedTuple):
    """A disk of four MiB."""

    path: Path

    @property
    def free_bytes(self) -> int:
        usage = os.statvfs(self.path)
        return usage.f_bavail * usage.f_frsize

    def fill(self, num_bytes: int, name: str = "filler") -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(bytes(num_bytes))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    try:
        yield Small(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_missing_is_told_to_the_byte_and_nothing_where_there_is_room(small: Small) -> None:
    small.fill(MIB)
    assert count_missing_bytes(small.path, small.free_bytes) == 0
    assert count_missing_bytes(small.path, small.free_bytes + 1) == 1
    assert make_room(small.path, 3 * MIB - 4096) == []
    with pytest.raises(CheckpointError) as caught:
        make_room(small.path, 5 * MIB)
    assert caught.value.exit_code == 4
    numbers = re.fullmatch(
        rf"{re.escape(str(small.path))}: a checkpoint takes 5\.0 MiB, the disk has room for (\d\.\d) MiB: "
        r"(\d\.\d) MiB are missing\. Make room, and the same command goes on from the last checkpoint\.",
        str(caught.value),
    )
    assert numbers is not None, str(caught.value)
    assert (numbers[1], numbers[2]) == ("3.0", "2.0") and small.free_bytes <= 3 * MIB


def test_only_half_written_folders_of_ours_go_to_make_room_and_only_where_it_is_needed(small: Small) -> None:
    write_whole(small.path, "0", 1)
    write_parts(small.path / "1")
    small.fill(MIB, "1/model.safetensors")
    small.fill(MIB, "2/notes.txt")
    assert make_room(small.path, MIB) == []
    assert make_room(small.path, 5 * MIB // 2) == [small.path / "1"]
    assert sorted(path.name for path in small.path.iterdir()) == ["0", "2"]
    with pytest.raises(CheckpointError, match="are missing"):
        make_room(small.path, 4 * MIB)
    assert sorted(path.name for path in small.path.iterdir()) == ["0", "2"]


def test_what_is_to_be_removed_counts_as_room_and_is_not_touched(small: Small) -> None:
    write_whole(small.path, "0", 1)
    small.fill(2 * MIB, "0/model.safetensors")
    check_room(small.path, 3 * MIB, [small.path / "0"])
    with pytest.raises(CheckpointError, match=r"takes 5\.0 MiB, the disk has room for 4\.0 MiB: 1\.0 MiB are missing"):
        check_room(small.path, 5 * MIB, [small.path / "0"])
    with pytest.raises(CheckpointError, match=r"1\.1 MiB are missing"):
        check_room(small.path, 3 * MIB)
    assert (small.path / "0" / "model.safetensors").stat().st_size == 2 * MIB


def test_nothing_is_missing_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_room(ObjectPath("s3://nowhere/run"), 2**80) == []
    check_room(ObjectPath("s3://nowhere/run"), 2**80, [ObjectPath("s3://nowhere/run/0")])
    assert count_missing_bytes(tmp_path, 2**80) > 0

    class Untold(NamedTuple):
        total: int = 0
        free: int = 0

    def tell_nothing(_: Any) -> Untold:
        return Untold()

    monkeypatch.setattr(disk_space.shutil, "disk_usage", tell_nothing)
    assert make_room(tmp_path, 2**80) == []
