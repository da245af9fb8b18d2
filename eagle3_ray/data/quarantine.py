"""The files that a run leaves out, as the driver keeps them: which, why, and how many are too many.

    quarantine.jsonl of the run folder, a file a line: {"path": ..., "kinds": [...], "text": ..., "is_planned": ...}

A file that is no usable sample when the run begins is in no plan. One that goes bad later keeps its place there, since
a run that goes on must plan as before, and is left out wherever its bin is read.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from eagle3_ray.data.bad_files import BadFile, BadFiles
from eagle3_ray.errors import DataError, StorageError
from eagle3_ray.storage import StoragePath, write_atomically


class Quarantine:
    """What one run leaves out. Only the driver has it; ranks tell of what they find.

    Args:
        path: where the list is stored.
        root: the data folder.
        data_format_version: of the samples, 0 or 1.
        max_bad_frac: share (0..1) of the folder's files beyond which the run ends.

    Attributes:
        num_files: of the data folder as the run began, good and bad.
    """

    def __init__(self, path: StoragePath, root: str, data_format_version: int, max_bad_frac: float) -> None:
        self.path = path
        self._root, self._version, self._max_bad_frac = root, data_format_version, max_bad_frac
        self.num_files = 0
        self._files: dict[str, BadFile] = {}
        self._planned: set[str] = set()
        self._failure: OSError | StorageError | None = None

    @property
    def paths(self) -> frozenset[str]:
        """The files left out, relative to the data folder."""
        return frozenset(self._files)

    @property
    def left_out_of_bins(self) -> frozenset[str]:
        """Those of them that are in the plan."""
        return frozenset(self._planned)

    def begin(self, num_files: int, unplanned: Iterable[BadFile]) -> None:
        """Start with what the index of a new run found.

        Args:
            num_files: in the data folder, good and bad.
            unplanned: the bad ones.
        """
        self.num_files = num_files
        self._files = {file.path: file for file in sorted(unplanned, key=lambda file: file.path)}

    def read(self, num_planned: int) -> None:
        """Start with what an earlier part of the run has stored, if anything.

        Args:
            num_planned: files in the plan, good and bad.

        Raises:
            DataError: The list is damaged.
            StorageError: The object store cannot be read.
        """
        try:
            # A line without its end was being written when the driver was killed: its file is found again.
            lines = self.path.read_bytes().decode().splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            found = [(BadFile(r["path"], tuple(r["kinds"]), r["text"]), r["is_planned"]) for r in records]
        except FileNotFoundError:
            found = []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.path}: cannot be read ({error!r}), expected the files this run leaves out, a JSON object a "
                "line. Move it away: bad files are found again when they are read."
            ) from error
        self._files = {file.path: file for file, _ in found}
        self._planned = {file.path for file, is_planned in found if is_planned}
        self.num_files = num_planned + len(self._files) - len(self._planned)

    def store(self) -> None:
        """Write the list anew; remove that of an earlier run if there is nothing to list.

        Raises:
            DataError: It cannot be written.
            StorageError: The object store cannot be written.
        """
        try:
            if self._files:
                write_atomically(self.path, "".join(self._line(file) for file in self._files.values()))
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def leave_out(self, file: BadFile) -> BadFile | None:
        """Leave out a file of the plan that has gone bad; return it under its path below the data folder.

        None if it is left out already. It is not written down yet: see `append`.
        """
        file = replace(file, path=file.path.removeprefix(f"{self._root}/"))
        if file.path in self._files:
            return None
        self._files[file.path] = file
        self._planned.add(file.path)
        return file

    def append(self, file: BadFile) -> None:
        """Write down a file that was left out just now; what goes wrong is raised by `check`."""
        try:
            if isinstance(self.path, Path):
                with self.path.open("a", encoding="utf-8") as lines:
                    lines.write(self._line(file))
                    lines.flush()
                    os.fsync(lines.fileno())
            else:
                self.store()
        except (OSError, StorageError) as error:
            self._failure = error

    @property
    def must_end_run(self) -> bool:
        """Tell whether there are too many, or they could not be written down."""
        return self._failure is not None or len(self._files) > self._max_bad_frac * self.num_files

    def check(self) -> None:
        """Raise what ends the run.

        Raises:
            DataError: There are too many bad files, or they could not be written down.
        """
        if self._failure is not None:
            raise DataError(f"{self.path}: cannot be written ({self._failure}).") from self._failure
        if self.must_end_run:
            report = BadFiles()
            for file in self._files.values():
                report.add_file(file)
            allowed = int(self._max_bad_frac * self.num_files)
            # What is listed is not read again: only the user knows that a file is mended.
            advice = (
                f"allow more, or mend files and take their lines out of {self.path}."
                if self._planned
                else "mend or remove the files, or allow more."
            )
            raise DataError(
                f"{report.describe(self._root, self.num_files, self._version)}\n"
                f"  That is more than the {allowed} that --max-bad-frac {self._max_bad_frac:g} allows: {advice}"
            )

    def _line(self, file: BadFile) -> str:
        return json.dumps({**asdict(file), "is_planned": file.path in self._planned}) + "\n"
