"""A checkpoint is the state of the step it was saved at, though the weights have moved on; or it fails on all ranks."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.errors import CheckpointError, Eagle3RayError, StorageError
from eagle3_ray.training.checkpoint import HostState, restore_checkpoint, write_checkpoint
from eagle3_ray.training.ema import build_ema
from eagle3_ray.training.optim import build_draft_optimizer, set_learning_rate
from eagle3_ray.training.saver import Background
from eagle3_ray.training.sharding import gather_weights, gather_whole, local_part
from eagle3_ray.training.step import train_step
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import (
    build_draft,
    filler,
    load_mapping,
    load_ready_bins,
    load_target_head,
    step_settings,
)

ADAMW = OptimizerSettings(weight_decay=0.01)
MUON = OptimizerSettings(weight_decay=0.01, optimizer="muon")
AVERAGED = OptimizerSettings(weight_decay=0.01, ema_decay=0.9)
BOTH = OptimizerSettings(weight_decay=0.01, optimizer="muon", ema_decay=0.9)


class Training:
    """A draft of this rank, and its updates."""

    def __init__(self, settings: OptimizerSettings = ADAMW, **parts: Any) -> None:
        self.draft = build_draft(**parts)
        self.optimizer = build_draft_optimizer(self.draft, settings)
        self.ema = build_ema(self.draft, settings.ema_decay)
        rows = load_ready_bins() + [filler()] * (-2 % dist.get_world_size())
        self._head, self._bins = load_target_head(), rows[dist.get_rank() :: dist.get_world_size()]

    def update(self, num_steps: int) -> None:
        for _ in range(num_steps):
            set_learning_rate(self.optimizer, 1e-3)
            train_step(self.draft, self.optimizer, self._head, self._bins, 0, step_settings(), ema=self.ema)


def whole_state(training: Training) -> dict[str, Tensor]:
    """A copy of every trained tensor and all that is kept of it, of all ranks. collective."""
    draft, optimizer = training.draft, training.optimizer
    state = {f"model.{name}": tensor.clone() for name, tensor in gather_weights(draft, torch.float32).items()}
    of_optimizer: Any = get_optimizer_state_dict(draft, optimizer)["state"]
    for name, kept in of_optimizer.items():
        for key, tensor in kept.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[f"optimizer.{name}.{key}"] = whole.clone()
    for name, average in ({} if training.ema is None else training.ema.weights).items():
        state[f"ema.{name}"] = gather_whole(local_part(average), average).clone()
    return state


def restore(path: Path, settings: OptimizerSettings = ADAMW) -> dict[str, Tensor]:
    """The state of a fresh draft that went on from a checkpoint. collective."""
    fresh = Training(settings)
    restore_checkpoint(path / "state", fresh.draft, fresh.optimizer, fresh.ema)
    return whole_state(fresh)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys() and len(expected) > 30
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def save_behind_updates(folder: str, settings: OptimizerSettings) -> list[tuple[list[str], list[str], bool]]:
    """Two saves that are written only once the weights have moved on, and one written while they move.

    Returns for each: what differs from the state at the save, in the checkpoint and in its servable draft, and
    whether the weights had moved when the writing began.
    """
    training, background, seen = Training(settings), Background(), []
    host = HostState(training.draft, training.optimizer, training.ema)
    for number, is_held_back in enumerate((True, True, False)):
        path, gate = Path(folder) / str(number), threading.Event()
        training.update(2)
        expected = whole_state(training)
        host.copy()

        path.mkdir(parents=True, exist_ok=True)
        (path / ".tmpa4Kr9x").write_text("left by a save that was killed")

        def write(path: Path = path, gate: threading.Event = gate) -> None:
            gate.wait()
            write_checkpoint(path, host, load_mapping(), {})

        background.start(write)
        if not is_held_back:
            gate.set()
        training.update(3)
        has_moved = len(differing(whole_state(training), expected)) > 20
        gate.set()
        background.wait()
        dist.barrier()
        servable = load_file(path / "model.safetensors")
        assert not list(path.glob(".*"))
        assert (path / "model.safetensors").stat().st_mode == (path / "run.json").stat().st_mode
        served = expected | {name.replace("ema.", "model.", 1): expected[name] for name in expected if "ema." in name}
        wrong = [
            name
            for name, tensor in servable.items()
            if name not in ("d2t", "t2d") and not torch.equal(tensor, served[f"model.{name}"].bfloat16())
        ]
        seen.append((differing(restore(path, settings), expected), wrong, has_moved))
    return seen


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, ADAMW), (2, ADAMW), (3, ADAMW), (1, MUON), (3, MUON), (1, AVERAGED), (3, AVERAGED)],
    ids=["1-adamw", "2-adamw", "3-adamw", "1-muon", "3-muon", "1-averaged", "3-averaged"],
)
def test_updates_are_made_while_a_save_is_on_its_way_and_do_not_show_in_it(
    world_size: int, settings: OptimizerSettings, tmp_path: Path
) -> None:
    """Three ranks do not divide the tensors evenly."""
    found = run_on_ranks(world_size, save_behind_updates, tmp_path, str(tmp_path / "run"), settings)
    assert found == [([], [], True)] * 3


def go_on_after_a_restore(folder: str) -> list[str]:
    """What differs between three updates on end, and one, a checkpoint, and two more of a fresh draft."""
    training, path = Training(BOTH), Path(folder)
    training.update(1)
    host = HostState(training.draft, training.optimizer, training.ema)
    host.copy()
    write_checkpoint(path, host, load_mapping(), {})
    fresh = Training(BOTH)
    restore_checkpoint(path / "state", fresh.draft, fresh.optimizer, fresh.ema)
    for each in (training, fresh):
        each.update(2)
    kept = fresh.optimizer.state_dict()["state"].values()
    assert all(tensor.dtype == torch.float32 for state in kept for tensor in state.values())
    return differing(whole_state(fresh), whole_state(training))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_muon_and_an_average_goes_on_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    assert run_on_ranks(world_size, go_on_after_a_restore, tmp_path, str(tmp_path / "0")) == []


def restore_what_was_cut_short(folder: str) -> str:
    """Text of the error that a checkpoint gives whose state lost its second half."""
    training, path = Training(), Path(folder)
    training.update(1)
    host = HostState(training.draft, training.optimizer)
    host.copy()
    write_checkpoint(path, host, load_mapping(), {})
    restore(path)
    shard = next((path / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    try:
        restore(path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_state_that_was_cut_short_is_refused_never_replaced_by_a_fresh_start(tmp_path: Path) -> None:
    text = run_on_ranks(1, restore_what_was_cut_short, tmp_path, str(tmp_path / "0"))
    assert "state: cannot be restored (" in text and "Move the checkpoint away" in text


def on_all_ranks(work: Callable[[HostState], None]) -> list[Any]:
    """What a piece of work raises on every rank."""
    training = Training()
    training.update(1)
    host = HostState(training.draft, training.optimizer)
    host.copy()
    raised: Eagle3RayError | None = None
    try:
        work(host)
    except Eagle3RayError as error:
        raised = error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, raised)
    return found


def fail_on_rank_one() -> list[Any]:
    def work() -> None:
        if dist.get_rank() == 1:
            raise StorageError("s3://bucket/run/0: the object store cannot be used")

    return on_all_ranks(lambda host: host.together(work))


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, fail_on_rank_one, tmp_path)
    assert type(first) is type(second) is StorageError
    assert str(first) == str(second) == "s3://bucket/run/0: the object store cannot be used"


def write_to(path: str) -> list[Any]:
    return on_all_ranks(lambda host: write_checkpoint(Path(path), host, load_mapping(), {}))


def fill_the_disk_of_rank_one(path: Path) -> None:
    (path / "state").mkdir(parents=True)
    (path / "state" / "__1_0.distcp").symlink_to("/dev/full")


def take_the_place_of_the_servable_draft(path: Path) -> None:
    (path / "config.json").mkdir(parents=True)


def take_the_place_of_the_folder(path: Path) -> None:
    path.write_text("a file")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (fill_the_disk_of_rank_one, "No space left on device"),
        (take_the_place_of_the_servable_draft, "Is a directory"),
        (take_the_place_of_the_folder, "Not a directory"),
    ],
)
def test_a_disk_that_cannot_be_written_is_told_on_all_ranks(
    damage: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "run-0"
    damage(path)
    for error in run_on_ranks(2, write_to, tmp_path, str(path)):
        assert type(error) is CheckpointError and error.exit_code == 4
        assert str(error).startswith(f"{path}: cannot be saved (") and cause in str(error), str(error)
        assert str(error).endswith("See to the disk; the run can go on from the checkpoint before it.")
