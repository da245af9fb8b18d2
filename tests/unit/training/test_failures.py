"""What the user is shown when a run fails: our own error, a lost worker as such, and a bug as it is."""

from collections.abc import Callable

import pytest
import ray.train
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from eagle3_ray.errors import ClusterError, SampleFormatError, on_top
from eagle3_ray.jobs.failures import raise_cause

TEXT = "data_1.pt: aux state 1 has NaN"


def ours() -> SampleFormatError:
    """A fresh one: raising it gives it a cause of its own."""
    return SampleFormatError(TEXT)


def of_task(cause: Exception) -> RayTaskError:
    """A task's error as a caller gets it: an instance of the cause's class too, with a traceback for a text."""
    return RayTaskError("work", "Traceback (most recent call last):\n  ...\n", cause).as_instanceof_cause()


def of_ranks(**failures: Exception) -> ray.train.WorkerGroupError:
    """The failures of ranks `r0`, `r1`, ... as `fit` raises them, sent from another process."""
    ranks = {int(name[1:]): failure for name, failure in failures.items()}
    sent = cloudpickle.loads(cloudpickle.dumps(ray.train.WorkerGroupError("rank failed", ranks)))
    assert isinstance(sent, ray.train.WorkerGroupError)
    return sent


def caused_by(cause: Exception) -> RuntimeError:
    error = RuntimeError("around it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "make_error",
    [
        ours,
        lambda: caused_by(ours()),
        lambda: of_task(ours()),
        lambda: of_ranks(r0=ours()),
        lambda: of_ranks(r0=of_task(ours())),
        lambda: of_ranks(r0=RuntimeError("connection closed by peer"), r1=ours()),
        lambda: of_ranks(r0=WorkerHealthCheckFailedError("gone", ActorDiedError()), r1=ours()),
        lambda: ray.train.ControllerError(ours()),
        lambda: ray.train.ControllerError(of_task(ours())),
        lambda: ray.train.ControllerError(of_ranks(r0=of_task(ours()))),
        lambda: caused_by(of_ranks(r3=ray.train.ControllerError(of_task(of_task(ours()))))),
    ],
    ids=range(11),
)
def test_our_error_is_raised_with_its_own_text_however_deep_it_lies(make_error: Callable[[], BaseException]) -> None:
    with pytest.raises(SampleFormatError) as caught:
        raise_cause(make_error())
    assert type(caught.value) is SampleFormatError and str(caught.value) == TEXT
    assert caught.value.exit_code == 3


def test_of_several_ranks_the_first_is_shown() -> None:
    with pytest.raises(SampleFormatError, match="rank one"):
        raise_cause(of_ranks(r2=SampleFormatError("rank two"), r1=SampleFormatError("rank one")))


@pytest.mark.parametrize(
    "error",
    [
        of_ranks(r0=RuntimeError("connection closed by peer"), r1=WorkerHealthCheckFailedError("x", ActorDiedError())),
        of_ranks(r0=WorkerHealthCheckTimeoutError("no answer")),
        of_ranks(r0=OutOfMemoryError("killed")),
        ray.train.ControllerError(WorkerGroupStartupTimeoutError(4)),
        ray.train.ControllerError(ActorDiedError()),
        ActorDiedError(),
        ray.train.PreemptionError(PreemptionInfo(deadline_ms=0, preempted_node_to_ranks={"node": [1]})),
    ],
    ids=range(7),
)
def test_a_lost_worker_is_a_cluster_error_that_says_how_to_go_on(error: BaseException) -> None:
    with pytest.raises(ClusterError, match=r"a worker was lost: (?s:.)+Type the same command .+ stored\.$"):
        raise_cause(error)  # of a verb that restarts nothing
    with pytest.raises(
        ClusterError, match=r"a worker was lost: (?s:.)+Type the same command .+ stored, or set --max-failures"
    ) as caught:
        raise_cause(error, "--max-failures")
    assert caught.value.exit_code == 5 and caught.value.__cause__ is error


def fail_behind_another_error() -> None:
    try:
        raise ours()
    except SampleFormatError as error:
        raise RuntimeError("the reader gave up") from error


def fail_while_tidying_up() -> None:
    try:
        raise ours()
    finally:
        raise RuntimeError("and then the disk was full")


@pytest.mark.parametrize("fail", [fail_behind_another_error, fail_while_tidying_up])
def test_our_error_behind_another_one_crosses_processes(fail: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as caught:
        fail()
    sent = cloudpickle.loads(cloudpickle.dumps(caught.value))
    assert sent.__cause__ is None and sent.__context__ is None  # or there would be nothing to do
    with pytest.raises(SampleFormatError) as ours_caught:
        on_top()(fail)()
    assert str(cloudpickle.loads(cloudpickle.dumps(ours_caught.value))) == TEXT


def test_an_error_without_ours_behind_it_is_left_alone() -> None:
    def fail() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        on_top()(fail)()


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("bug"),
        of_ranks(r0=ZeroDivisionError("bug"), r1=KeyError("bug")),
        of_task(ZeroDivisionError("bug")),
        ray.train.ControllerError(UserExceptionWithTraceback(ZeroDivisionError("bug"), "Traceback ...")),
    ],
    ids=range(4),
)
def test_a_bug_is_raised_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        raise_cause(error)
    assert caught.value is error
