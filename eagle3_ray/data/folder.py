"""The `.pt` files of a folder: listing them, and one report of all that are no usable samples."""

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from eagle3_ray.data.sample_file import Problem
from eagle3_ray.data.samples import describe_problems
from eagle3_ray.errors import DataError
from eagle3_ray.storage import ObjectPath, list_objects, to_path

MAX_FILES_NAMED = 20
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


@dataclass
class BadFiles:
    """The files that are no usable samples: how many of each kind, and the first few by path with their reasons.

    Attributes:
        num_files: all of them.
        kinds: files by kind of problem; a file may have several.
        reasons: text of the first `MAX_FILES_NAMED` files, by relative path.
    """

    num_files: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def add_file(self, path: str, problems: list[Problem]) -> None:
        """Count one file."""
        kinds = Counter({problem.kind for problem in problems})
        self.add(BadFiles(1, kinds, {path: describe_problems(problems)}))

    def add(self, other: "BadFiles") -> None:
        """Merge what another task found; the result does not depend on the order."""
        self.num_files += other.num_files
        self.kinds += other.kinds
        self.reasons = dict(sorted((self.reasons | other.reasons).items())[:MAX_FILES_NAMED])

    def raise_if_any(self, root: str, num_files: int, version: int) -> None:
        """Raise the one error that tells all of them.

        Raises:
            DataError: There is a bad file.
        """
        if not self.num_files:
            return
        lines = [f"{root}: {self.num_files} of {num_files} .pt files are not usable v{version} samples."]
        lines += [
            f"  {number:>7}  {kind}" for kind, number in sorted(self.kinds.items(), key=lambda kv: (-kv[1], kv[0]))
        ]
        lines += [f"  {path}: {reason}".replace("\n", "\n  ") for path, reason in self.reasons.items()]
        if self.num_files > len(self.reasons):
            lines.append(f"  ... and {self.num_files - len(self.reasons)} more.")
        raise DataError("\n".join(lines))
