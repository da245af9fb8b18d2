"""`generate`: conversations -> v1 samples, by one copy of the verifier per GPU.

    driver     index lines, decide layers and dtype, claim the folder
    tasks      a chunk of lines each: samples that lie there whole are counted, the others tokenised, sorted by
               length and cut into batches                              (streamed back as object references)
    actors     a batch at a time through the verifier; files are written; token counts go back   (Ray Data)
    driver     add up the counts, write token_freq.pt

No state ever leaves an actor but to disk, and token ids only pass through the object store, which spills. All lines
are looked at before anything is written. Typing the same command again fills the gaps.
"""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from eagle3_ray import __version__
from eagle3_ray.config import GenerateSettings
from eagle3_ray.data.vocab import write_token_freq
from eagle3_ray.errors import ClusterError, DataError
from eagle3_ray.generation.conversations import LineChunk, index_lines, iter_lines, parse_conversation
from eagle3_ray.generation.hidden_states import CapturingVerifier, load_verifier, plan_batches
from eagle3_ray.generation.loss_mask import TokenRules, load_tokenizer, tokenize_conversation
from eagle3_ray.generation.output_folder import (
    TOKEN_FREQ_NAME,
    DataConfig,
    claim_folder,
    count_supervised,
    digest_verifier,
    read_whole_sample,
    sample_path,
    write_sample,
)
from eagle3_ray.jobs.cluster import WorkerRequest, choose_workers, cluster_resources, ray_session
from eagle3_ray.jobs.failures import raise_cause
from eagle3_ray.model.verifier import VerifierInfo, read_verifier_config

MAX_PROBLEMS_SHOWN = 20
MAX_RESTARTS = 2  # of an actor whose process died, for instance killed for memory; Ray's own default is no limit
NUM_WRITERS = 4  # threads an actor writes its batch with

TokenCounts = tuple[NDArray[np.int64], NDArray[np.int64]]  # ids and how often each is supervised


@dataclass(frozen=True)
class GenerateJob:
    """What tasks and actors need to know; paths are absolute.

    Attributes:
        settings: of the command.
        verifier: the verifier.
        config: what is made from what.
        use_gpu: whether actors have a GPU each.
        threads_per_worker: torch threads of an actor.
    """

    settings: GenerateSettings
    verifier: VerifierInfo
    config: DataConfig
    use_gpu: bool
    threads_per_worker: int


@dataclass(frozen=True)
class ChunkReport:
    """What became of a chunk's lines.

    Attributes:
        problems: "file:line: what is wrong", at most 20 of them.
        num_problems: all of them.
        num_whole: samples that lie there whole.
        num_untrainable: conversations without a supervised token; they get no file.
        num_cut: samples to be generated that were cut at max_seq_len.
        whole_counts: supervised tokens of the whole samples.
    """

    problems: list[str]
    num_problems: int
    num_whole: int
    num_untrainable: int
    num_cut: int
    whole_counts: TokenCounts


@dataclass(frozen=True)
class Totals:
    """Sums over everything that now lies in the folder, and what was left out.

    Attributes:
        counts: [W] int64 supervised tokens of each id.
        num_written: samples written by this run.
        num_tokens: tokens of those.
        num_whole: samples that lay there before.
        num_untrainable: conversations left out.
        num_cut: samples written by this run that were cut.
    """

    counts: NDArray[np.int64]
    num_written: int
    num_tokens: int
    num_whole: int
    num_untrainable: int
    num_cut: int


def run(settings: GenerateSettings) -> None:
    """Generate samples, or the ones that are still missing.

    Raises:
        Eagle3RayError: Conversations, verifier, output folder or cluster do not allow it; nothing on disk is lost.
    """
    verifier = read_verifier_config(settings.verifier_name_or_path)
    settings = settings.model_copy(
        update={
            "verifier_name_or_path": verifier.name_or_path,  # actors start in another folder
            "conversations_path": settings.conversations_path.resolve(),
            "output_path": settings.output_path.resolve(),
        }
    )
    chunks, conversations_sha256 = index_lines(settings.conversations_path)
    load_tokenizer(verifier.name_or_path, settings.trust_remote_code)
    with ray_session():
        workers = choose_workers(settings.num_workers, settings.use_gpu)
        job = decide_job(settings, verifier, workers, conversations_sha256)
        claim_folder(settings.output_path, job.config, dry_run=True)
        try:
            reports, batches = prepare_batches(job, chunks)
            check_reports(settings, reports)
            claim_folder(settings.output_path, job.config)
            totals = generate_samples(job, workers, reports, batches)
        except RayTaskError as error:
            raise_cause(error)
        except RayError as error:
            raise ClusterError(
                f"a Ray process of this run was lost: {error}\nType the same command to go on: samples that are "
                "written stay. If its memory ran out, lower --batch-tokens."
            ) from error
    write_token_freq(str(settings.output_path / TOKEN_FREQ_NAME), totals.counts)
    print_totals(job, totals)


def decide_job(
    settings: GenerateSettings, verifier: VerifierInfo, workers: WorkerRequest, conversations_sha256: str
) -> GenerateJob:
    """Fill in what was not asked for: auxiliary layers, dtype, threads.

    Raises:
        VerifierError: The layer ids do not suit the verifier.
    """
    aux_layer_ids = settings.aux_layer_ids or verifier.default_aux_layer_ids()
    verifier.check_aux_layer_ids(aux_layer_ids)
    precision = settings.precision if settings.precision != "auto" else "bf16" if workers.use_gpu else "fp32"
    config = DataConfig(
        producer_version=__version__,
        verifier_name_or_path=verifier.name_or_path,
        verifier_digest=digest_verifier(verifier),
        verifier_dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        aux_layer_ids=aux_layer_ids,
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        conversations_path=str(settings.conversations_path),
        conversations_sha256=conversations_sha256,
        max_seq_len=settings.max_seq_len,
        skip_first_tokens=settings.skip_first_tokens,
    )
    cpus_per_node = cluster_resources().get("CPU", 1) / max(len(ray.nodes()), 1)
    workers_per_node = -(-workers.num_workers // max(len(ray.nodes()), 1))
    return GenerateJob(settings, verifier, config, workers.use_gpu, max(int(cpus_per_node / workers_per_node), 1))


def prepare_batches(
    job: GenerateJob, chunks: list[LineChunk]
) -> tuple[list[ChunkReport], list["ray.ObjectRef[pa.Table]"]]:
    """Look at every line in Ray tasks.

    Returns:
        A report a chunk, and references to batches: a table of (line_number, input_ids, loss_mask), a row a sample.
    """
    job_ref = ray.put(job)
    streams = [_prepare_chunk.remote(job_ref, chunk) for chunk in chunks]
    reports, batches = [], []
    for stream in streams:
        reports.append(ray.get(next(stream)))
        batches.extend(stream)
    return reports, batches


def check_reports(settings: GenerateSettings, reports: list[ChunkReport]) -> None:
    """Refuse conversations of which a line is wrong, or none trains anything.

    Raises:
        DataError: Names up to 20 lines with their problems.
    """
    num_problems = sum(report.num_problems for report in reports)
    if num_problems:
        shown = [problem for report in reports for problem in report.problems][:MAX_PROBLEMS_SHOWN]
        rest = [f"... and {num_problems - len(shown)} more"] if num_problems > len(shown) else []
        lines = f"{num_problems} lines" if num_problems > 1 else "1 line"
        raise DataError(
            "\n  ".join([f"{settings.conversations_path}: {lines} cannot be used:", *shown, *rest])
            + "\nCorrect the lines or take them out. Nothing was written."
        )
    num_untrainable = sum(report.num_untrainable for report in reports)
    if not any(report.num_whole or report.whole_counts[0].size for report in reports) and not _any_to_generate(reports):
        raise DataError(
            f"{settings.conversations_path}: none of its {num_untrainable} conversations has a supervised token within "
            f"the first {settings.max_seq_len} tokens. Chats need assistant turns; text needs more than "
            f"--skip-first-tokens {settings.skip_first_tokens} tokens."
        )
