"""All files of a folder, each read once: lengths, supervised tokens, token counts.

An index reads of a file its ids and mask, and 16 rows of the last hidden state; a scan reads all of it.
The driver reads for two seconds, in which a small folder is done before the processes of Ray tasks would have started;
tasks read the rest, some hundred files each. What a run does about files that are no usable samples is its own choice.
"""

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from eagle3_ray.data.bad_files import MAX_FILES_NAMED, BadFiles
from eagle3_ray.data.flat import FlatStrings
from eagle3_ray.data.folder import HOW_TO_GET_SAMPLES, list_sample_files
from eagle3_ray.data.index_cache import FileFacts, read_index_cache, write_index_cache
from eagle3_ray.data.sample_file import TOKEN_FREQUENCIES
from eagle3_ray.data.samples import Sample, SampleSpec, inspect_sample, inspect_tokens, scan_sample, to_bad_file
from eagle3_ray.errors import ClusterError, DataError, Eagle3RayError
from eagle3_ray.storage import is_remote, to_path

logger = logging.getLogger(__name__)

MAX_FILES_PER_TASK = 256
TASKS_PER_CPU = 4  # running or waiting; small folders are cut into so many
READ_HERE_S = 2.0  # what it takes to start processes for tasks
FILES_AT_A_TIME_HERE = 32
CPUS_PER_TASK = 0.5  # half of such a task is waiting for the disk
REPORT_EVERY_S = 10.0
REMOTE_FILES_AT_A_TIME = 16  # of one task

Result = TypeVar("Result")


@dataclass(frozen=True)
class SampleIndex:
    """The samples of a folder, sorted by relative path, which is the same on every machine.

    Attributes:
        root: the folder, absolute.
        paths: of each sample, relative to root, with forward slashes, ascending.
        num_tokens: [n] int64, S of each sample.
        num_supervised: [n] int64, supervised tokens of each, the first token not counted: it trains no position.
        num_not_samples: token-frequency files that lay among them.
    """

    root: str
    paths: Sequence[str]
    num_tokens: NDArray[np.int64]
    num_supervised: NDArray[np.int64]
    num_not_samples: int

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[object, ...]]:
        # What every worker gets: without an object a path.
        paths = FlatStrings(self.paths)
        return SampleIndex, (self.root, paths, self.num_tokens, self.num_supervised, self.num_not_samples)

    def select(self, mask: NDArray[np.bool_]) -> "SampleIndex":
        """Return the samples where `mask` [n] is True, in the same order."""
        numbers = np.flatnonzero(mask)
        paths = [self.paths[number] for number in numbers.tolist()]
        return SampleIndex(
            self.root, paths, self.num_tokens[numbers], self.num_supervised[numbers], self.num_not_samples
        )

    def digest(self) -> str:
        """Return a hex SHA-256 of paths and counts; the place of the folder does not enter."""
        digest = hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogateescape"))
        digest.update(self.num_tokens.astype("<i8").tobytes())
        digest.update(self.num_supervised.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """What the files of a folder are.

    Attributes:
        root: the folder, absolute.
        version: of the samples, 0 or 1.
        num_files: `.pt` files there are.
        facts: of the good ones, token frequencies among them, by relative path, ascending.
        bad_files: the others.
    """

    root: str
    version: int
    num_files: int
    facts: dict[str, FileFacts]
    bad_files: BadFiles

    def to_index(self) -> SampleIndex:
        """Return the samples. Token-frequency files are counted and left out.

        Raises:
            DataError: There is none.
        """
        paths = [path for path, facts in self.facts.items() if facts.is_sample]
        if not paths:
            self.bad_files.raise_if_any(self.root, self.num_files, self.version)
        _check_any_sample(self.root, len(paths), self.version)
        return SampleIndex(
            root=self.root,
            paths=paths,
            num_tokens=np.array([self.facts[path].num_tokens for path in paths], dtype=np.int64),
            num_supervised=np.array([self.facts[path].num_supervised for path in paths], dtype=np.int64),
            num_not_samples=len(self.facts) - len(paths),
        )


def build_index(data_path: str, spec: SampleSpec, scan: bool = False) -> SampleIndex:
    """Return the samples of a folder, all of whose `.pt` files must be usable. Arguments as in `survey_folder`.

    Raises:
        DataError: No folder, no sample, or files that are no usable samples; names up to 20 with their reasons.
        ClusterError: A task was lost for good.
    """
    survey = survey_folder(data_path, spec, scan)
    survey.bad_files.raise_if_any(survey.root, survey.num_files, survey.version)
    return survey.to_index()


def survey_folder(
    data_path: str,
    spec: SampleSpec,
    scan: bool = False,
    max_named: int = MAX_FILES_NAMED,
    leave_out: Collection[str] = (),
) -> Survey:
    """Look at every `.pt` file under a folder once; files that have not changed since are not opened again.

    Args:
        data_path: searched at any depth; names that begin with a dot are left out.
        spec: what each sample must look like.
        scan: read all states of every sample, not a few rows of one.
        max_named: bad files to keep the reasons of.
        leave_out: relative paths of files not to look at.

    Raises:
        DataError: No folder, or no `.pt` file in it.
        ClusterError: A task was lost for good.
    """
    root = str(to_path(data_path).absolute())
    stamps = {path: stamp for path, stamp in list_sample_files(root).items() if path not in leave_out}
    cached = read_index_cache(root, spec)
    known = {
        path: cached[path][1]
        for path, stamp in stamps.items()
        if path in cached and cached[path][0] == stamp and (cached[path][1].is_scanned or not scan)
    }
    changed = [path for path in stamps if path not in known]
    bad_files = BadFiles(max_named)
    for paths, (facts, bad) in _inspect_all(root, changed, spec, scan, max_named):
        known.update({path: fact for path, fact in zip(paths, facts, strict=True) if fact is not None})
        bad_files.add(bad)
    facts_by_path = {path: known[path] for path in stamps if path in known}
    if changed:
        write_index_cache(root, spec, {path: (stamps[path], facts) for path, facts in facts_by_path.items()})
    return Survey(root, spec.data_format_version, len(stamps), facts_by_path, bad_files)


def count_supervised_tokens(
    data_path: str, data_format_version: int, vocab_size: int, leave_out: Collection[str] = ()
) -> NDArray[np.int64]:
    """Count each id over the supervised tokens of all samples, in Ray tasks whose counts are summed.

    Args:
        data_path: folder of samples, as in `build_index`.
        data_format_version: 0 or 1.
        vocab_size: W.
        leave_out: relative paths of files not to count.

    Returns:
        [W] int64; the same whatever the number of tasks and workers.

    Raises:
        DataError: As in `build_index`; only ids and masks are looked at.
        ClusterError: A task was lost for good.
    """
    root = str(to_path(data_path).absolute())
    files = [path for path in list_sample_files(root) if path not in leave_out]
    counts = np.zeros(vocab_size, dtype=np.int64)
    num_samples = 0
    bad_files = BadFiles()
    results = _map_in_tasks(_count_files, root, files, data_format_version, vocab_size)
    for _, (task_counts, task_samples, bad) in results:
        counts += task_counts
        num_samples += task_samples
        bad_files.add(bad)
    bad_files.raise_if_any(root, len(files), data_format_version)
    _check_any_sample(root, num_samples, data_format_version)
    return counts


def split_index(index: SampleIndex, train_frac: float, seed: int) -> tuple[SampleIndex, SampleIndex]:
    """Split by a seeded shuffle of the sorted paths, so that every machine and every resumed run splits alike.

    Args:
        index: n samples.
        train_frac: share of the samples to train on, in (0, 1].
        seed: of the shuffle.

    Returns:
        (train, validation). Training has one sample or more; so has validation, if n >= 2 and train_frac < 1.
    """
    num_samples = len(index.paths)
    num_train = max(1, round(num_samples * train_frac))
    if train_frac < 1 and num_samples >= 2:
        num_train = min(num_train, num_samples - 1)
    in_train = np.zeros(num_samples, dtype=np.bool_)
    in_train[np.random.default_rng(seed).permutation(num_samples)[:num_train]] = True
    return index.select(in_train), index.select(~in_train)


def _check_any_sample(root: str, num_samples: int, version: int) -> None:
    if num_samples == 0:
        raise DataError(
            f"{root}: its .pt files are token frequencies, expected v{version} samples among them. {HOW_TO_GET_SAMPLES}"
        )


def _inspect_files(
    root: str, paths: list[str], spec: SampleSpec, scan: bool, max_named: int
) -> tuple[list[FileFacts | None], BadFiles]:
    """Facts of each file for `survey_folder`, None for a bad one."""
    facts: list[FileFacts | None] = []
    bad_files = BadFiles(max_named)
    for path, sample in _map_paths(functools.partial(scan_sample if scan else inspect_sample, spec=spec), root, paths):
        if isinstance(sample, Sample):
            facts.append(FileFacts(True, len(sample.input_ids), int(sample.loss_mask[1:].sum()), scan))
        elif sample[0].kind == TOKEN_FREQUENCIES:
            facts.append(FileFacts(False, 0, 0, scan))
        else:
            facts.append(None)
            bad_files.add_file(to_bad_file(path, sample))
    return facts, bad_files


def _count_files(
    root: str, paths: list[str], data_format_version: int, vocab_size: int
) -> tuple[NDArray[np.int64], int, BadFiles]:
    """A part of `count_supervised_tokens`: counts [W], samples read, bad files."""
    supervised_ids = []
    bad_files = BadFiles()
    inspect = functools.partial(inspect_tokens, data_format_version=data_format_version, vocab_size=vocab_size)
    for path, tokens in _map_paths(inspect, root, paths):
        if isinstance(tokens, tuple):
            input_ids, loss_mask = tokens
            supervised_ids.append(input_ids[loss_mask].numpy())
        elif tokens[0].kind != TOKEN_FREQUENCIES:
            bad_files.add_file(to_bad_file(path, tokens))
    counts = np.bincount(np.concatenate([np.empty(0, dtype=np.int64), *supervised_ids]), minlength=vocab_size)
    return counts.astype(np.int64), len(supervised_ids), bad_files


def _map_paths(inspect: Callable[[str], Result], root: str, paths: list[str]) -> Iterator[tuple[str, Result]]:
    """Yield (path, `inspect` of it) in order; on an object store many at a time, as each waits for several answers."""
    full_paths = [f"{root}/{path}" for path in paths]
    if not is_remote(root):
        yield from zip(paths, map(inspect, full_paths), strict=True)
        return
    with ThreadPoolExecutor(REMOTE_FILES_AT_A_TIME) as pool:
        yield from zip(paths, pool.map(inspect, full_paths), strict=True)


def _inspect_all(
    root: str, paths: list[str], spec: SampleSpec, scan: bool, max_named: int
) -> Iterator[tuple[list[str], tuple[list[FileFacts | None], BadFiles]]]:
    """Yield (some paths, what `_inspect_files` finds in them) until all are read: here first, then in Ray tasks."""
    num_here, until_s = 0, time.monotonic() + READ_HERE_S
    while num_here < len(paths) and time.monotonic() < until_s:
        chunk = paths[num_here : num_here + FILES_AT_A_TIME_HERE]
        yield chunk, _inspect_files(root, chunk, spec, scan, max_named)
        num_here += len(chunk)
    if num_here < len(paths):
        yield from _map_in_tasks(_inspect_files, root, paths[num_here:], ray.put(spec), scan, max_named)


def _map_in_tasks(
    read: Callable[..., Result], root: str, paths: list[str], *arguments: object
) -> Iterator[tuple[list[str], Result]]:
    """Run `read(root, some paths, *arguments)` over all paths in Ray; yield (those paths, result) as they finish.

    Raises:
        Eagle3RayError: As `read` raised it, or ClusterError because its task was lost for good.
    """
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    num_files = min(MAX_FILES_PER_TASK, max(1, len(paths) // (TASKS_PER_CPU * num_cpus)))
    chunks = iter([paths[start : start + num_files] for start in range(0, len(paths), num_files)])
    remote = ray.remote(num_cpus=CPUS_PER_TASK)(_read_in_task)
    running: dict[ray.ObjectRef[Result], list[str]] = {}
    num_done, last_report_s = 0, time.monotonic()
    while True:
        # Few at a time: a result of the counting task is as long as the vocabulary.
        for chunk in itertools.islice(chunks, TASKS_PER_CPU * num_cpus - len(running)):
            running[remote.remote(read, root, chunk, *arguments)] = chunk
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        chunk = running.pop(done[0])
        try:
            result = ray.get(done[0])
        except RayTaskError as error:
            if isinstance(error.cause, Eagle3RayError):
                raise error.cause from None  # Ray's wrapping adds nothing but a remote traceback
            raise
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
        ) as e:
            raise ClusterError(
                f"{root}: the Ray task that read {chunk[0]} and the {len(chunk) - 1} files after it was lost "
                f"({type(e).__name__}). If a file is being written or the node is short of memory, start again later."
            ) from e
        yield chunk, result
        num_done += len(chunk)
        if time.monotonic() - last_report_s > REPORT_EVERY_S:
            logger.info("%s: %d of %d files read", root, num_done, len(paths))
            last_report_s = time.monotonic()


def _read_in_task(read: Callable[..., Result], root: str, paths: list[str], *arguments: Any) -> Result:
    torch.set_num_threads(1)
    return read(root, paths, *arguments)
