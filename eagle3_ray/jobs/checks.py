"""What `doctor` looks at: cluster, verifier, samples, vocabulary, places and run folder, by the functions of `train`.

Each check returns what it saw, or raises what `train` would end with.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import ray

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.vocab import VocabMapping, choose_vocab, read_token_freq
from eagle3_ray.jobs.cluster import (
    WorkerRequest,
    check_outlives_job,
    choose_workers,
    cluster_resources,
    counted,
    describe_slow_store,
    ray_session,
)
from eagle3_ray.jobs.decide import (
    SplitPlan,
    check_bins_fit,
    plan_split,
    read_pretrained_if_needed,
    resolve_aux_layer_ids,
    resolve_sample_spec,
    run_identity,
)
from eagle3_ray.jobs.findings import Outcome, Seen
from eagle3_ray.jobs.histogram import count_lengths, draw_lengths
from eagle3_ray.jobs.nodes import (
    MUST_BE_EQUAL,
    NodeReport,
    ask_nodes,
    check_places,
    check_versions,
    existing_part,
    own_versions,
)
from eagle3_ray.jobs.outlook import Outlook
from eagle3_ray.jobs.samples import choose_samples, describe_left_out
from eagle3_ray.jobs.train import new_quarantine
from eagle3_ray.jobs.vocab_mapping import (
    chosen_vocab_size,
    resolve_mapping,
    takes_pretrained_vocabulary,
    uses_mapping_files,
)
from eagle3_ray.machine import free_shared_memory_bytes
from eagle3_ray.model.config import DraftConfig, build_draft_config
from eagle3_ray.model.pretrained import PretrainedDraft
from eagle3_ray.model.verifier import VerifierInfo, has_tied_head, load_final_norm
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.estimate import count_weights
from eagle3_ray.training.run_folder import (
    CommittedCheckpoint,
    check_best_is_ours,
    check_same_run,
    check_writable,
    find_committed,
    find_uncommitted,
    latest_trained,
)

LOW_COVERAGE_FRAC, LOW_SUPERVISED_FRAC, LOW_FILL_FRAC = 0.9, 0.02, 0.8


class Samples(NamedTuple):
    """What would be trained and validated on."""

    whole: SampleIndex
    split: SplitPlan


class Vocabulary(NamedTuple):
    """What the draft would say: V tokens, and which ones, unless they have yet to be counted."""

    size: int
    mapping: VocabMapping | None


def see_ray(stack: contextlib.ExitStack) -> Seen[None]:
    """Start or join Ray."""
    stack.enter_context(ray_session())
    resources = cluster_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    found = (
        f"{counted(num_nodes, 'node')} with {counted(int(resources.get('CPU', 0)), 'CPU')} and "
        f"{counted(int(resources.get('GPU', 0)), 'GPU')}, Ray {ray.__version__}"
    )
    return Seen(None, found, fields={"nodes": num_nodes, "resources": resources})


def see_workers(settings: TrainSettings) -> Seen[WorkerRequest]:
    """Check that the workers fit, and whether somebody else has their GPUs."""
    workers = choose_workers(settings.min_workers, settings.use_gpu, settings.max_workers)
    gpu = " and 1 GPU" if workers.use_gpu else ""
    at_least = "" if workers.min_workers is None else f"{workers.min_workers} to "
    found = (
        f"{at_least}{counted(workers.num_workers, 'worker')} with {counted(workers.cpus_per_worker, 'CPU')}{gpu} each"
    )
    fields = {"num_workers": workers.num_workers, "use_gpu": workers.use_gpu, "cpus": workers.cpus_per_worker}
    num_free = int(ray.available_resources().get("GPU", 0))
    if workers.use_gpu and num_free < (workers.min_workers or workers.num_workers):
        found += f"; {num_free} of the GPUs are free now"
        return Seen(
            workers, found, "train would wait for the others: end what holds them, or ask for fewer.", (), fields
        )
    return Seen(workers, found, fields=fields)


def see_object_store(settings: TrainSettings, verifier: VerifierInfo, aux_layer_ids: tuple[int, ...]) -> Seen[None]:
    """Check that Ray's object store is in memory, and holds a bin if bins go through it."""
    check_bins_fit(settings, verifier, aux_layer_ids)
    here = ray.get_runtime_context().get_node_id()
    store_bytes = sum(n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] == here)
    free_bytes = free_shared_memory_bytes()
    fields = {"store_bytes": store_bytes, "free_shared_memory_bytes": free_bytes}
    slow = describe_slow_store(free_bytes, store_bytes)
    if slow is not None:
        found, _, advice = slow.partition(". ")
        return Seen(None, f"{found}.", advice, (), fields)
    return Seen(None, f"{store_bytes / 2**30:.1f} GiB on this node, in memory", fields=fields)


def see_verifier(verifier: VerifierInfo) -> Seen[VerifierInfo]:
    """Check that the three tensors a draft needs can be found."""
    load_final_norm(verifier)
    head = "tied to the embedding" if has_tied_head(verifier) else "its own"
    found = (
        f"{verifier.name_or_path}: {verifier.num_layers} layers, hidden size {verifier.hidden_size:,}, vocabulary "
        f"{verifier.vocab_size:,}; embedding, final norm and head ({head}) are there"
    )
    sizes = {"layers": verifier.num_layers, "hidden_size": verifier.hidden_size, "vocab_size": verifier.vocab_size}
    return Seen(verifier, found, fields=sizes)


def see_layers(settings: TrainSettings, verifier: VerifierInfo) -> Seen[tuple[int, ...]]:
    """Check the auxiliary layers against the samples' own record and the verifier."""
    ids = resolve_aux_layer_ids(settings, verifier)
    return Seen(ids, f"auxiliary layers {', '.join(map(str, ids))}", fields={"aux_layer_ids": list(ids)})


def see_data(
    settings: TrainSettings,
    verifier: VerifierInfo,
    aux_layer_ids: tuple[int, ...],
    checkpoint: CommittedCheckpoint | None,
) -> Seen[Samples]:
    """Look at every sample, and pack them, as a run would that goes on from the checkpoint."""
    quarantine = new_quarantine(settings)
    index = choose_samples(settings, resolve_sample_spec(settings, verifier, aux_layer_ids), checkpoint, quarantine)
    split = plan_split(index, settings)
    plan, validation_plan = split.plan, split.validation_plan
    num_tokens = int(index.num_tokens.sum())
    supervised_frac = int(index.num_supervised.sum()) / num_tokens
    num_dropped, num_cut = plan.num_dropped + validation_plan.num_dropped, plan.num_cut + validation_plan.num_cut
    found = (
        f"{len(index.paths):,} samples, {num_tokens:,} tokens, {supervised_frac:.1%} of them supervised; "
        f"{len(plan.bins):,} bins to train on ({plan.fill_frac:.1%} filled), {len(validation_plan.bins):,} to validate "
        "on"
    )
    advice = []
    if quarantine.paths:
        advice.append(f"{describe_left_out(quarantine)}: train lists them in {quarantine.path}.")
    if num_dropped:
        advice.append(f"{num_dropped:,} samples have no supervised token and are left out: check their loss masks.")
    if num_cut:
        advice.append(f"{num_cut:,} are cut at {settings.total_seq_len:,} tokens: raise --total-seq-len to keep all.")
    if supervised_frac < LOW_SUPERVISED_FRAC:
        advice.append("Hardly any token is supervised: check the loss masks.")
    if plan.fill_frac < LOW_FILL_FRAC and len(plan.bins) > 1:
        advice.append("Bins are far from full: another --total-seq-len would hold the lengths below better.")
    lengths = count_lengths(index.num_tokens)
    fields = {
        "samples": len(index.paths), "tokens": num_tokens, "supervised_frac": supervised_frac, "bins": len(plan.bins),
        "validation_bins": len(validation_plan.bins), "fill_frac": plan.fill_frac, "dropped": num_dropped,
        "cut": num_cut, "left_out": len(quarantine.paths),
        "lengths": {str(low): number for low, number in lengths.items()},
    }  # fmt: skip
    return Seen(Samples(index, split), found, " ".join(advice), draw_lengths(lengths), fields)


def see_pretrained(
    settings: TrainSettings,
    verifier: VerifierInfo,
    aux_layer_ids: tuple[int, ...],
    checkpoint: CommittedCheckpoint | None,
) -> Seen[PretrainedDraft | None]:
    """Check that the run can begin with the draft named, unless it goes on from its own."""
    pretrained = read_pretrained_if_needed(settings, verifier, aux_layer_ids, checkpoint)
    if checkpoint is not None:
        return Seen(pretrained, f"{settings.from_pretrained} is not used: the run goes on from its own checkpoint")
    assert pretrained is not None
    size = len(pretrained.kept_ids)
    return Seen(pretrained, f"{pretrained.name_or_path}: of the run's shape, says {size:,} ids", fields={"size": size})


def see_vocabulary(
    settings: TrainSettings, verifier: VerifierInfo, pretrained: PretrainedDraft | None
) -> Seen[Vocabulary]:
    """Check the mapping of a run, unless the samples would be counted for it; tell its coverage if they once were."""
    vocab_size, counts_path = verifier.vocab_size, settings.token_freq_path or settings.data_path / "token_freq.pt"
    if settings.draft_vocab_size == "full":
        mapping = resolve_mapping(settings, vocab_size)
        return Seen(
            Vocabulary(vocab_size, mapping),
            f"all {vocab_size:,} ids of the verifier, without mapping files",
            fields={"size": vocab_size, "is_computed": True},
        )
    counts = read_token_freq(str(counts_path), vocab_size) if counts_path.is_file() else None
    is_pretrained = takes_pretrained_vocabulary(settings)
    if not uses_mapping_files(settings) and settings.token_freq_path is None and not is_pretrained:
        size = chosen_vocab_size(settings, vocab_size)
        choose_vocab(np.zeros(vocab_size, dtype=np.int64), size)
        for flag, path in (("--d2t-path", settings.d2t_path), ("--t2d-path", settings.t2d_path)):
            check_writable(existing_part(path.parent), flag)
        found = f"{size:,} of {vocab_size:,} ids, to be chosen by the samples when train starts"
        return Seen(Vocabulary(size, None), found, fields={"size": size, "is_computed": False})
    mapping = resolve_mapping(settings, vocab_size, pretrained=pretrained)
    size = len(mapping.draft_to_verifier_offset)
    chosen_by = settings.from_pretrained if is_pretrained else settings.token_freq_path
    source = settings.d2t_path if uses_mapping_files(settings) else chosen_by
    found, advice = f"{size:,} of {vocab_size:,} ids, by {source}", ""
    fields: dict[str, object] = {"size": size, "is_computed": True}
    if counts is not None:
        coverage_frac = int(counts[mapping.in_draft_vocab.numpy()].sum()) / int(counts.sum())
        found += f"; they are {coverage_frac:.2%} of the supervised tokens in {counts_path}"
        fields["coverage_frac"] = coverage_frac
        if coverage_frac < LOW_COVERAGE_FRAC:
            advice = "The draft can never say the rest: choose a larger --draft-vocab-size, or by these counts."
    return Seen(Vocabulary(size, mapping), found, advice, (), fields)


def see_draft(
    settings: TrainSettings, verifier: VerifierInfo, vocabulary: Vocabulary, aux_layer_ids: tuple[int, ...]
) -> Seen[DraftConfig]:
    """Check that a draft can take its shape from the verifier."""
    config = build_draft_config(verifier, settings, vocabulary.size, aux_layer_ids)
    weights = count_weights(config)
    found = (
        f"{counted(config.layer.num_hidden_layers, 'layer')}, {weights.num_trained:,} weights to train beside "
        f"{weights.num_frozen:,} that stay the verifier's"
    )
    return Seen(config, found, fields={"trained": weights.num_trained, "frozen": weights.num_frozen})


def see_save_path(settings: TrainSettings) -> Seen[StoragePath]:
    """Check on this machine that the run folder can be written, or made; the value is what of it is there."""
    check_outlives_job(settings.save_path, "--save-path")
    if settings.logger_names:
        check_outlives_job(settings.log_dir, "--log-dir")
    folder = existing_part(settings.save_path)
    check_writable(folder)
    made = "" if folder == settings.save_path else f", to be made in {folder}"
    return Seen(folder, f"{settings.save_path} can be written{made}", fields={"path": str(settings.save_path)})


def see_nodes(
    settings: TrainSettings,
    save_path: Outcome[StoragePath],
    data: Outcome[Samples],
    verifier: Outcome[VerifierInfo],
) -> Seen[list[NodeReport]]:
    """Have every node look at what could be found here of the places it needs."""
    samples: tuple[str, ...] = ()
    if data.seen is not None:
        index = data.value.whole
        samples = tuple(f"{index.root}/{path}" for path in dict.fromkeys((index.paths[0], index.paths[-1])))
    save_dir = None if save_path.seen is None else save_path.value
    reports = ask_nodes(settings, save_dir, samples, None if verifier.seen is None else verifier.value)
    hosts = [report.host for report in reports]
    return Seen(
        reports, f"{', '.join(hosts)}: {'answers' if len(hosts) == 1 else 'all answer'}", fields={"hosts": hosts}
    )


def see_versions(reports: list[NodeReport]) -> Seen[None]:
    """Check that all nodes have the releases of this process."""
    differing, here = check_versions(reports), own_versions()
    found = ", ".join(f"{name} {here[name]}" for name in MUST_BE_EQUAL)
    fields = {"versions": here}
    if differing:
        return Seen(None, "; ".join(differing) + ".", "Better have the same on all nodes.", (), fields)
    return Seen(None, f"{found} on all nodes", fields=fields)


def see_places(reports: list[NodeReport]) -> Seen[None]:
    """Check that every node could use the places."""
    check_places(reports)
    return Seen(None, "every node can use what was found of save path, log folder, samples and verifier")


def see_run_folder(settings: TrainSettings) -> Seen[CommittedCheckpoint | None]:
    """Check what an earlier run left in the run folder; the value is the checkpoint to go on from."""
    check_best_is_ours(settings.save_path)
    committed = find_committed(settings.save_path)
    newest = latest_trained(committed)
    half_written = [str(folder) for folder in find_uncommitted(settings.save_path)]
    details = [f"{folder}: half-written, would be ignored" for folder in half_written]
    fields = {"checkpoints": [str(checkpoint.path) for checkpoint in committed], "half_written": half_written}
    if newest is None:
        found = "what a dry run left, which train would remove" if committed else "no checkpoint there"
        return Seen(None, f"{found}: train would begin anew", "", details, fields)
    if not settings.resume_from_checkpoint:
        found = (
            f"train would remove {counted(len(committed), 'checkpoint')}, the newest {newest.path} (step {newest.step})"
        )
        return Seen(None, found, "Leave --no-resume-from-checkpoint out to go on from it.", details, fields)
    return Seen(newest, f"train would go on from {newest.path} (step {newest.step})", "", details, fields)


def see_resume(
    settings: TrainSettings,
    checkpoint: CommittedCheckpoint,
    config: DraftConfig,
    vocabulary: Vocabulary,
    data: Samples,
    outlook: Outlook,
) -> Seen[None]:
    """Check that the checkpoint is of this run, and that it leaves something to do."""
    if vocabulary.mapping is None:
        found = "whether the checkpoint's vocabulary is that of this run shows once the samples are counted"
        return Seen(None, found, "Name the earlier run's files with --d2t-path and --t2d-path.")
    identity = run_identity(settings, config, vocabulary.mapping, data.split.plan, outlook.schedule)
    check_same_run(checkpoint, identity)
    if checkpoint.step >= outlook.stop_step:
        return Seen(None, f"all {outlook.stop_step:,} steps are done", "To train on, raise --epochs or --max-steps.")
    if checkpoint.stagnation.is_over(settings.early_stop_epochs):
        found = f"the run has stopped early, after step {checkpoint.step:,}"
        return Seen(None, found, "To train on, raise --early-stop-epochs or leave it out.")
    return Seen(None, f"the same draft, data and order; {outlook.stop_step - checkpoint.step:,} steps are left")
