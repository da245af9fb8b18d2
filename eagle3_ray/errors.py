"""Errors raised on purpose, each with the exit code it ends the command with.

Every error carries one message and nothing else, so that it crosses process borders (Ray pickles what a
worker raises) without losing anything. Exit codes: 0 done, 1 a bug, 2 usage, 3 data, 4 checkpoint or
export, 5 cluster.
"""


class Eagle3RayError(Exception):
    """What was read, what was expected, what was found, what to do; shown to the user as it stands."""

    exit_code = 1


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
