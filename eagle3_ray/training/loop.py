"""The story of one rank: restore, stream, step, log, validate, save."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Mapping

import ray.train
import torch
from ray.data import DataIterator

from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.pipeline import BinSource, StepBins, iter_step_bins
from eagle3_ray.errors import on_top
from eagle3_ray.metrics import LEFT_OUT_STEPS, TRAIN, VAL, summarize, summarize_spread
from eagle3_ray.storage import write_atomically
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.meter import Meter, Spread
from eagle3_ray.training.optim import scheduled_rate, set_learning_rate
from eagle3_ray.training.outcome import learn_outcome
from eagle3_ray.training.progress import Note, StepProgress
from eagle3_ray.training.pulses import Mark
from eagle3_ray.training.rank import PendingStep, Rank, start_rank
from eagle3_ray.training.ready import ReadyBin, make_ready
from eagle3_ray.training.run_folder import INITIAL_METRICS, epoch_folder, step_folder
from eagle3_ray.training.step import Wishes, eval_step, sum_over_ranks, train_step
from eagle3_ray.versions import installed_versions

# Each look waits for the device; a stop waits for so many.
STOP_EVERY_VALIDATION_STEPS = 8


@on_top()
def run_rank(job: TrainJob) -> None:
    """Train until the run is complete. Every rank of the TorchTrainer runs this, and again after a restart.

    collective: the ranks take every branch alike; they differ only in the bins they hold.
    """
    rank = start_rank(job)
    rank.laps.end("model")
    with contextlib.closing(rank.loggers), rank.saver, rank.watch:
        items = iter_train_bins(rank)  # read from now on, while the draft is validated
        if rank.step == 0:
            record_untrained(rank)
        elif rank.owes_validation:
            finish_epoch(rank)
        rank.laps.end("validation")
        rank.meter.restart_clock()
        for item in () if job.has_stagnated(rank.stagnation) else items:
            if job.settings.dry_run:
                save(rank, step_folder(0), {})
                break
            rank.saver.check()
            update(rank, item)
            is_last, is_epoch_end = rank.step == job.stop_step, rank.step % job.schedule.steps_per_epoch == 0
            if is_last or is_epoch_end or rank.is_stopping or is_due(rank.step, job.settings.log_every_steps):
                log_progress(rank)
            if is_epoch_end:
                finish_epoch(rank)
            elif is_last:
                save(rank, step_folder(rank.step), validate(rank))
            elif rank.is_stopping or rank.is_saving or is_due(rank.step, job.settings.checkpoint_every_steps):
                save(rank, step_folder(rank.step), {})
            if rank.is_stopping or job.has_stagnated(rank.stagnation):
                break
            rank.meter.restart_clock()
    job.channel.flush()


def is_due(step: int, every: int | None) -> bool:
    """Tell whether something done every so many steps is due after `step` updates."""
    return every is not None and step % every == 0


def iter_train_bins(rank: Rank) -> Iterator[StepBins[ReadyBin]]:
    """Stream this rank's bins from the first step not yet done to the last."""
    steps = range(rank.step, rank.job.stop_step)
    shard = None if rank.job.settings.is_elastic else ray.train.get_dataset_shard("train")
    return iter_bins(rank, shard, rank.train_source, rank.job.schedule, steps)


def iter_bins(
    rank: Rank, shard: DataIterator | None, source: BinSource, schedule: BinSchedule, steps: range
) -> Iterator[StepBins[ReadyBin]]:
    """Stream this rank's bins of some steps, laid out and on the device: those it is dealt, or by the schedule."""
    settings = rank.settings
    prepare = functools.partial(
        make_ready,
        num_ttt_steps=settings.num_ttt_steps,
        num_layers=len(rank.draft.layers),
        device=settings.device,
        sliding_window=rank.job.draft_config.layer.sliding_window,
    )
    is_gpu, pack_in = settings.device.type == "cuda", rank.job.settings.pack_in
    items = iter_step_bins(
        shard,
        source,
        schedule,
        rank.number,
        steps,
        pack_in,
        prepare,
        leave_out=rank.job.leave_out_bad_file,
        pin_memory=is_gpu,
    )
    return watched(rank, items, validates=source is rank.validation_source)


def watched(rank: Rank, items: Iterator[StepBins[ReadyBin]], *, validates: bool) -> Iterator[StepBins[ReadyBin]]:
    """Yield what is streamed, and say before and after each that there is progress."""
    for number in itertools.count():
        validation_step = number if validates else None
        rank.watch.mark(Mark(rank.step, validation_step, is_reading=True))
        item = next(items, None)
        if item is None:
            return
        rank.watch.mark(Mark(rank.step, validation_step))
        yield item


def update(rank: Rank, item: StepBins[ReadyBin]) -> None:
    """Make one optimizer update; while the device is at it, learn how the one before went.

    Raises:
        NonFiniteError: See `learn_outcome`.
    """
    assert item.step == rank.step
    job, settings = rank.job, rank.job.settings
    set_learning_rate(rank.optimizer, scheduled_rate(settings, rank.step, job.schedule.total_steps))
    epoch = rank.step // job.schedule.steps_per_epoch
    result = train_step(
        rank.draft,
        rank.optimizer,
        rank.target_head,
        item.bins,
        epoch,
        rank.settings,
        Wishes(stop=rank.stop_ordered.is_set(), save=rank.saver.is_due() or must_save_now(rank)),
        rank.ema,
    )
    learn_outcome(rank)
    rank.pending = PendingStep(rank.step, result)
    rank.step += 1
    if not rank.is_listening:
        begin_listening(rank, item.wait_s)
    rank.meter.add(result.sums, sum(ready.num_tokens for ready in item.bins), item.wait_s)


def must_save_now(rank: Rank) -> bool:
    """Tell, on rank 0, whether a node is about to be taken away, and tell the user so; of each node once."""
    notice = rank.preemption_notices.read_new() if rank.is_first else None
    if notice is None:
        return False
    rank.job.channel.tell(Note(f"{notice}: saving after this step", "preemption"))
    return True


def begin_listening(rank: Rank, wait_s: float) -> None:
    """Once the first step is made, have rank 0 tell how long that took, and listen for an order to stop. collective.

    Not before: until a step is made there is nothing to save, and the driver stops the run by itself.
    """
    learn_outcome(rank)
    rank.is_listening = True
    if rank.is_first:
        rank.job.channel.listen_for_stop(rank.stop_ordered)
        rank.job.channel.tell(rank.laps.first_step(wait_s))


def log_progress(rank: Rank) -> None:
    """Reduce what was summed since the last logged point, log it, and tell the driver. collective."""
    job = rank.job
    learn_outcome(rank)
    sums, speed = rank.meter.reduce()
    rank.metrics = summarize(sums, job.settings.ttt_step_loss_decay, TRAIN)
    rank.metrics |= {f"{TRAIN}/{name}": value for name, value in speed.items()}
    rank.metrics[f"{TRAIN}/lr"] = rank.optimizer.param_groups[0]["lr"]
    rank.metrics[f"{TRAIN}/grad_norm"] = rank.grad_norm
    rank.metrics[f"{TRAIN}/step"] = float(rank.step)
    rank.metrics[LEFT_OUT_STEPS] = float(rank.num_left_out)
    rank.metrics[f"{TRAIN}/epoch"] = rank.step / job.schedule.steps_per_epoch
    rank.metrics[f"{TRAIN}/progress_frac"] = rank.step / job.stop_step
    rank.loggers.log(rank.metrics, rank.step)
    if rank.is_first:
        epoch, step_of_epoch = divmod(rank.step - 1, job.schedule.steps_per_epoch)
        steps_per_epoch = job.schedule.steps_per_epoch
        job.channel.tell(
            StepProgress(
                epoch, job.settings.epochs, rank.step, step_of_epoch + 1, steps_per_epoch, metrics=dict(rank.metrics)
            )
        )


def finish_epoch(rank: Rank) -> None:
    """Validate and save after the last step of an epoch. collective.

    A run that is stopping saves as within an epoch: the validation is made up for when it goes on.
    """
    validation = validate(rank)
    rank.stagnation = rank.stagnation.after(validation)
    epoch = rank.step // rank.job.schedule.steps_per_epoch - 1
    owes_validation = rank.is_stopping and rank.job.validation_schedule is not None
    save(rank, step_folder(rank.step) if owes_validation else epoch_folder(epoch), validation)


def validate(rank: Rank) -> dict[str, float]:
    """Run every validation bin through the draft, log the means over all of them, and return them. collective.

    With a moving average of the weights, by that. Nothing is returned if the run is stopping, or is told to meanwhile.
    """
    job = rank.job
    if job.validation_schedule is None or rank.validation_source is None or rank.is_stopping:
        return {}
    num_ttt_steps, device = job.settings.ttt_steps, rank.settings.device
    meter, spread = Meter(num_ttt_steps, device), Spread(num_ttt_steps, device)
    steps = range(job.validation_schedule.steps_per_epoch)
    with contextlib.nullcontext() if rank.ema is None else rank.ema.in_place():
        for item in iter_bins(rank, None, rank.validation_source, job.validation_schedule, steps):
            if item.step % STOP_EVERY_VALIDATION_STEPS == 0 and agree_to_stop(rank):
                return {}
            for ready in item.bins:
                sums = eval_step(rank.draft, rank.target_head, ready, rank.settings)
                meter.add(sums, ready.num_tokens, item.wait_s)
                spread.add(sums)
    totals, _ = meter.reduce()
    metrics = summarize(totals, job.settings.ttt_step_loss_decay, VAL) | summarize_spread(spread.reduce())
    rank.loggers.log(metrics, rank.step)
    return metrics


def agree_to_stop(rank: Rank) -> bool:
    """Tell whether the run is told to stop while it validates, which no step's reduction can carry. collective."""
    # sync: the host must know.
    own = torch.tensor(float(rank.stop_ordered.is_set()), device=rank.settings.device)
    rank.is_stopping = bool(sum_over_ranks(own))
    return rank.is_stopping


def record_untrained(rank: Rank) -> None:
    """Validate the draft as it was initialised, for comparison. collective."""
    metrics = validate(rank)
    if rank.is_first:
        write_atomically(rank.job.save_dir / INITIAL_METRICS, json.dumps(metrics, indent=1) + "\n")


def save(rank: Rank, name: str, validation: Mapping[str, float]) -> None:
    """Copy the state to host memory, from where a checkpoint is stored while the training goes on. collective."""
    learn_outcome(rank)
    rank.is_saving = False  # what was ordered until now is done here
    rank.watch.mark(Mark(rank.step, None, is_saving=True))
    record = {
        "step": rank.step,
        "metrics": {**rank.metrics, LEFT_OUT_STEPS: float(rank.num_left_out), **validation},
        "stagnation": rank.stagnation._asdict(),
        "identity": dict(rank.job.identity),
        "settings": rank.job.settings.model_dump(mode="json"),
        "num_workers": rank.job.schedule.num_workers,
        "versions": installed_versions(),
    }
    if rank.metrics_file is not None:
        rank.metrics_file.store()
    rank.saver.save(name, record)
