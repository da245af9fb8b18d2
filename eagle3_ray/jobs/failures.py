"""What a worker raised on purpose, dug out of what Ray wraps around it."""

from collections.abc import Iterator
from typing import NoReturn

import ray.train
from ray.exceptions import RayError, RayTaskError

# Ray Train has no public names for the ways in which it reports a worker that is gone.
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from eagle3_ray.errors import ClusterError, Eagle3RayError

LOST_WORKER = (
    RayError,
    ray.train.PreemptionError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)


def raise_cause(error: BaseException, restart_flag: str | None = None) -> NoReturn:
    """Raise the error of ours that lies at the bottom; a lost worker as `ClusterError`; else the error as it is.

    Args:
        error: As Ray raised it.
        restart_flag: The flag of this verb that has lost workers restarted, if it has one.

    Raises:
        Eagle3RayError: As found, or ClusterError.
    """
    chain = list(_iter_causes(error))
    for cause in chain:
        # Ray's wrapper around a task's error is an instance of the error's class too, with a traceback for a text.
        if isinstance(cause, Eagle3RayError) and not isinstance(cause, RayTaskError):
            raise cause from error
    lost = [cause for cause in chain if isinstance(cause, LOST_WORKER) and not isinstance(cause, RayTaskError)]
    if lost:
        advice = "Type the same command to go on from what is stored"
        advice += f", or set {restart_flag} to have workers restarted." if restart_flag else "."
        raise ClusterError(f"a worker was lost: {lost[0]}\n{advice}") from error
    raise error


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all it was made of: failures of ranks, of the controller, causes of Ray tasks."""
    yield error
    inner: list[BaseException | None] = [error.__cause__]
    if isinstance(error, ray.train.WorkerGroupError):
        inner += [failure for _, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ray.train.ControllerError):
        inner.append(error.controller_failure)
    if isinstance(error, RayTaskError):
        inner.append(error.cause)
    for cause in inner:
        if cause is not None:
            yield from _iter_causes(cause)
