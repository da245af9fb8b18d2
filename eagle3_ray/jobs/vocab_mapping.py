"""`vocab-mapping`: token counts -> `d2t.npy` and `t2d.npy`; and the same, in memory, before a training run."""

from typing import TYPE_CHECKING

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from eagle3_ray.config import TrainSettings
from eagle3_ray.console import say
from eagle3_ray.data.index import count_supervised_tokens
from eagle3_ray.data.vocab import (
    DEFAULT_DRAFT_VOCAB_SIZE,
    VocabMapping,
    choose_vocab,
    full_vocab,
    keep_ids,
    read_mapping,
    read_token_freq,
    write_mapping,
)
from eagle3_ray.errors import Eagle3RayError, UsageError, VocabMappingError
from eagle3_ray.jobs.cluster import check_outlives_job, ray_session
from eagle3_ray.stopping import when_stopped
from eagle3_ray.storage import StoragePath
from eagle3_ray.verbs import VocabMappingSettings

if TYPE_CHECKING:  # it imports huggingface_hub, which `vocab-mapping` needs only for a verifier that is named
    from eagle3_ray.model.pretrained import PretrainedDraft


@when_stopped("; the same command starts again")
def run(settings: VocabMappingSettings) -> None:
    """Choose the draft's vocabulary, write both files, tell how much of the samples it covers.

    Raises:
        UsageError: The draft's vocabulary is larger than the verifier's, there is nothing to count, or the output
            would go with a submitted job's own copy.
        VocabMappingError: The frequency file does not fit, or the outputs cannot be written.
        DataError: The samples cannot be counted.
        ClusterError: No Ray to count with.
    """
    check_outlives_job(settings.output_path.absolute(), "--output-path")
    vocab_size = resolve_vocab_size(settings)
    draft_vocab_size = settings.draft_vocab_size or min(DEFAULT_DRAFT_VOCAB_SIZE, vocab_size)
    if draft_vocab_size > vocab_size:
        raise UsageError(
            f"--draft-vocab-size {draft_vocab_size} is more than the verifier's {vocab_size} tokens. "
            f"Pass {vocab_size} or less."
        )
    if settings.token_freq_path.exists():
        counts, source = read_token_freq(str(settings.token_freq_path), vocab_size), settings.token_freq_path
    elif settings.data_path is not None:
        with ray_session():
            data_path = str(settings.data_path.absolute())
            counts = count_supervised_tokens(data_path, settings.data_format_version, vocab_size)
        source = settings.data_path
    else:
        raise UsageError(
            f"{settings.token_freq_path}: no such token-frequency file, and no samples to count from. "
            "Pass --token-freq-path or --data-path."
        )
    mapping = choose_counted(counts, draft_vocab_size, str(source))
    d2t_path, t2d_path = settings.output_path / "d2t.npy", settings.output_path / "t2d.npy"
    write_mapping(mapping, str(d2t_path), str(t2d_path))
    say(describe_mapping(mapping, counts), "mapping", kept=len(mapping.kept_ids), vocab_size=vocab_size)
    say(f"counted from  {source}")
    say(f"wrote         {d2t_path}, {t2d_path}", "done", d2t_path=str(d2t_path), t2d_path=str(t2d_path))


def resolve_vocab_size(settings: VocabMappingSettings) -> int:
    """Return the verifier's vocabulary size, from the flag or from the verifier's config.

    Raises:
        VerifierError: The verifier's config cannot be read.
    """
    if settings.target_vocab_size is not None:
        return settings.target_vocab_size
    assert settings.target_model_path is not None
    # Here, because it imports transformers, which takes seconds.
    from eagle3_ray.model.verifier import read_verifier_config

    return read_verifier_config(settings.target_model_path).vocab_size


def describe_mapping(mapping: VocabMapping, counts: NDArray[np.int64]) -> str:
    """Return two lines: ids kept, and the share of supervised tokens the draft can say."""
    in_draft_vocab = mapping.in_draft_vocab.numpy()
    num_supervised = int(counts.sum())
    never_seen = int((counts[in_draft_vocab] == 0).sum())
    filled_up = f" ({never_seen:,} of them never seen, to fill up)" if never_seen else ""
    return (
        f"kept          {int(in_draft_vocab.sum()):,} of {len(counts):,} ids{filled_up}\n"
        f"coverage      {counts[in_draft_vocab].sum() / num_supervised:.2%} of {num_supervised:,} supervised tokens"
    )


def resolve_mapping(
    settings: TrainSettings,
    vocab_size: int,
    leave_out: frozenset[str] = frozenset(),
    pretrained: "PretrainedDraft | None" = None,
) -> VocabMapping:
    """Return the mapping a training run uses: from its files, else that of the draft it begins with, else computed.

    That is done by a Ray task, before any worker starts.

    A frequency file that is named is what the user wants counted by; it goes before mapping files. Nothing is counted
    for a full vocabulary.

    Args:
        settings: paths of mapping, frequencies and samples; absolute if Ray runs on other machines.
        vocab_size: W.
        leave_out: relative paths of samples not to count.
        pretrained: the draft it begins with, if its vocabulary is asked for.

    Raises:
        VocabMappingError: Only one mapping file is there, or files do not fit each other, the verifier or the flags.
        DataError: The samples cannot be counted.
    """
    if settings.draft_vocab_size == "full":
        return resolve_full_mapping(settings, vocab_size)
    if uses_mapping_files(settings):
        return read_mapping(str(settings.d2t_path), str(settings.t2d_path), vocab_size, settings.draft_vocab_size)
    if takes_pretrained_vocabulary(settings):
        assert pretrained is not None
        return keep_ids(pretrained.kept_ids.sort().values, vocab_size)
    return compute_mapping(
        vocab_size,
        chosen_vocab_size(settings, vocab_size),
        settings.token_freq_path,
        settings.data_path,
        settings.data_format_version,
        leave_out,
    )


def resolve_full_mapping(settings: TrainSettings, vocab_size: int) -> VocabMapping:
    """Return the mapping of a draft that can say all W tokens, for which no files are needed.

    Raises:
        VocabMappingError: Files are there all the same, and keep fewer, or cannot be read.
    """
    if uses_mapping_files(settings):
        found = read_mapping(str(settings.d2t_path), str(settings.t2d_path), vocab_size, None)
        if not found.is_full:
            raise VocabMappingError(
                f"{settings.d2t_path} and {settings.t2d_path} keep {len(found.kept_ids)} of the verifier's "
                f"{vocab_size} ids, --draft-vocab-size full asks for all. Move the files away, name others "
                "with --d2t-path and --t2d-path, or leave --draft-vocab-size out."
            )
    return full_vocab(vocab_size)


def uses_mapping_files(settings: TrainSettings) -> bool:
    """Tell whether a run reads its mapping from files: one is there, and no counts are named to choose by anew."""
    return settings.token_freq_path is None and (settings.d2t_path.exists() or settings.t2d_path.exists())


def takes_pretrained_vocabulary(settings: TrainSettings) -> bool:
    """Tell whether a run has the vocabulary of the draft it begins with: nothing else is there to choose it by."""
    is_chosen = settings.draft_vocab_size is not None or settings.token_freq_path is not None
    return settings.from_pretrained is not None and not is_chosen and not uses_mapping_files(settings)


def chosen_vocab_size(settings: TrainSettings, vocab_size: int) -> int:
    """Return V of a mapping that is computed, for a verifier of W tokens."""
    assert settings.draft_vocab_size != "full"  # nothing is computed for it
    return settings.draft_vocab_size or min(DEFAULT_DRAFT_VOCAB_SIZE, vocab_size)


def compute_mapping(
    vocab_size: int,
    draft_vocab_size: int,
    token_freq_path: StoragePath | None,
    data_path: StoragePath,
    data_format_version: int,
    leave_out: frozenset[str] = frozenset(),
) -> VocabMapping:
    """Compute the mapping in a Ray task, which counts the samples in tasks of its own if no frequency file is named.

    The frequency file is read here, where the user named it; samples must be seen by all nodes anyway.

    Args:
        vocab_size: W.
        draft_vocab_size: V.
        token_freq_path: counts; None counts the samples.
        data_path: folder of samples.
        data_format_version: of the samples, 0 or 1.
        leave_out: relative paths of samples not to count.

    Raises:
        VocabMappingError: The frequency file cannot be used, no token is supervised, or V is more than W.
        DataError: The samples cannot be counted.
    """
    counts = None if token_freq_path is None else read_token_freq(str(token_freq_path), vocab_size)
    task = compute_vocab_mapping_task.remote(
        vocab_size, draft_vocab_size, counts, str(data_path.absolute()), data_format_version, leave_out
    )
    try:
        mapping: VocabMapping = ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, Eagle3RayError):
            raise error.cause from None  # Ray's wrapping adds nothing but a remote traceback
        raise
    return mapping


# Without a CPU of its own: it waits for the tasks that count.
@ray.remote(num_cpus=0)
def compute_vocab_mapping_task(
    vocab_size: int,
    draft_vocab_size: int,
    counts: NDArray[np.int64] | None,
    data_path: str,
    data_format_version: int,
    leave_out: frozenset[str],
) -> VocabMapping:
    """Count the samples if there are no counts yet, and choose. Arguments and errors as in `compute_mapping`."""
    if counts is None:
        counts = count_supervised_tokens(data_path, data_format_version, vocab_size, leave_out)
    return choose_counted(counts, draft_vocab_size, data_path)


def choose_counted(counts: NDArray[np.int64], draft_vocab_size: int, source: str) -> VocabMapping:
    """Choose by counts [W] that must not be all zero.

    Raises:
        VocabMappingError: Nothing was counted, or V is more than W.
    """
    if not counts.any():
        raise VocabMappingError(
            f"{source}: no token is supervised, expected some to choose a vocabulary by. Check the loss masks."
        )
    return choose_vocab(counts, draft_vocab_size)
