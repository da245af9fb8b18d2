"""What a run would take that `train` would carry out: steps, disk, memory, time. Estimates say that they are."""

import dataclasses
import shutil

import torch

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.packing import BinSchedule, PackingPlan
from eagle3_ray.data.source import BinSource
from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.jobs.cluster import WorkerRequest, cluster_resources, counted
from eagle3_ray.jobs.decide import SplitPlan, build_schedule, resolve_sample_spec, resolve_stop_step
from eagle3_ray.jobs.findings import Seen
from eagle3_ray.jobs.nodes import NodeReport
from eagle3_ray.machine import usable_cpus
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.storage import ObjectPath, StoragePath
from eagle3_ray.training.disk_space import check_room, checkpoint_bytes
from eagle3_ray.training.estimate import BinSize, estimate_memory
from eagle3_ray.training.rank import resolve_compute_dtype
from eagle3_ray.training.run_folder import CommittedCheckpoint
from eagle3_ray.training.trial import time_steps


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Which steps are left.

    Attributes:
        schedule: Of the run.
        start_step: Steps that are done.
        stop_step: Steps after which it ends or pauses.
    """

    schedule: BinSchedule
    start_step: int
    stop_step: int


def see_steps(
    settings: TrainSettings, plan: PackingPlan, workers: WorkerRequest, checkpoint: CommittedCheckpoint | None
) -> Seen[Outlook]:
    """Tell how many steps there are, and whether workers would idle in some."""
    schedule = build_schedule(settings, plan, workers, checkpoint)
    outlook = Outlook(schedule, 0 if checkpoint is None else checkpoint.step, resolve_stop_step(settings, schedule))
    found = (
        f"{counted(schedule.steps_per_epoch, 'step')} of {counted(schedule.bins_per_step, 'bin')} an epoch, "
        f"{schedule.total_steps:,} in {counted(schedule.epochs, 'epoch')}"
    )
    if outlook.stop_step < schedule.total_steps:
        found += f"; pauses after step {outlook.stop_step:,}"
    fields = {
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.total_steps,
        "stop_step": outlook.stop_step,
        "bins_per_step": schedule.bins_per_step,
    }
    advice = ""
    if schedule.bins_per_step % workers.num_workers:
        advice = (
            f"Some of the {workers.num_workers} workers idle in every step: make --bins-per-step a multiple of them."
        )
    elif schedule.num_bins < schedule.bins_per_step:
        advice = f"There is no more than {counted(schedule.num_bins, 'bin')}: take fewer workers, or more samples."
    return Seen(outlook, found, advice, (), fields)


def see_disk(
    folder: StoragePath, config: DraftConfig, settings: TrainSettings, workers: WorkerRequest, outlook: Outlook
) -> Seen[None]:
    """Compare what the run's checkpoints take with what is free.

    Raises:
        CheckpointError: Not even one has room.
    """
    one_bytes = checkpoint_bytes(config, workers.num_workers, settings)
    number = num_kept_checkpoints(settings, len(checkpoint_steps(settings, outlook)))
    taken = f"{counted(number, 'checkpoint')} of {tell_bytes(one_bytes)} would take {tell_bytes(number * one_bytes)}"
    fields: dict[str, object] = {"checkpoint_bytes": one_bytes, "checkpoints": number}
    if isinstance(folder, ObjectPath):
        return Seen(None, f"{taken} of the object store", fields=fields)
    free_bytes = shutil.disk_usage(folder).free
    fields["free_bytes"] = free_bytes
    if number:
        check_room(folder, one_bytes)
    found = f"{taken}; {tell_bytes(free_bytes)} are free in {folder}"
    if free_bytes < number * one_bytes:
        return Seen(None, found, "Make room, save less often, or have old ones removed: --keep-last 3.", (), fields)
    return Seen(None, found, fields=fields)


def num_kept_checkpoints(settings: TrainSettings, number: int) -> int:
    """Return how many of the run's checkpoints lie on the disk at a time: one is written before another goes."""
    if settings.keep_last is None:
        return number
    return min(number, settings.keep_last + int(settings.keep_best) + 1)


def checkpoint_steps(settings: TrainSettings, outlook: Outlook) -> set[int]:
    """Return the steps after which a checkpoint is stored: each epoch's last, the run's last, and those in between."""
    per_epoch, end = outlook.schedule.steps_per_epoch, outlook.stop_step + 1
    steps = {*range(per_epoch, end, per_epoch), outlook.stop_step}
    if settings.checkpoint_every_steps is not None:
        steps |= {*range(settings.checkpoint_every_steps, end, settings.checkpoint_every_steps)}
    return {step for step in steps if step > outlook.start_step}


def see_memory(
    settings: TrainSettings,
    config: DraftConfig,
    split: SplitPlan,
    workers: WorkerRequest,
    outlook: Outlook,
    reports: list[NodeReport],
) -> Seen[None]:
    """Estimate what a worker's GPU, or its process, takes at its peak, and compare it with the smallest there is."""
    device = torch.device("cuda" if workers.use_gpu else "cpu")
    dtype = resolve_compute_dtype(settings.precision, device)
    fewest = workers.min_workers or workers.num_workers  # each has most to hold then
    size = largest_bin(split, settings.ttt_steps, dataclasses.replace(outlook.schedule, num_workers=fewest).micro_steps)
    estimate = estimate_memory(config, size, fewest, device, dtype, settings)
    place = "GPU" if workers.use_gpu else "process"
    found = (
        f"a worker's {place} takes about {tell_bytes(estimate.peak_bytes)} at its peak, by an estimate, beside what "
        "torch and Ray take themselves"
    )
    parts = {
        "weights": estimate.weights_bytes,
        "optimizer": estimate.optimizer_bytes,
        "its copies in the compute dtype": estimate.copies_bytes,
        "gradients": estimate.gradients_bytes,
        f"activations of {size.num_tokens:,} tokens": estimate.activations_bytes,
        "bins ahead": estimate.bins_bytes,
        f"copy for checkpoints{' (host)' if workers.use_gpu else ''}": estimate.checkpoint_bytes,
    }
    details = [", ".join(f"{name} {tell_bytes(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)]
    if workers.use_gpu:
        available_bytes = min((report.gpu_bytes for report in reports if report.gpu_bytes is not None), default=None)
    else:
        available_bytes = int(cluster_resources()["memory"]) // workers.num_workers
    fields = {**dataclasses.asdict(estimate), "available_bytes": available_bytes}
    if available_bytes is None:
        return Seen(None, found, "", details, fields)
    found += f"; it has {tell_bytes(available_bytes)}"
    if estimate.peak_bytes > available_bytes:
        first = "Lower" if settings.gradient_checkpointing else "Pass --gradient-checkpointing, or lower"
        advice = f"{first} --total-seq-len or --ttt-steps; more workers share weights and optimizer."
        return Seen(None, f"{found}.", advice, details, fields)
    return Seen(None, found, "", details, fields)


def largest_bin(split: SplitPlan, num_ttt_steps: int, num_per_step: int) -> BinSize:
    """Return the most that any training bin has of tokens and of supervised positions, and the rows these may need.

    A run of supervised positions needs a row more for each later TTT step; one run a sample is assumed.
    """
    total_seq_len = split.plan.total_seq_len
    num_tokens = num_targets = num_samples = 0
    for members in split.plan.bins:
        index = split.train_index
        num_tokens = max(num_tokens, int((index.num_tokens[members] - 1).sum()))
        num_targets = max(num_targets, int(index.num_supervised[members].sum()))
        num_samples = max(num_samples, len(members))
    num_tokens, num_targets = min(num_tokens, total_seq_len), min(num_targets, total_seq_len)
    num_rows = min(num_tokens, num_targets + (num_ttt_steps - 1) * num_samples)
    return BinSize(num_tokens, num_targets, num_rows, num_per_step)


def see_time(
    settings: TrainSettings,
    verifier: VerifierInfo,
    config: DraftConfig,
    mapping: VocabMapping | None,
    split: SplitPlan,
    workers: WorkerRequest,
    outlook: Outlook,
    num_steps: int,
) -> Seen[None]:
    """Time some steps on the plan's first bin here, with as many threads or the GPU that a worker has."""
    if workers.use_gpu and not torch.cuda.is_available():
        found = "workers would have GPUs, this process has none to time a step on."
        return Seen(None, found, "Run doctor where there is one: `ray job submit --entrypoint-num-gpus 1`.")
    source = BinSource(
        resolve_sample_spec(settings, verifier, config.aux_layer_ids), split.train_index, split.plan, settings.seed
    )
    kept_ids = torch.arange(config.draft_vocab_size) if mapping is None else mapping.kept_ids
    device = torch.device("cuda" if workers.use_gpu else "cpu")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(min(workers.cpus_per_worker, usable_cpus()))
    try:
        trial = time_steps(settings, verifier, config, kept_ids, source.read_bin(0, 0), device, num_steps)
    finally:
        torch.set_num_threads(num_threads)
    num_tokens = round(split.plan.fill_frac * len(split.plan.bins) * split.plan.total_seq_len)
    epoch_s = num_tokens / (trial.tokens_per_s * workers.num_workers)
    found = (
        f"{trial.step_s:.3g} s a step with a bin of {trial.num_tokens:,} tokens, {trial.tokens_per_s:,.0f} tokens/s; "
        f"{tell_seconds(epoch_s)} an epoch, {tell_seconds(epoch_s * settings.epochs)} for {settings.epochs}, beside "
        "validation, checkpoints and the workers' exchange"
    )
    return Seen(None, found, fields={"step_s": trial.step_s, "tokens_per_s": trial.tokens_per_s, "epoch_s": epoch_s})


def tell_bytes(num_bytes: float) -> str:
    """Return a size in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


def tell_seconds(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} seconds"
