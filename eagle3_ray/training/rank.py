"""What one rank holds while it trains, and how it comes to hold it."""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.bad_files import MAX_FILES_NAMED
from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.data.source import BinOrder
from eagle3_ray.loggers import MultiLogger, open_loggers
from eagle3_ray.machine import usable_cpus
from eagle3_ray.metrics import LEFT_OUT_STEPS, TRAIN
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.model.pretrained import read_pretrained, take_over
from eagle3_ray.model.verifier import VerifierInfo, VerifierTensors, load_verifier_tensors
from eagle3_ray.storage import StoragePath, telling
from eagle3_ray.training.checkpoint import restore_checkpoint
from eagle3_ray.training.ema import Ema, build_ema
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.meter import Meter
from eagle3_ray.training.metrics_file import MetricsFile
from eagle3_ray.training.optim import build_draft_optimizer
from eagle3_ray.training.preemption import PreemptionNotices
from eagle3_ray.training.pulses import Mark
from eagle3_ray.training.run_folder import METRICS, STATE, CommittedCheckpoint, check_same_run, latest_committed
from eagle3_ray.training.saver import Saver, as_ray_checkpoint
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.stagnation import NOT_VALIDATED, Stagnation
from eagle3_ray.training.startup import Laps
from eagle3_ray.training.step import StepResult, StepSettings
from eagle3_ray.training.telemetry import RayGauges, last_validation
from eagle3_ray.training.watch import Watch


class PendingStep(NamedTuple):
    """An update that is queued and of whose outcome the host has yet to learn.

    Attributes:
        step: Counted from 0 over all epochs and restarts.
        result: On its way.
    """

    step: int
    result: StepResult


@dataclass
class Rank:
    """One worker's state.

    Attributes:
        metrics_file: On rank 0 alone; it is one of the loggers too.
        ema: Of the weights; validated and served in their place.
        saver: Stores its checkpoints behind the training.
        step: Optimizer updates done, over all epochs and restarts.
        pending: The last update, until its outcome is learnt.
        grad_norm: Of the last update learnt of, before clipping.
        num_left_out: Updates left out, over all restarts, because a gradient was NaN or Inf.
        num_left_out_in_a_row: Those since the last that was made.
        metrics: Of the last logged point.
        stagnation: For how many epochs validation has not improved.
        owes_validation: The checkpoint it went on from was stored at the end of an epoch, without validation.
        is_listening: A step is made, and rank 0 listens for the driver's order to stop.
        stop_ordered: Set on rank 0 once the driver orders to stop.
        is_stopping: All ranks have agreed to save and stop.
        is_saving: All ranks have agreed to save now, in mid-epoch, since rank 0's clock says so.
        preemption_notices: Of nodes that are about to be taken away; rank 0 looks at them.
        laps: Where the time until its first step goes.
        watch: Over the ranks' progress.
    """

    number: int
    job: TrainJob
    draft: Eagle3Draft
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    target_head: TargetHead
    settings: StepSettings
    train_source: BinSource
    validation_source: BinSource | None
    meter: Meter
    metrics_file: MetricsFile | None
    loggers: MultiLogger
    saver: Saver
    step: int
    pending: PendingStep | None
    grad_norm: float
    num_left_out: int
    num_left_out_in_a_row: int
    metrics: dict[str, float]
    stagnation: Stagnation
    owes_validation: bool
    is_listening: bool
    stop_ordered: threading.Event
    is_stopping: bool
    is_saving: bool
    preemption_notices: PreemptionNotices
    laps: Laps
    watch: Watch

    @property
    def is_first(self) -> bool:
        """Rank 0 logs, tells the driver, and writes what is written once."""
        return self.number == 0


def start_rank(job: TrainJob) -> Rank:
    """Build this rank's part of the draft and restore the newest whole checkpoint, if there is one.

    collective: every rank calls it.

    Raises:
        CheckpointError: A checkpoint is there but is damaged or of another run; never a silent fresh start.
    """
    laps, settings, number = Laps(), job.settings, dist.get_rank()
    device = ray.train.torch.get_device()
    # A local Ray may have one CPU more than the machine, for the tasks beside the workers.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    compute_dtype = resolve_compute_dtype(settings.precision, device)
    tensors = load_verifier_tensors(job.verifier)
    checkpoint = latest_committed(job.save_dir)
    weights = begin_weights(job, tensors, is_new=checkpoint is None) if number == 0 else None
    draft = build_sharded_draft(job.draft_config, weights, device, compute_dtype)
    draft.recomputes_layers = settings.gradient_checkpointing
    optimizer, ema = build_draft_optimizer(draft, settings), build_ema(draft, settings.ema_decay)
    if checkpoint is not None:
        restore(job, checkpoint, draft, optimizer, ema)
    target_head = build_target_head(settings, job.verifier, job.mapping.kept_ids, tensors, device, compute_dtype)
    if job.draft_config.freeze_lm_head:
        share_head(draft, target_head)
    step = 0 if checkpoint is None else checkpoint.step
    metrics_file = MetricsFile(job.save_dir / METRICS, step) if number == 0 else None
    train_source = ray.get(job.train_source)
    validation_source = None if job.validation_source is None else ray.get(job.validation_source)

    def describe_bins(rank: int, mark: Mark) -> str:
        if mark.validation_step is None:
            return describe_files(train_source, job.schedule, mark.step, rank)
        assert validation_source is not None and job.validation_schedule is not None
        return describe_files(validation_source, job.validation_schedule, mark.validation_step, rank)

    return Rank(
        number=number,
        job=job,
        draft=draft,
        optimizer=optimizer,
        ema=ema,
        target_head=target_head,
        settings=build_step_settings(settings, device, compute_dtype),
        train_source=train_source,
        validation_source=validation_source,
        meter=Meter(settings.ttt_steps, device),
        metrics_file=metrics_file,
        loggers=open_rank_loggers(job, metrics_file, step),
        saver=Saver(job, draft, optimizer, ema),
        step=step,
        pending=None,
        grad_norm=0.0,
        num_left_out=0 if checkpoint is None else int(checkpoint.metrics.get(LEFT_OUT_STEPS, 0)),
        num_left_out_in_a_row=0,
        metrics={} if checkpoint is None else train_metrics(checkpoint.metrics),
        stagnation=NOT_VALIDATED if checkpoint is None else checkpoint.stagnation,
        owes_validation=checkpoint is not None and job.owes_validation(checkpoint),
        is_listening=False,
        stop_ordered=threading.Event(),
        is_stopping=False,
        is_saving=False,
        preemption_notices=PreemptionNotices(),
        laps=laps,
        watch=Watch(job.channel, number, settings.hang_timeout_s, describe_bins),
    )


def restore(
    job: TrainJob,
    checkpoint: CommittedCheckpoint,
    draft: Eagle3Draft,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> None:
    """Fill in what a checkpoint of the same run holds. collective. Errors as in `start_rank`."""
    check_same_run(checkpoint, job.identity)
    with contextlib.ExitStack() as copies:
        with telling(checkpoint.path):
            state_dir = copies.enter_context(share_state(checkpoint.path / STATE).as_directory())
        restore_checkpoint(Path(state_dir), draft, optimizer, ema)


def begin_weights(job: TrainJob, tensors: VerifierTensors, *, is_new: bool) -> dict[str, Tensor]:
    """Return every tensor of the draft before the first step, float32 on the CPU; a checkpoint overwrites them.

    Raises:
        PretrainedDraftError: The draft that a new run begins with cannot be read here.
    """
    weights = initial_weights(job.draft_config, tensors, job.mapping.kept_ids, job.settings.seed)
    if is_new and job.settings.from_pretrained is not None:
        pretrained = read_pretrained(job.settings.from_pretrained, job.draft_config, job.verifier)
        take_over(weights, pretrained, job.mapping.kept_ids, with_head=not job.settings.freeze_lm_head)
    return weights


def describe_files(source: BinSource, schedule: BinSchedule, step: int, rank: int | None = None) -> str:
    """Name the files of a step's bins, or of one rank's of them; the first twenty."""
    order = BinOrder(source, schedule)
    rows = range(step * schedule.rows_per_step, (step + 1) * schedule.rows_per_step)
    numbers = [order.number(row) for row in rows if rank is None or schedule.place(row).rank == rank]
    files = [path for number in numbers for path in source.paths_of_bin(number)]
    more = f" and {len(files) - MAX_FILES_NAMED} more" if len(files) > MAX_FILES_NAMED else ""
    return (", ".join(files[:MAX_FILES_NAMED]) or "no samples") + more


def share_state(path: StoragePath) -> ray.train.Checkpoint:
    """Return a folder as Ray Train fetches it from wherever it lies: once a node, for all ranks there.

    collective: Ray tells by the object, which must be one for all, that its copy is there already.
    """
    shared = [as_ray_checkpoint(path)]
    dist.broadcast_object_list(shared)
    return shared[0]


def train_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what was measured in training; what an older draft was validated at is left out."""
    return {name: value for name, value in metrics.items() if name.startswith(f"{TRAIN}/")}


def resolve_compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward: bf16 on GPUs and fp32 on CPUs unless the flag says otherwise."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def build_step_settings(settings: TrainSettings, device: torch.device, compute_dtype: torch.dtype) -> StepSettings:
    """Return what a step needs to know of the run's settings."""
    return StepSettings(
        num_ttt_steps=settings.ttt_steps,
        loss_decay=settings.ttt_step_loss_decay,
        noise_std=settings.noise_std,
        seed=settings.seed,
        max_grad_norm=settings.max_grad_norm,
        device=device,
        compute_dtype=compute_dtype,
    )


def build_target_head(
    settings: TrainSettings,
    verifier: VerifierInfo,
    kept_ids: Tensor,
    tensors: VerifierTensors,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> TargetHead:
    """Copy the kept rows of the verifier's head, the others if they are asked for, and its final norm but for v0.

    The samples of that format are normed already.
    """
    is_normed = settings.data_format_version == 0
    unsayable_weight = None
    if settings.mask_out_of_vocab_targets and len(kept_ids) < verifier.vocab_size:
        is_unsayable = torch.ones(verifier.vocab_size, dtype=torch.bool).index_fill_(0, kept_ids, 0)
        unsayable_weight = tensors.lm_head[is_unsayable].to(device, compute_dtype)
    return TargetHead(
        weight=tensors.lm_head[kept_ids].to(device, compute_dtype),
        norm_weight=None if is_normed else tensors.final_norm.to(device, compute_dtype),
        eps=verifier.rms_norm_eps,
        losses=settings.losses,
        logit_cap=verifier.logit_cap,
        unsayable_weight=unsayable_weight,
    )


def share_head(draft: Eagle3Draft, target_head: TargetHead) -> None:
    """Hold a frozen head once: it is made of the very rows that the targets come from."""
    draft.lm_head.weight.data = target_head.weight


def open_rank_loggers(job: TrainJob, metrics_file: MetricsFile | None, step: int) -> MultiLogger:
    """Open Ray's gauges and the loggers asked for on rank 0, beside its file, and none elsewhere."""
    if metrics_file is None:
        return MultiLogger(())
    settings = job.settings
    run_name = settings.run_name or settings.save_path.name
    chosen = open_loggers(
        names=settings.logger_names,
        log_dir=settings.log_dir,
        run_name=run_name,
        project="eagle3_ray",
        settings=settings.model_dump(mode="json"),
        resume_step=step,
        run_ids_dir=settings.save_path,
    )
    gauges = RayGauges(run_name, str(settings.save_path))
    gauges.log(last_validation(settings.save_path), step)
    return MultiLogger((metrics_file, gauges, chosen))
