"""The run that `train` has decided, carried out by a TorchTrainer, and stopped by a signal with its state saved."""

import concurrent.futures
import functools
import signal
from collections.abc import Callable

import ray.train
from ray.exceptions import RayError
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from eagle3_ray.background import in_background
from eagle3_ray.console import say
from eagle3_ray.data.pipeline import bin_execution_options
from eagle3_ray.jobs.cluster import WorkerRequest
from eagle3_ray.jobs.failures import raise_cause
from eagle3_ray.stopping import Stopped, deferred_stop
from eagle3_ray.storage import ObjectPath
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.stream import build_train_stream

SIGNAL_POLL_S = 0.2
ELASTIC_RESIZE_S = 60.0  # between two looks for room for more workers, which then start again


def fit(job: TrainJob, workers: WorkerRequest) -> signal.Signals | None:
    """Run the job on the cluster.

    Returns:
        The signal that came meanwhile, if any: then the ranks have saved and stopped after the step they were in.

    Raises:
        Eagle3RayError: What a worker raised on purpose, or `ClusterError` for a worker that was lost.
        Stopped: By a signal before the first step, or by Ctrl-C after one.
    """
    most, fewest = workers.num_workers, workers.min_workers
    num_workers = most if fewest is None else (fewest, most)
    trainer = TorchTrainer(
        functools.partial(run_worker, job),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees Ray Tune's
            num_workers=num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=ELASTIC_RESIZE_S,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker, **({"GPU": 1} if workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=job.save_dir.name,
            storage_path=job.save_dir.parent.key if isinstance(job.save_dir, ObjectPath) else str(job.save_dir.parent),
            storage_filesystem=job.save_dir.filesystem if isinstance(job.save_dir, ObjectPath) else None,
            failure_config=FailureConfig(max_failures=job.settings.max_failures),
        ),
        # How many workers a start will have is not known to what deals out the bins: they go by the schedule then.
        datasets={} if job.settings.is_elastic else {"train": functools.partial(build_train_stream, job)},
        dataset_config=DataConfig(execution_options=bin_execution_options()),
    )
    try:
        return run_until_told_to_stop(trainer.fit, job.channel.order_stop)
    except (ray.train.TrainingFailedError, RayError) as error:
        raise_cause(error, restart_flag="--max-failures")


def run_worker(job: TrainJob) -> None:
    """Train. What a worker needs for that is imported here, on the worker alone: it would take the driver a second.

    The process that deals out the bins is started by the first who asks for them, and starts while that is imported.
    """
    if not job.settings.is_elastic:
        ray.train.get_dataset_shard("train")
    from eagle3_ray.training.loop import run_rank

    run_rank(job.on_workers(ray.train.get_context().get_world_size()))


def run_until_told_to_stop(work: Callable[[], object], order_stop: Callable[[], bool]) -> signal.Signals | None:
    """Do work in a thread of its own, so that the main thread is free for signals, and wait for it.

    Ray Train would take SIGINT for itself in the main thread, and end the run without saving.

    Args:
        work: What to do; its errors are raised here.
        order_stop: Called from the first signal on, again and again; True as long as the work will end because of it.

    Returns:
        The signal that came meanwhile, if any.

    Raises:
        Stopped: By a signal that `order_stop` could not pass on, or by Ctrl-C after one. The work is abandoned.
    """
    is_ordered = False
    with deferred_stop() as received:
        outcome = in_background(work, "work")
        while not outcome.done():
            concurrent.futures.wait([outcome], timeout=SIGNAL_POLL_S)
            number = received()
            if number is None or outcome.done():
                continue
            if not order_stop():
                raise Stopped(number)
            if not is_ordered:
                is_ordered = True
                say(f"{number.name}: saving after this step; Ctrl-C from now on stops at once", "stopping")
        outcome.result()
        return received()
