"""`train`: decide the run on the driver, then let a TorchTrainer carry it out.

While Ray starts, a thread reads the verifier's config, for which torch and transformers are imported; so nothing above
the functions here imports them, nor Ray's libraries.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eagle3_ray import BEGAN_S
from eagle3_ray.background import in_background
from eagle3_ray.config import TrainSettings
from eagle3_ray.console import say
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.jobs.cluster import check_outlives_job, choose_workers, ray_session
from eagle3_ray.model.verifier_name import absolute_name
from eagle3_ray.settings_file import write_run_yaml
from eagle3_ray.stopping import Stopped, as_stopped
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.channel import Channel
from eagle3_ray.training.progress import ProgressBoard
from eagle3_ray.training.ray_snapshot import mend_snapshot
from eagle3_ray.training.run_folder import (
    BEST,
    QUARANTINE,
    RAY_SNAPSHOT,
    RUN_YAML,
    CommittedCheckpoint,
    check_best_is_ours,
    check_same_run,
    check_writable,
    find_own_folders,
    find_uncommitted,
    follow_best,
    holds_dry_run,
    latest_committed,
    remove_run,
    step_folder,
)
from eagle3_ray.training.run_lock import hold_run
from eagle3_ray.training.startup import Laps

if TYPE_CHECKING:
    from concurrent.futures import Future

    from eagle3_ray.model.verifier import VerifierInfo
    from eagle3_ray.training.job import TrainJob


def run(settings: TrainSettings) -> None:
    """Carry out the command: train a draft, or go on training it, and tell where the time to its first step went.

    Raises: As `train_draft`.
    """
    laps = Laps(BEGAN_S)
    laps.end("imports")
    train_draft(settings, laps)


def train_draft(settings: TrainSettings, laps: Laps) -> None:
    """Train a draft, or go on training it.

    Args:
        settings: Of the run.
        laps: Of its start; told with the first step.

    Raises:
        Eagle3RayError: Verifier, samples, mapping, checkpoints or cluster do not allow the run. Nothing is lost.
        Stopped: By a signal; says what was saved.
    """
    # Workers change directory: every path is made absolute once, here.
    settings = with_absolute_paths(settings)
    check_outlives_job(settings.save_path, "--save-path")
    if settings.logger_names:
        check_outlives_job(settings.log_dir, "--log-dir")
    with told_where_to_go_on(settings):
        verifier = in_background(functools.partial(read_verifier, settings.verifier_name_or_path), "verifier")
        quarantine = new_quarantine(settings)
        check_writable(settings.save_path)
        with (
            hold_run(settings.save_path),
            ray_session(job_metadata=describe_job(settings)),
            ProgressBoard(laps, quarantine) as board,
        ):
            laps.end("Ray")
            job = carry_out(settings, verifier, board.channel, laps, quarantine)
        quarantine.check()
    tell_end(settings, job.stop_step)


def tell_end(settings: TrainSettings, stop_step: int) -> None:
    """Say that the run is complete, and why, if it is so before its last step."""
    saved = latest_committed(settings.save_path)
    if settings.dry_run:
        tell_dry_end(settings, saved)
        return
    step = stop_step if saved is None else min(stop_step, saved.step)
    if saved is not None and step < stop_step and saved.stagnation.is_over(settings.early_stop_epochs):
        most, num_epochs = saved.stagnation
        text = (
            f"stopped early: val/expected_tokens has not risen above {most:.2f} for {num_epochs} "
            f"{'epoch' if num_epochs == 1 else 'epochs'}; to go on, raise --early-stop-epochs or leave it out"
        )
        say(text, "early_stop", step=step, best_expected_tokens=most, epochs=num_epochs)
    best = settings.save_path / BEST
    chosen = follow_best(best)
    say(f"done: {step} steps; best draft {best} -> {chosen.name}", "done", step=step, best=str(chosen))


def tell_dry_end(settings: TrainSettings, saved: CommittedCheckpoint | None) -> None:
    """Say where a dry run has left its draft, or that it has tried nothing, as a run is under way there."""
    if saved is None:
        path = settings.save_path / step_folder(0)
        text = (
            f"dry run: all is in place; a draft to try in a server is {path}; the same command without --dry-run "
            "trains from the beginning"
        )
        say(text, "dry_run", path=str(path))
    else:
        text = f"dry run: nothing tried, as {saved.path} (step {saved.step}) is what the run would go on from"
        say(text, "dry_run", path=str(saved.path), step=saved.step)


def new_quarantine(settings: TrainSettings) -> Quarantine:
    """Return the run's list of files that are left out, empty yet."""
    path = settings.save_path / QUARANTINE
    return Quarantine(path, str(settings.data_path), settings.data_format_version, settings.max_bad_frac)


def read_verifier(name_or_path: str) -> "VerifierInfo":
    """Import what reads a verifier's config, and read it. Errors as in `read_verifier_config`."""
    from eagle3_ray.model.verifier import read_verifier_config

    return read_verifier_config(name_or_path)


def carry_out(
    settings: TrainSettings,
    reading: "Future[VerifierInfo]",
    channel: Channel,
    laps: Laps,
    quarantine: Quarantine,
) -> "TrainJob":
    """Decide the run, and do what is left of it. Errors as in `train_draft`."""
    verifier = reading.result()
    laps.end("verifier")
    from eagle3_ray.jobs.decide import decide_job
    from eagle3_ray.jobs.fit import fit
    from eagle3_ray.jobs.nodes import check_nodes
    from eagle3_ray.jobs.plan_record import record_plan
    from eagle3_ray.jobs.samples import record_samples
    from eagle3_ray.training.disk_space import checkpoint_bytes

    laps.end("imports")
    workers = choose_workers(settings.min_workers, settings.use_gpu, settings.max_workers)
    check_nodes(settings, verifier)
    checkpoint = open_run_folder(settings)
    job = decide_job(settings, verifier, workers, checkpoint, channel, laps, quarantine)
    if checkpoint is not None:
        check_same_run(checkpoint, job.identity)
        text = f"going on from {checkpoint.path} (step {checkpoint.step} of {job.stop_step})"
        say(text, "resume", step=checkpoint.step, path=str(checkpoint.path))
    if checkpoint is None or not job.is_complete(checkpoint):
        clear_run_folder(settings, checkpoint_bytes(job.draft_config, workers.num_workers, settings))
        # What repeats a run trains.
        write_run_yaml(settings.model_copy(update={"dry_run": False}), settings.save_path / RUN_YAML)
        record_samples(job, quarantine, is_new=checkpoint is None)
        record_plan(job, workers)
        laps.end("plan")
        stopped_by = fit(job, workers)
        saved = latest_committed(settings.save_path)
        if stopped_by is not None and saved is not None and not job.is_complete(saved):
            raise Stopped(stopped_by, f" at step {saved.step}; saved {saved.path}; {how_to_go_on(settings)}")
    return job


@contextmanager
def told_where_to_go_on(settings: TrainSettings) -> Iterator[None]:
    """Complete the word about a stop within the block that saved nothing."""
    try:
        yield
    except KeyboardInterrupt as error:
        stop = as_stopped(error)
        if not stop.detail:
            saved = latest_committed(settings.save_path)
            stop.detail = (
                "; nothing was saved; the same command starts again"
                if saved is None
                else f"; nothing was saved since {saved.path} (step {saved.step}); {how_to_go_on(settings)}"
            )
        raise stop from None


def how_to_go_on(settings: TrainSettings) -> str:
    """Return what to type where there is a checkpoint: not what would start over again."""
    command = "the same command" if settings.resume_from_checkpoint else "without --no-resume-from-checkpoint it"
    return f"{command} goes on from there"


def describe_job(settings: TrainSettings) -> dict[str, str]:
    """Return what the job page of a cluster's dashboard says of the run."""
    return {
        "run": settings.run_name or settings.save_path.name,
        "verifier": settings.verifier_name_or_path,
        "data_path": str(settings.data_path),
        "save_path": str(settings.save_path),
    }


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Return the settings with every path made absolute; a verifier or a draft that is a local folder too."""
    update: dict[str, Any] = {
        name: value.resolve() for name, value in settings.__dict__.items() if isinstance(value, StoragePath)
    }
    update["verifier_name_or_path"] = absolute_name(settings.verifier_name_or_path)
    if settings.from_pretrained is not None:
        update["from_pretrained"] = absolute_name(settings.from_pretrained)
    return settings.model_copy(update=update)


def open_run_folder(settings: TrainSettings) -> CommittedCheckpoint | None:
    """Make the run folder usable and return the checkpoint to go on from, if any.

    Raises:
        CheckpointError: A checkpoint in it is damaged.
    """
    save_dir = settings.save_path
    check_best_is_ours(save_dir)
    if not settings.resume_from_checkpoint:
        return None  # what is there goes only once nothing can be refused any more
    broken = mend_snapshot(save_dir)
    if broken is not None:
        say(f"Ray's list of checkpoints was damaged and is now {broken}; the checkpoints themselves are used")
    for folder in find_uncommitted(save_dir):
        say(f"{folder}: half-written, ignored", path=str(folder))
    latest = latest_committed(save_dir)
    if latest is not None and broken is None and not (save_dir / RAY_SNAPSHOT).exists():
        say(f"Ray's list of checkpoints is gone from {save_dir}; the checkpoints themselves are used")
    return latest


def clear_run_folder(settings: TrainSettings, needed_bytes: int) -> None:
    """Remove what the run does not want any more, once it is sure that a checkpoint finds room.

    Raises:
        CheckpointError: It does not; nothing whole was removed.
    """
    from eagle3_ray.training.disk_space import check_room, make_room

    save_dir = settings.save_path
    if settings.resume_from_checkpoint and not holds_dry_run(save_dir):
        for folder in make_room(save_dir, needed_bytes):
            say(f"{folder}: half-written, removed to make room", path=str(folder))
    else:
        check_room(save_dir, needed_bytes, find_own_folders(save_dir))
        remove_run(save_dir)
