"""Errors raised on purpose, each with the exit code it ends the command with.

Every error carries one message and nothing else, so that it crosses process borders (Ray pickles what a
worker raises) without losing anything; but Ray drops what an error was caused by: `on_top`.

Exit codes: 0 done, 1 a bug, 2 usage, 3 data, 4 checkpoint or
export, 5 cluster.
"""

from contextlib import ContextDecorator
from types import TracebackType


class Eagle3RayError(Exception):
    """What was read, what was expected, what was found, what to do; shown to the user as it stands."""

    exit_code = 1


class on_top(ContextDecorator):
    """For what runs in a worker: let an error of ours leave it as such, not as the cause of another one."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        cause = error
        while cause is not None and not isinstance(cause, Eagle3RayError):
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        if cause is not None and cause is not error:
            raise cause


class UsageError(Eagle3RayError):
    """A flag or a setting is missing, unknown, or contradicts another one."""

    exit_code = 2


class DataError(Eagle3RayError):
    """Something read from disk (shards, conversations, a frequency file) cannot be used."""

    exit_code = 3


class SampleFormatError(DataError):
    """One `.pt` file is not a sample of the format asked for."""


class VocabMappingError(DataError):
    """`d2t`/`t2d` or a token-frequency file do not fit each other or the verifier."""


class VerifierError(DataError):
    """The verifier's config or one of the few tensors needed from it is missing or unsupported."""


class PretrainedDraftError(DataError):
    """A draft to begin with cannot be read, or is of another shape than the run's."""


class CheckpointError(Eagle3RayError):
    """A checkpoint cannot be saved, found, trusted or restored."""

    exit_code = 4


class ExportError(Eagle3RayError):
    """A checkpoint cannot be turned into the format asked for."""

    exit_code = 4


class ClusterError(Eagle3RayError):
    """The cluster lacks what the job asks for, or a part of it was lost."""

    exit_code = 5


class NonFiniteError(DataError):
    """A loss or gradient became NaN or Inf; the update was not made."""


class StorageError(Eagle3RayError):
    """An object store refuses, cannot be reached, or has no such bucket."""

    exit_code = 3
