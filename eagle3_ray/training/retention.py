"""Which checkpoints stay when only the newest are wanted, and how the others go."""

from collections.abc import Sequence

from eagle3_ray.errors import StorageError
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.run_folder import (
    CommittedCheckpoint,
    choose_best,
    find_committed,
    find_uncommitted,
    is_ours,
    point_best,
    remove_checkpoint,
)


def keep_newest(save_dir: StoragePath, num_kept: int, keeps_best: bool) -> list[str]:
    """Remove all but the newest whole checkpoints, and what a save or a removal was interrupted in.

    To be called once the newest is committed, while nothing is being saved. Before anything goes, `best` names what
    stays. A folder that holds something of somebody else stays too.

    Args:
        save_dir: The run folder.
        num_kept: Newest checkpoints that stay, at least 1.
        keeps_best: The best of all stays as well.

    Returns:
        What to tell the user of each folder that could not be removed: no reason to end a run whose state is safe.
    """
    committed = find_committed(save_dir)
    kept = choose_kept(committed, num_kept, keeps_best)
    point_best(save_dir, kept)
    old = [checkpoint.path for checkpoint in committed if checkpoint not in kept]
    problems = []
    for path in (*find_uncommitted(save_dir), *old):
        try:
            if is_ours(path):
                remove_checkpoint(path)
        except (OSError, StorageError) as error:
            problems.append(f"{path}: cannot be removed for --keep-last {num_kept} ({error}).")
    return problems


def choose_kept(committed: Sequence[CommittedCheckpoint], num_kept: int, keeps_best: bool) -> list[CommittedCheckpoint]:
    """Return the whole checkpoints that stay, oldest first, of all, which are given so."""
    kept = list(committed[-num_kept:])
    best = choose_best(committed) if keeps_best else None
    return kept if best is None or best in kept else [best, *kept]
