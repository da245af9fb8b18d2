"""Many short things held in two arrays: a million samples' paths, the samples of each bin.

Lists of them would be a million objects in every process that trains. Arrays are shared by all processes of a machine:
Ray maps them from its object store, read-only, and copies nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FlatArrays:
    """Integer arrays of any lengths, one after another: number i is `values[ends[i-1]:ends[i]]`."""

    values: NDArray[np.int64]
    ends: NDArray[np.int64]

    @staticmethod
    def of(arrays: Sequence[NDArray[np.int64]]) -> "FlatArrays":
        """Copy some arrays."""
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return FlatArrays(np.concatenate([np.empty(0, dtype=np.int64), *arrays]), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        assert 0 <= number < len(self.ends), number
        return self.values[self.ends[number - 1] if number else 0 : self.ends[number]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return map(self.__getitem__, range(len(self)))


class FlatStrings(Sequence[str]):
    """Strings as one array of their UTF-8 bytes, decoded when asked for; file names need not be UTF-8."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].tobytes().decode("utf-8", "surrogateescape")
