"""Ray Train's own list of a run's checkpoints, which it writes in place and starts from."""

import itertools
import json

from eagle3_ray.storage import StoragePath, write_atomically
from eagle3_ray.training.run_folder import BROKEN_SNAPSHOT, RAY_SNAPSHOT


def mend_snapshot(save_dir: StoragePath) -> StoragePath | None:
    """Make Ray's list of checkpoints one that Ray starts from, or move it away.

    Ray writes that file in place, and refuses to start from one that is cut short or that names a folder that is gone.
    Resuming here relies on COMMITTED alone, so nothing is lost without it. Older folders go by `--keep-last`, or by
    hand, and are taken off the list; the newest never does.

    Returns:
        Where the list was moved, since it is damaged or its newest folder is gone; None if it is fine now, or absent.
    """
    snapshot = save_dir / RAY_SNAPSHOT
    if not snapshot.is_file():
        return None
    try:
        content = json.loads(snapshot.read_text(encoding="utf-8"))
        results, indices = content["checkpoint_results"], content["checkpoint_report_indices"]
        is_there = [(save_dir / result["checkpoint_dir_name"]).is_dir() for result in results]
        if all(is_there):
            return None
        if is_there[-1]:
            content["checkpoint_results"] = list(itertools.compress(results, is_there))
            content["checkpoint_report_indices"] = list(itertools.compress(indices, is_there))
            write_atomically(snapshot, json.dumps(content))
            return None
    except (ValueError, KeyError, TypeError):
        pass  # not the file Ray writes: set aside below
    broken = save_dir / BROKEN_SNAPSHOT
    broken.write_bytes(snapshot.read_bytes())
    snapshot.unlink()
    return broken
