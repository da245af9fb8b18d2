"""The `.pt` files of a folder."""

import os
from typing import NamedTuple

from eagle3_ray.errors import DataError
from eagle3_ray.storage import ObjectPath, list_objects, to_path

HOW_TO_GET_SAMPLES = "Check --data-path, or make samples with `eagle3-ray generate`."


class FileStamp(NamedTuple):
    """What tells one state of a file from another: its size in bytes and its time of change in nanoseconds."""

    num_bytes: int
    mtime_ns: int


def list_sample_files(root: str) -> dict[str, FileStamp]:
    """Return size and time of every `.pt` file under a folder, by relative path, ascending.

    Links are followed, a folder is entered once. Names that begin with a dot are left out: caches, files being
    written.

    Raises:
        DataError: The folder is missing, cannot be listed, or has no such file.
        StorageError: It lies on an object store that cannot be read.
    """
    place = to_path(root)
    files = _list_objects(place) if isinstance(place, ObjectPath) else _list_files(root)
    if not files:
        raise DataError(
            f"{root}: no .pt files, expected samples at any depth (names that begin with a dot are left out). "
            + HOW_TO_GET_SAMPLES
        )
    return dict(sorted(files.items()))


def _list_objects(root: ObjectPath) -> dict[str, FileStamp]:
    return {
        stored.name: FileStamp(stored.num_bytes, stored.mtime_ns)
        for stored in list_objects(root)
        if stored.name.endswith(".pt") and not any(part.startswith(".") for part in stored.name.split("/"))
    }


def _list_files(root: str) -> dict[str, FileStamp]:
    files: dict[str, FileStamp] = {}
    entered: set[tuple[int, int]] = set()
    folders = [""]
    try:
        while folders:
            folder = folders.pop()
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                # Sorted: which of two names of one folder is entered must not depend on the file system.
                for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(path)
                    elif entry.name.endswith(".pt"):
                        status = entry.stat(follow_symlinks=entry.is_file())  # a dangling link: told as a bad file
                        files[path] = FileStamp(status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; expected a folder of .pt samples. {HOW_TO_GET_SAMPLES}"
        ) from error
    return files
