"""Files that are no usable samples: one of them, and one report of many."""

from collections import Counter
from dataclasses import dataclass, field

from eagle3_ray.errors import DataError

MAX_FILES_NAMED = 20


@dataclass(frozen=True)
class BadFile:
    """A file that is no usable sample.

    Attributes:
        path: below the data folder, or where it was read.
        kinds: of its problems, as many files may have them, to count by.
        text: what was found, what was expected, what to do.
    """

    path: str
    kinds: tuple[str, ...]
    text: str


@dataclass
class BadFiles:
    """How many files of each kind, and the first few by path with their reasons.

    Attributes:
        max_named: how many those are.
        num_files: all of them.
        kinds: files by kind of problem; a file may have several.
        named: the first `max_named` files, by path.
    """

    max_named: int = MAX_FILES_NAMED
    num_files: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    named: dict[str, BadFile] = field(default_factory=dict)

    def add_file(self, file: BadFile) -> None:
        """Count one file."""
        self.add(BadFiles(self.max_named, 1, Counter(file.kinds), {file.path: file}))

    def add(self, other: "BadFiles") -> None:
        """Merge what another task found; the result does not depend on the order."""
        self.num_files += other.num_files
        self.kinds += other.kinds
        self.named |= other.named
        if len(self.named) > self.max_named:
            self.named = dict(sorted(self.named.items())[: self.max_named])

    def raise_if_any(self, root: str, num_files: int, version: int) -> None:
        """Raise the one error that tells all of them.

        Raises:
            DataError: There is a bad file.
        """
        if self.num_files:
            raise DataError(self.describe(root, num_files, version))

    def describe(self, root: str, num_files: int, version: int) -> str:
        """Return a text of some lines: how many of the folder's files, of which kinds, and the first of them."""
        lines = [f"{root}: {self.num_files} of {num_files} .pt files are not usable v{version} samples."]
        lines += [
            f"  {number:>7}  {kind}" for kind, number in sorted(self.kinds.items(), key=lambda kv: (-kv[1], kv[0]))
        ]
        first = sorted(self.named.items())[:MAX_FILES_NAMED]
        lines += [f"  {path}: {file.text}".replace("\n", "\n  ") for path, file in first]
        if self.num_files > len(first):
            lines.append(f"  ... and {self.num_files - len(first)} more.")
        return "\n".join(lines)
