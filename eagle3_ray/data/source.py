"""A bin's number -> its samples -> its tensors, in whatever process."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.batch import PackedBin, pack_samples
from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.packing import FILLER, BinSchedule, PackingPlan
from eagle3_ray.data.sample_file import Problem
from eagle3_ray.data.samples import Sample, SampleSpec, raise_bad_file, scan_sample, to_bad_file
from eagle3_ray.storage import is_remote

REMOTE_FILES_AT_A_TIME = 8  # of one bin
ANOTHER_LENGTH = "another length than in the plan"


@dataclass(frozen=True)
class IndexedFile:
    """A sample's file and the number of tokens that the index saw in it."""

    path: str
    num_tokens: int


@dataclass(frozen=True)
class BinSource:
    """All that is needed to turn a bin's number into its tensors.

    Attributes:
        spec: What each sample must look like.
        index: The samples the plan speaks of.
        plan: Which of them share a bin.
        seed: Seed of each epoch's order of bins.
        left_out: Relative paths of samples that are in the plan, but are not to be read any more.
    """

    spec: SampleSpec
    index: SampleIndex
    plan: PackingPlan
    seed: int
    left_out: frozenset[str] = frozenset()

    def read_bin(self, number: int, row: int, out: PackedBin | None = None) -> PackedBin:
        """Read and pack one bin; -1 gives a filler without samples.

        Raises:
            SampleFormatError: A file is no longer a sample, holds NaN or Inf, or has another length than in the plan.
        """
        return self.pack_bin(read_samples(self.files_of_bin(number), self.spec), number, row, out)

    def pack_bin(self, samples: list[Sample], number: int, row: int, out: PackedBin | None = None) -> PackedBin:
        """Pack a bin whose samples have been read; one of whose samples none is left is a filler."""
        number = number if samples else FILLER
        return pack_samples(samples, self.plan.total_seq_len, self.spec, number, row, out)

    def files_of_bin(self, number: int) -> list[IndexedFile]:
        """Return a bin's files in the order they are packed, but for those left out; none for a filler."""
        return [
            IndexedFile(f"{self.index.root}/{self.index.paths[member]}", int(self.index.num_tokens[member]))
            for member in self._members(number)
        ]

    def paths_of_bin(self, number: int) -> list[str]:
        """Return the relative paths of the same files."""
        return [self.index.paths[member] for member in self._members(number)]

    def _members(self, number: int) -> list[int]:
        members = [] if number == FILLER else self.plan.bins[number].tolist()
        return [member for member in members if self.index.paths[member] not in self.left_out]


def read_samples(files: list[IndexedFile], spec: SampleSpec) -> list[Sample]:
    """Read a bin's samples, with every check; errors as in `BinSource.read_bin`."""
    samples, bad_files = read_files(files, spec)
    for file in bad_files:
        raise_bad_file(file)
    return samples


def read_files(files: list[IndexedFile], spec: SampleSpec) -> tuple[list[Sample], list[BadFile]]:
    """Read a bin's files, with every check; return the samples, and the files that are none any more."""
    if not files or not is_remote(files[0].path):
        found = [_read_indexed(file, spec) for file in files]
    else:
        # A request waits for the network most of its time.
        with ThreadPoolExecutor(REMOTE_FILES_AT_A_TIME) as pool:
            found = list(pool.map(lambda file: _read_indexed(file, spec), files))
    samples = [sample for sample in found if isinstance(sample, Sample)]
    return samples, [file for file in found if isinstance(file, BadFile)]


def _read_indexed(file: IndexedFile, spec: SampleSpec) -> Sample | BadFile:
    sample = scan_sample(file.path, spec)
    if not isinstance(sample, Sample):
        return to_bad_file(file.path, sample)
    if len(sample.input_ids) == file.num_tokens:
        return sample
    detail = f"has {len(sample.input_ids)} tokens, had {file.num_tokens} when it was indexed."
    advice = "Do not change samples during a run; start the run again."
    return to_bad_file(file.path, [Problem(ANOTHER_LENGTH, detail, advice)])


class BinOrder:
    """Tells which bin belongs to a row of the stream."""

    def __init__(self, source: BinSource, schedule: BinSchedule) -> None:
        self._plan, self._seed, self._schedule = source.plan, source.seed, schedule
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def number(self, row: int) -> int:
        """Return the number of a row's bin; -1 for a filler."""
        place = self._schedule.place(row)
        if place.epoch != self._epoch:
            self._epoch, self._order = place.epoch, self._plan.epoch_order(place.epoch, self._seed)
        return FILLER if place.index == FILLER else int(self._order[place.index])
