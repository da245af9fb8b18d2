"""Room for a checkpoint: looked for before a run starts and before each save, and told in bytes when it is missing."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.errors import CheckpointError
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.storage import StoragePath, remove_tree
from eagle3_ray.training.estimate import DEFAULTS, count_weights
from eagle3_ray.training.run_folder import find_uncommitted, is_ours

DRAFT_BYTES = 2  # a weight: bf16
# At most, of a rank's part of a tensor in the state: headers and an entry in the list of contents.
PART_BYTES = 4096
REST_BYTES = 2**20  # config, record, and what Ray notes


def checkpoint_bytes(config: DraftConfig, num_ranks: int, settings: OptimizerSettings = DEFAULTS) -> int:
    """Return what a checkpoint takes on disk: its tensors exactly, and an upper bound of what is around them."""
    with torch.device("meta"):
        weights = list(Eagle3Draft(config).parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    is_full = config.draft_vocab_size == config.layer.vocab_size
    mapping_bytes = 0 if is_full else 8 * config.draft_vocab_size + config.layer.vocab_size
    per_weight = 5 if settings.ema_decay else 4  # master, Adam's two moments and count of steps; an average
    num_parts = per_weight * len(trained) * num_ranks
    return (
        count_weights(config).state_bytes(settings)
        + DRAFT_BYTES * sum(weight.numel() for weight in weights)
        + mapping_bytes
        + PART_BYTES * num_parts
        + REST_BYTES
    )


def make_room(save_dir: StoragePath, needed_bytes: int) -> list[StoragePath]:
    """Check that a checkpoint finds room in a run folder; where it does not, what a save was interrupted in goes first.

    To be called while nothing is being saved.

    Returns:
        The half-written folders that were removed.

    Raises:
        CheckpointError: See `check_room`.
    """
    if count_missing_bytes(save_dir, needed_bytes) == 0:
        return []
    leftovers = [folder for folder in find_uncommitted(save_dir) if is_ours(folder)]
    for folder in leftovers:
        remove_tree(folder)
    check_room(save_dir, needed_bytes)
    return leftovers


def check_room(save_dir: StoragePath, needed_bytes: int, to_be_removed: Iterable[StoragePath] = ()) -> None:
    """Refuse to save where a checkpoint does not find room, once some folders there are removed.

    Raises:
        CheckpointError: Says what a checkpoint takes, what is free, and what is missing.
    """
    freed_bytes = sum(held_bytes(folder) for folder in to_be_removed if isinstance(folder, Path))
    missing_bytes = count_missing_bytes(save_dir, needed_bytes - freed_bytes)
    if missing_bytes:
        raise CheckpointError(
            f"{save_dir}: a checkpoint takes {_in_mib(needed_bytes)}, the disk has room for "
            f"{_in_mib(needed_bytes - missing_bytes)}: {_in_mib(missing_bytes)} are missing. Make room, and the same "
            "command goes on from the last checkpoint."
        )


def count_missing_bytes(save_dir: StoragePath, needed_bytes: int) -> int:
    """Return how much is missing for that many bytes; 0 on an object store, and where the disk does not tell."""
    if not isinstance(save_dir, Path):
        return 0
    usage = shutil.disk_usage(save_dir)
    return max(needed_bytes - usage.free, 0) if usage.total else 0


def held_bytes(folder: Path) -> int:
    """Return what the files below a folder take on disk."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def _in_mib(num_bytes: int) -> str:
    """Return a size to a tenth, rounded up: nothing that is missing reads as 0."""
    return f"{math.ceil(10 * num_bytes / 2**20) / 10:,.1f} MiB"
