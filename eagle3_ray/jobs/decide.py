"""What `train` decides before any worker starts; whatever can be refused is refused here: samples, mapping, plan."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray

from eagle3_ray.config import TrainSettings
from eagle3_ray.console import say
from eagle3_ray.data.index import SampleIndex, split_index
from eagle3_ray.data.packing import BinSchedule, PackingPlan, plan_bins
from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.data.vocab import VocabMapping, write_mapping
from eagle3_ray.errors import DataError
from eagle3_ray.jobs.cluster import WorkerRequest, check_shared_memory
from eagle3_ray.jobs.samples import choose_samples, tell_left_out
from eagle3_ray.jobs.vocab_mapping import resolve_mapping, takes_pretrained_vocabulary
from eagle3_ray.model.config import DraftConfig, build_draft_config
from eagle3_ray.model.pretrained import PretrainedDraft, read_pretrained
from eagle3_ray.model.verifier import VerifierInfo, load_final_norm
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.channel import Channel
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.run_folder import CommittedCheckpoint
from eagle3_ray.training.startup import Laps


def decide_job(
    settings: TrainSettings,
    verifier: VerifierInfo,
    workers: WorkerRequest,
    checkpoint: CommittedCheckpoint | None,
    channel: Channel,
    laps: Laps,
    quarantine: Quarantine,
) -> TrainJob:
    """Read the samples' index, the mapping and the plan, and fix everything a rank needs to know."""
    aux_layer_ids = resolve_aux_layer_ids(settings, verifier)
    spec = resolve_sample_spec(settings, verifier, aux_layer_ids)
    check_bins_fit(settings, verifier, aux_layer_ids)
    pretrained = read_pretrained_if_needed(settings, verifier, aux_layer_ids, checkpoint)
    index = choose_samples(settings, spec, checkpoint, quarantine)
    tell_left_out(quarantine)
    laps.end("index")
    mapping = resolve_and_write_mapping(settings, verifier, quarantine.paths, pretrained)
    if pretrained is not None and checkpoint is None:
        tell_pretrained(pretrained, mapping, with_head=not settings.freeze_lm_head)
    train_index, validation_index, plan, validation_plan = plan_split(index, settings)
    describe_data(index, plan, validation_plan)
    draft_config = build_draft_config(verifier, settings, len(mapping.draft_to_verifier_offset), aux_layer_ids)
    schedule = build_schedule(settings, plan, workers, checkpoint)
    has_validation, left_out = len(validation_plan.bins) > 0, quarantine.left_out_of_bins
    return TrainJob(
        settings=settings,
        verifier=verifier,
        draft_config=draft_config,
        mapping=mapping,
        train_source=ray.put(BinSource(spec, train_index, plan, settings.seed, left_out)),
        validation_source=ray.put(BinSource(spec, validation_index, validation_plan, settings.seed, left_out))
        if has_validation
        else None,
        schedule=schedule,
        validation_schedule=BinSchedule(len(validation_plan.bins), workers.num_workers, workers.num_workers, 1)
        if has_validation
        else None,
        stop_step=resolve_stop_step(settings, schedule),
        identity=run_identity(settings, draft_config, mapping, plan, schedule),
        channel=channel,
    )


def resolve_sample_spec(settings: TrainSettings, verifier: VerifierInfo, aux_layer_ids: tuple[int, ...]) -> SampleSpec:
    """Return what the samples must look like. Errors as in `load_final_norm`."""
    return SampleSpec(
        data_format_version=settings.data_format_version,
        hidden_size=verifier.hidden_size,
        num_aux_layers=len(aux_layer_ids),
        vocab_size=verifier.vocab_size,
        final_norm_weight=load_final_norm(verifier).float(),
        rms_norm_eps=verifier.rms_norm_eps,
    )


def check_bins_fit(settings: TrainSettings, verifier: VerifierInfo, aux_layer_ids: tuple[int, ...]) -> None:
    """Refuse to send bins through an object store that could not hold one. Errors as in `check_shared_memory`."""
    if settings.pack_in == "task":
        state_bytes = 2 * verifier.hidden_size * (len(aux_layer_ids) + 1)  # of a token, in bf16
        check_shared_memory(settings.total_seq_len * state_bytes)


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


def read_pretrained_if_needed(
    settings: TrainSettings,
    verifier: VerifierInfo,
    aux_layer_ids: tuple[int, ...],
    checkpoint: CommittedCheckpoint | None,
) -> PretrainedDraft | None:
    """Return the draft that a new run begins with, if one is named. Errors as in `read_pretrained`.

    A run that goes on has weights of its own; it is read for one whose vocabulary is in no file.
    """
    is_needed = checkpoint is None or takes_pretrained_vocabulary(settings)
    if settings.from_pretrained is None or not is_needed:
        return None
    shape = build_draft_config(verifier, settings, verifier.vocab_size, aux_layer_ids)
    return read_pretrained(settings.from_pretrained, shape, verifier)


def tell_pretrained(pretrained: PretrainedDraft, mapping: VocabMapping, *, with_head: bool) -> None:
    """Tell the user which draft the run begins with, and what of its head."""
    num_rows = len(mapping.kept_ids)
    num_own = int(mapping.in_draft_vocab[pretrained.kept_ids].sum()) if with_head else 0
    text = f"begins with {pretrained.name_or_path}: {num_own:,} of the {num_rows:,} rows of its head are taken over"
    if num_own < num_rows:
        text += f", {num_rows - num_own:,} are the verifier's"
    say(text, "pretrained", path=pretrained.name_or_path, rows=num_rows, own_rows=num_own)


def resolve_and_write_mapping(
    settings: TrainSettings, verifier: VerifierInfo, leave_out: frozenset[str], pretrained: PretrainedDraft | None
) -> VocabMapping:
    """Return the vocabulary mapping; one that was computed is written to its paths if nothing lies there.

    Not by a dry run: with other settings the run itself may choose another. A full vocabulary has no files.
    """
    mapping = resolve_mapping(settings, verifier.vocab_size, leave_out, pretrained)
    has_no_files = settings.dry_run or settings.draft_vocab_size == "full"
    if not has_no_files and not settings.d2t_path.exists() and not settings.t2d_path.exists():
        write_mapping(mapping, str(settings.d2t_path), str(settings.t2d_path))
        say(f"draft vocabulary of {len(mapping.kept_ids):,} written to {settings.d2t_path} and {settings.t2d_path}")
    return mapping


class SplitPlan(NamedTuple):
    """The samples trained on and those validated on, and how each of the two is packed."""

    train_index: SampleIndex
    validation_index: SampleIndex
    plan: PackingPlan
    validation_plan: PackingPlan


def plan_split(index: SampleIndex, settings: TrainSettings) -> SplitPlan:
    """Split the samples and pack both parts.

    Raises:
        DataError: There is nothing to train on, or nothing to validate on where the run's end depends on it.
    """
    train_index, validation_index = split_index(index, settings.train_frac, settings.seed)
    plan, validation_plan = plan_samples(train_index, settings), plan_samples(validation_index, settings)
    if not plan.bins:
        raise DataError(f"{settings.data_path}: no training sample has a supervised token. Check the loss masks.")
    if settings.early_stop_epochs is not None and not validation_plan.bins:
        raise DataError(
            f"{settings.data_path}: no sample is left to validate on, by which --early-stop-epochs goes. "
            "Add samples, or leave the flag out."
        )
    return SplitPlan(train_index, validation_index, plan, validation_plan)


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


def build_schedule(
    settings: TrainSettings, plan: PackingPlan, workers: WorkerRequest, checkpoint: CommittedCheckpoint | None
) -> BinSchedule:
    """Return which worker computes which training bin when."""
    return BinSchedule(
        num_bins=len(plan.bins),
        bins_per_step=settings.bins_per_step or saved_bins_per_step(checkpoint) or workers.num_workers,
        num_workers=workers.num_workers,
        epochs=settings.epochs,
    )


def resolve_stop_step(settings: TrainSettings, schedule: BinSchedule) -> int:
    """Return the updates after which the run ends, or pauses."""
    return min(schedule.total_steps, settings.max_steps or schedule.total_steps)


def saved_bins_per_step(checkpoint: CommittedCheckpoint | None) -> int | None:
    """Return the bins per step a resumed run began with: it keeps them, whatever its number of workers is now."""
    return None if checkpoint is None else int(checkpoint.identity["bins_per_step"])


def run_identity(
    settings: TrainSettings, draft_config: DraftConfig, mapping: VocabMapping, plan: PackingPlan, schedule: BinSchedule
) -> Mapping[str, Any]:
    """Return what a checkpoint must share with a run to be resumed by it: the draft, its vocabulary, the trajectory."""
    draft = draft_config.to_speculators()
    draft.pop("speculators_config")
    # What came later counts only where it is used: checkpoints from before it can still be gone on from.
    later: dict[str, Any] = {}
    if settings.optimizer != "adamw":
        later["optimizer"] = settings.optimizer
    if settings.ema_decay:
        later["ema_decay"] = settings.ema_decay
    if settings.mask_out_of_vocab_targets:
        later["mask_out_of_vocab_targets"] = True
    if settings.freeze_lm_head:
        later["freeze_lm_head"] = True
    return {
        "draft": draft,
        "verifier": Path(draft_config.verifier_name_or_path).name,
        "vocabulary": mapping.digest(),
        "plan": plan.digest,
        "bins_per_step": schedule.bins_per_step,
        "seed": settings.seed,
        "data_format_version": settings.data_format_version,
        "ttt_steps": settings.ttt_steps,
        **later,
    }
