"""One run at a time in a run folder, by a lock that the operating system lets go when the driver dies."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO

from eagle3_ray.console import warn
from eagle3_ray.errors import CheckpointError
from eagle3_ray.storage import ObjectPath, StoragePath
from eagle3_ray.training.run_folder import LOCK


@contextmanager
def hold_run(save_dir: StoragePath) -> Iterator[None]:
    """Keep other runs out of a run folder, which must be there, for the length of a block.

    The lock is `flock`'s, on a file that stays. Whoever dies lets it go, by whatever death, and what is written in a
    file that nobody has locked means nothing. Workers may outlive their driver by seconds; their last checkpoint is
    whole or none. On NFS the lock holds between hosts, and of a host that is gone until the server takes note.

    An object store has no locks, and there nothing keeps a second run out; so it is, with a warning, on a mount whose
    file system refuses them.

    Raises:
        CheckpointError: Another run holds the folder; says who, and what to do. Or its lock cannot be written.
    """
    if isinstance(save_dir, ObjectPath):
        yield
        return
    try:
        descriptor = os.open(save_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(save_dir, error) from error
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        _lock(file, save_dir)
        yield


def _lock(file: IO[str], save_dir: StoragePath) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{save_dir}: another run writes there, {_read_holder(file)}. Wait until it ends, stop it, or choose "
            "another --save-path."
        ) from error
    except OSError as error:
        warn(f"{save_dir}: its file system refuses locks ({error.strerror}); nothing keeps a second run out of it.")
        return
    holder = {
        "host": socket.gethostname(),
        "process_id": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    try:
        # In its place, and cut to length only then: a disk that is full by now has room for that.
        file.write(json.dumps(holder) + "\n")
        file.truncate()
        file.flush()
    except OSError as error:
        raise _unwritable(save_dir, error) from error


def _read_holder(file: IO[str]) -> str:
    """Return who holds a lock, as it says itself; it may be about to."""
    try:
        holder = json.loads(file.read())
        return f"process {holder['process_id']} on host {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "which has only begun"


def _unwritable(save_dir: StoragePath, error: OSError) -> CheckpointError:
    return CheckpointError(f"{save_dir / LOCK}: cannot be written ({error.strerror}). See to the disk and its rights.")
