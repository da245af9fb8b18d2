"""`train`: decide the run on the driver, then let a TorchTrainer carry it out.

Everything that can be refused is refused here, before any worker starts: verifier, cluster, samples, vocabulary
mapping, checkpoints of another run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from eagle3_ray import BEGAN_S
from eagle3_ray.config import TrainSettings
from eagle3_ray.console import say
from eagle3_ray.data.index import SampleIndex, build_index, split_index
from eagle3_ray.data.packing import BinSchedule, PackingPlan, plan_bins
from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.data.vocab import VocabMapping, write_mapping
from eagle3_ray.errors import DataError
from eagle3_ray.jobs.cluster import WorkerRequest, check_outlives_job, check_shared_memory, choose_workers, ray_session
from eagle3_ray.jobs.fit import fit
from eagle3_ray.jobs.vocab_mapping import resolve_mapping
from eagle3_ray.model.config import DraftConfig, build_draft_config
from eagle3_ray.model.verifier import VerifierInfo, absolute_name, load_final_norm, read_verifier_config
from eagle3_ray.settings_file import write_run_yaml
from eagle3_ray.stopping import Stopped, as_stopped
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.channel import Channel
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.progress import ProgressBoard
from eagle3_ray.training.run_folder import (
    BEST,
    RUN_YAML,
    CommittedCheckpoint,
    check_best_is_ours,
    check_same_run,
    check_writable,
    find_uncommitted,
    follow_best,
    latest_committed,
    remove_run,
    set_aside_broken_snapshot,
)
from eagle3_ray.training.startup import Laps


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
        verifier = read_verifier_config(settings.verifier_name_or_path)
        laps.end("verifier")
        with ray_session(job_metadata=describe_job(settings)), ProgressBoard(laps) as board:
            laps.end("Ray")
            job = carry_out(settings, verifier, board.channel, laps)
    best = settings.save_path / BEST
    chosen = follow_best(best)
    say(
        f"done: {job.stop_step} steps; best draft {best} -> {chosen.name}",
        "done",
        step=job.stop_step,
        best=str(chosen),
    )


def carry_out(settings: TrainSettings, verifier: VerifierInfo, channel: Channel, laps: Laps) -> TrainJob:
    """Decide the run, and do what is left of it. Errors as in `run`."""
    workers = choose_workers(settings.num_workers, settings.use_gpu)
    checkpoint = open_run_folder(settings)
    job = decide_job(settings, verifier, workers, checkpoint, channel, laps)
    if checkpoint is not None:
        check_same_run(checkpoint, job.identity)
        text = f"going on from {checkpoint.path} (step {checkpoint.step} of {job.stop_step})"
        say(text, "resume", step=checkpoint.step, path=str(checkpoint.path))
    if checkpoint is None or not job.is_complete(checkpoint):
        if not settings.resume_from_checkpoint:
            remove_run(settings.save_path)
        write_run_yaml(settings, settings.save_path / RUN_YAML)
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
    """Return the settings with every path made absolute; a verifier that is a local folder too."""
    update: dict[str, Any] = {
        name: value.resolve() for name, value in settings.__dict__.items() if isinstance(value, StoragePath)
    }
    update["verifier_name_or_path"] = absolute_name(settings.verifier_name_or_path)
    return settings.model_copy(update=update)


def open_run_folder(settings: TrainSettings) -> CommittedCheckpoint | None:
    """Make the run folder usable and return the checkpoint to go on from, if any.

    Raises:
        CheckpointError: The folder cannot be written, or a checkpoint in it is damaged.
    """
    save_dir = settings.save_path
    check_writable(save_dir)
    check_best_is_ours(save_dir)
    if not settings.resume_from_checkpoint:
        return None  # what is there goes only once nothing can be refused any more
    broken = set_aside_broken_snapshot(save_dir)
    if broken is not None:
        say(f"Ray's list of checkpoints was damaged and is now {broken}; the checkpoints themselves are used")
    for folder in find_uncommitted(save_dir):
        say(f"{folder}: half-written, ignored", path=str(folder))
    return latest_committed(save_dir)


def decide_job(
    settings: TrainSettings,
    verifier: VerifierInfo,
    workers: WorkerRequest,
    checkpoint: CommittedCheckpoint | None,
    channel: Channel,
    laps: Laps,
) -> TrainJob:
    """Read the samples' index, the mapping and the plan, and fix everything a rank needs to know."""
    aux_layer_ids = resolve_aux_layer_ids(settings, verifier)
    spec = SampleSpec(
        data_format_version=settings.data_format_version,
        hidden_size=verifier.hidden_size,
        num_aux_layers=len(aux_layer_ids),
        vocab_size=verifier.vocab_size,
        final_norm_weight=load_final_norm(verifier).float(),
        rms_norm_eps=verifier.rms_norm_eps,
    )
    if settings.pack_in == "task":
        state_bytes = 2 * spec.hidden_size * (spec.num_aux_layers + 1)  # of a token, in bf16
        check_shared_memory(settings.total_seq_len * state_bytes)
    index = build_index(str(settings.data_path), spec)
    laps.end("index")
    mapping = resolve_and_write_mapping(settings, verifier)
    train_index, validation_index = split_index(index, settings.train_frac, settings.seed)
    plan, validation_plan = plan_samples(train_index, settings), plan_samples(validation_index, settings)
    if not plan.bins:
        raise DataError(f"{settings.data_path}: no training sample has a supervised token. Check the loss masks.")
    describe_data(index, plan, validation_plan)
    draft_config = build_draft_config(verifier, settings, len(mapping.draft_to_verifier_offset), aux_layer_ids)
    schedule = BinSchedule(
        num_bins=len(plan.bins),
        bins_per_step=settings.bins_per_step or saved_bins_per_step(checkpoint) or workers.num_workers,
        num_workers=workers.num_workers,
        epochs=settings.epochs,
    )
    has_validation = len(validation_plan.bins) > 0
    return TrainJob(
        settings=settings,
        verifier=verifier,
        draft_config=draft_config,
        mapping=mapping,
        train_source=ray.put(BinSource(spec, train_index, plan, settings.seed)),
        validation_source=ray.put(BinSource(spec, validation_index, validation_plan, settings.seed))
        if has_validation
        else None,
        schedule=schedule,
        validation_schedule=BinSchedule(len(validation_plan.bins), workers.num_workers, workers.num_workers, 1)
        if has_validation
        else None,
        stop_step=min(schedule.total_steps, settings.max_steps or schedule.total_steps),
        identity=run_identity(settings, draft_config, mapping, plan, schedule),
        channel=channel,
    )


def resolve_aux_layer_ids(settings: TrainSettings, verifier: VerifierInfo) -> tuple[int, ...]:
    """Return the auxiliary layers in serving numbering: from the flag, else from data_config.json, else the default.

    Raises:
        DataError: The flag contradicts data_config.json.
        VerifierError: The ids do not suit the verifier.
    """
    recorded = read_recorded_layer_ids(settings.data_path)
    given = settings.aux_layer_ids
    if given is not None and recorded is not None and given != recorded:
        raise DataError(
            f"{settings.data_path}: data_config.json says the samples hold layers {list(recorded)}, "
            f"--aux-layer-ids says {list(given)}. Leave the flag out, or correct one of them."
        )
    ids = given or recorded or verifier.default_aux_layer_ids()
    verifier.check_aux_layer_ids(ids)
    return ids


def read_recorded_layer_ids(data_path: StoragePath) -> tuple[int, ...] | None:
    """Return the layers named by the data_config.json that `generate` leaves beside its samples, or None.

    Raises:
        DataError: The file is damaged, or numbers layers in another way.
    """
    path = data_path / "data_config.json"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if "aux_layer_ids" not in recorded:
            return None
        numbering, ids = recorded["aux_layer_numbering"], tuple(int(i) for i in recorded["aux_layer_ids"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}). Name the layers with --aux-layer-ids elsewhere."
        ) from error
    if numbering != "serving":
        raise DataError(f"{path}: numbers layers as {numbering!r}, expected 'serving' (id k is what enters layer k).")
    return ids


def resolve_and_write_mapping(settings: TrainSettings, verifier: VerifierInfo) -> VocabMapping:
    """Return the vocabulary mapping; one that was computed is written to its paths if nothing lies there."""
    mapping = resolve_mapping(settings, verifier.vocab_size)
    if not settings.d2t_path.exists() and not settings.t2d_path.exists():
        write_mapping(mapping, str(settings.d2t_path), str(settings.t2d_path))
        say(f"draft vocabulary of {len(mapping.kept_ids):,} written to {settings.d2t_path} and {settings.t2d_path}")
    return mapping


def plan_samples(index: SampleIndex, settings: TrainSettings) -> PackingPlan:
    """Pack one part of the split."""
    return plan_bins(index.num_tokens, index.num_supervised, settings.total_seq_len, settings.seed)


def describe_data(index: SampleIndex, plan: PackingPlan, validation_plan: PackingPlan) -> None:
    """Tell the user what was found and what was left out."""
    num_dropped, num_cut = plan.num_dropped + validation_plan.num_dropped, plan.num_cut + validation_plan.num_cut
    say(
        f"{len(index.paths):,} samples, {int(index.num_tokens.sum()):,} tokens; {len(plan.bins):,} bins to train on "
        f"({plan.fill_frac:.1%} filled), {len(validation_plan.bins):,} to validate on",
        "data",
        samples=len(index.paths),
        tokens=int(index.num_tokens.sum()),
        bins=len(plan.bins),
        validation_bins=len(validation_plan.bins),
        dropped=num_dropped,
        cut=num_cut,
    )
    if num_dropped:
        say(f"  {num_dropped:,} samples have no supervised token and are left out")
    if num_cut:
        say(f"  {num_cut:,} samples are longer than a bin and are cut at {plan.total_seq_len:,} tokens")


def saved_bins_per_step(checkpoint: CommittedCheckpoint | None) -> int | None:
    """Return the bins per step a resumed run began with: it keeps them, whatever its number of workers is now."""
    return None if checkpoint is None else int(checkpoint.identity["bins_per_step"])


def run_identity(
    settings: TrainSettings, draft_config: DraftConfig, mapping: VocabMapping, plan: PackingPlan, schedule: BinSchedule
) -> Mapping[str, Any]:
    """Return what a checkpoint must share with a run to be resumed by it: the draft, its vocabulary, the trajectory."""
    draft = draft_config.to_speculators()
    draft.pop("speculators_config")
    return {
        "draft": draft,
        "verifier": Path(draft_config.verifier_name_or_path).name,
        "vocabulary": mapping.digest(),
        "plan": plan.digest,
        "bins_per_step": schedule.bins_per_step,
        "seed": settings.seed,
        "data_format_version": settings.data_format_version,
        "ttt_steps": settings.ttt_steps,
    }
