"""`generate`: conversations -> v1 samples, by one copy of the verifier per GPU.

    driver    finds the lines, decides layers and dtype
    tasks     a chunk of lines each: samples that are there whole are counted, the others tokenised and cut into
              batches of like length, which stay in the object store
    actors    one batch at a time through the verifier and to disk; only counts come back (Ray Data)
    driver    adds up the counts, writes token_freq.pt

Every line is looked at before anything is written. No state leaves an actor but to disk. Typing the same command
again generates what is missing.
"""

import functools
import logging
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayError, RayTaskError
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from eagle3_ray import __version__
from eagle3_ray.console import say, warn
from eagle3_ray.data.vocab import write_token_freq
from eagle3_ray.errors import ClusterError, DataError, Eagle3RayError
from eagle3_ray.generation.conversations import LineChunk, index_lines
from eagle3_ray.generation.hidden_states import CapturingVerifier, load_verifier
from eagle3_ray.generation.loss_mask import load_tokenizer
from eagle3_ray.generation.output_folder import (
    TOKEN_FREQ_NAME,
    DataConfig,
    check_folder,
    claim_folder,
    digest_verifier,
    sample_path,
)
from eagle3_ray.generation.work import GenerateJob, Tally, generate_batch, prepare_chunk
from eagle3_ray.jobs.cluster import WorkerRequest, check_outlives_job, choose_workers, cluster_resources, ray_session
from eagle3_ray.jobs.failures import raise_cause
from eagle3_ray.machine import usable_cpus
from eagle3_ray.model.verifier import VerifierInfo, read_verifier_config
from eagle3_ray.stopping import when_stopped
from eagle3_ray.verbs import GenerateSettings

RESULT_SCHEMA = pa.schema(
    [
        ("line_numbers", pa.list_(pa.int64())),
        ("ids", pa.list_(pa.int64())),
        ("counts", pa.list_(pa.int64())),
        ("error", pa.binary()),
    ]
)
BatchRef = Any  # an object reference to a table of `work.BATCH_SCHEMA`; Ray's own types for it disagree


@when_stopped("; samples that are written stay, the same command generates the others")
def run(settings: GenerateSettings) -> None:
    """Generate samples, or those that are still missing.

    Raises:
        Eagle3RayError: Conversations, verifier, output folder or cluster do not allow it; nothing on disk is lost.
    """
    # Tasks and actors start in another folder: every path is made absolute once, here.
    paths = {"conversations_path": settings.conversations_path, "output_path": settings.output_path}
    settings = settings.model_copy(update={name: path.resolve() for name, path in paths.items()})
    check_outlives_job(settings.output_path, "--output-path")
    verifier = read_verifier_config(settings.verifier_name_or_path)
    if settings.trust_remote_code:
        warn(f"--trust-remote-code: Python code that comes with {verifier.name_or_path} runs with your rights")
    chunks, conversations_sha256 = index_lines(settings.conversations_path)
    load_tokenizer(verifier.name_or_path, settings.trust_remote_code)  # or say at once that there is none
    with ray_session():
        workers = choose_workers(settings.num_workers, settings.use_gpu)
        job = decide_job(settings, verifier, workers, conversations_sha256)
        check_folder(settings.output_path, job.config)
        try:
            tally, batches = prepare_batches(job, chunks)
            check_tally(settings, tally)
            claim_folder(settings.output_path, job.config)
            print_plan(job, workers, tally)
            num_counted_before = int(tally.counts.sum())
            generate_samples(job, workers, tally, batches)
        except RayTaskError as error:
            raise_cause(error)
        except RayError as error:
            raise ClusterError(
                f"a Ray process of this run was lost: {error}\nType the same command to go on; samples that are "
                "written stay. If its memory ran out, lower --batch-tokens."
            ) from error
    write_token_freq(str(settings.output_path / TOKEN_FREQ_NAME), tally.counts)
    print_result(job, tally, int(tally.counts.sum()) - num_counted_before)


def decide_job(
    settings: GenerateSettings, verifier: VerifierInfo, workers: WorkerRequest, conversations_sha256: str
) -> GenerateJob:
    """Fill in what was not asked for: auxiliary layers, dtype, threads.

    Raises:
        VerifierError: The layer ids do not suit the verifier.
    """
    aux_layer_ids = settings.aux_layer_ids or verifier.default_aux_layer_ids()
    verifier.check_aux_layer_ids(aux_layer_ids)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if workers.use_gpu else "fp32"
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
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    # The head may call for more CPUs than it has; Ray, unlike the operating system, knows a container's limit.
    cpus_per_node = min(usable_cpus(), int(cluster_resources()["CPU"]) // num_nodes)
    workers_per_node = -(-workers.num_workers // num_nodes)
    return GenerateJob(
        settings=settings,
        verifier=verifier,
        config=config,
        device="cuda" if workers.use_gpu else "cpu",
        threads_per_worker=max(cpus_per_node // workers_per_node, 1),
    )


def prepare_batches(job: GenerateJob, chunks: list[LineChunk]) -> tuple[Tally, list[BatchRef]]:
    """Look at every line in Ray tasks; return the sums over all chunks, and a reference to each batch."""
    job_ref = ray.put(job)
    task: Any = ray.remote(num_cpus=1, num_returns="streaming")(_stream_chunk)
    tally = Tally(np.zeros(job.config.vocab_size, np.int64))
    batches: list[BatchRef] = []
    for stream in [task.remote(job_ref, chunk) for chunk in chunks]:
        tally.add(ray.get(next(stream)))
        batches.extend(stream)
    return tally, batches


def check_tally(settings: GenerateSettings, tally: Tally) -> None:
    """Refuse conversations of which a line is wrong, or none can train anything.

    Raises:
        DataError: Names up to 20 lines with their problems.
    """
    path = settings.conversations_path
    if tally.num_problems:
        lines = "1 line" if tally.num_problems == 1 else f"{tally.num_problems} lines"
        more = tally.num_problems - len(tally.problems)
        rest = [f"... and {more} more"] if more else []
        raise DataError(
            "\n  ".join([f"{path}: {lines} cannot be used:", *tally.problems, *rest])
            + "\nCorrect the lines or take them out. Nothing was written."
        )
    if tally.num_whole + tally.num_missing == 0:
        raise DataError(
            f"{path}: none of its {tally.num_untrainable} conversations has a supervised token among the first "
            f"{settings.max_seq_len}. Chats need assistant turns, texts more than --skip-first-tokens "
            f"{settings.skip_first_tokens} tokens; or raise --max-seq-len."
        )


def generate_samples(job: GenerateJob, workers: WorkerRequest, tally: Tally, batches: list[BatchRef]) -> None:
    """Stream the batches through the verifier's copies; add what they count to `tally`.

    Raises:
        Eagle3RayError: As a worker raised it, or ClusterError because the samples are not seen from this machine.
    """
    if not batches:
        return
    dataset = ray.data.from_arrow_refs(batches)
    dataset.context.enable_progress_bars = sys.stderr.isatty()
    dataset.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset.context.execution_no_progress_timeout_s = -1  # loading a big verifier may take longer than the default
    results = dataset.map_batches(
        VerifierActor,
        fn_constructor_kwargs={"job": job},
        batch_size=None,  # a block is a batch
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(batches))),
        num_cpus=workers.cpus_per_worker,
        num_gpus=1 if workers.use_gpu else 0,
    )
    written: list[int] = []
    result: Any
    for result in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in result.to_pylist():
            if row["error"] is not None:
                raise pickle.loads(row["error"])
            tally.counts[row["ids"]] += np.array(row["counts"], np.int64)
            written += row["line_numbers"]
    visible = {path.name for path in job.settings.output_path.iterdir()}
    num_lost = sum(sample_path(job.settings.output_path, number).name not in visible for number in written)
    if num_lost:
        raise ClusterError(
            f"{job.settings.output_path}: {num_lost} of {len(written)} samples that workers wrote are not seen "
            "from here. Choose an --output-path on storage that all nodes share, and type the command again."
        )
    assert len(set(written)) == tally.num_missing


class VerifierActor:
    """Holds one copy of the verifier for the life of an actor."""

    def __init__(self, job: GenerateJob) -> None:
        self._job = job

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Generate a batch's samples.

        Returns:
            Table of `RESULT_SCHEMA`, one row: the samples' lines, the ids supervised and how often; or an error raised
            on purpose, which as an exception would come out of Ray Data without its type.
        """
        try:
            counts = generate_batch(self._job, self._verifier, batch)
        except Eagle3RayError as error:
            row = {"line_numbers": [[]], "ids": [[]], "counts": [[]], "error": [pickle.dumps(error)]}
            return pa.table(row, RESULT_SCHEMA)
        ids = np.flatnonzero(counts)
        lines = batch["line_number"].to_numpy()
        return pa.table(
            {"line_numbers": [lines], "ids": [ids], "counts": [counts[ids]], "error": [None]}, RESULT_SCHEMA
        )

    # Loaded by the first batch, not by the constructor: an error there would reach the driver as text only.
    @functools.cached_property
    def _verifier(self) -> CapturingVerifier:
        torch.set_num_threads(self._job.threads_per_worker)
        disable_progress_bar()  # of transformers: Ray would print each actor's on the driver
        job = self._job
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.config.verifier_dtype]
        return load_verifier(job.verifier, job.config.aux_layer_ids, job.device, dtype, job.settings.trust_remote_code)


def _stream_chunk(job: GenerateJob, chunk: LineChunk) -> Iterator[Tally | pa.Table]:
    """One task of `prepare_batches`: the tally of a chunk, then its batches, each an object of its own."""
    torch.set_num_threads(1)
    tally, batches = prepare_chunk(job, chunk, _tokenizer(job.verifier.name_or_path, job.settings.trust_remote_code))
    yield tally
    while batches:  # not `yield from`, which would pass Ray's send() on to an iterator without one
        yield batches.pop(0)


@functools.cache  # once a worker process, not once a task
def _tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return load_tokenizer(name_or_path, trust_remote_code)


def print_plan(job: GenerateJob, workers: WorkerRequest, tally: Tally) -> None:
    """Tell what will be done, with what."""
    config, device = job.config, "GPU" if workers.use_gpu else "CPU"
    copies = "1 copy" if workers.num_workers == 1 else f"{workers.num_workers} copies"
    layers = ", ".join(map(str, config.aux_layer_ids))
    say(f"verifier      {config.verifier_name_or_path}, {config.verifier_dtype}, {copies} on {device}")
    say(f"states        layers {layers} of {job.verifier.num_layers}, and the last before the final norm")
    text = f"samples       {tally.num_missing:,} to generate, {tally.num_whole:,} there already"
    say(text, "plan", missing=tally.num_missing, whole=tally.num_whole)


def print_result(job: GenerateJob, tally: Tally, num_supervised: int) -> None:
    """Tell what was done and what was left out."""
    settings = job.settings
    if tally.num_untrainable:
        say(f"left out      {tally.num_untrainable:,} without a supervised token")
    if tally.num_cut:
        say(f"cut           {tally.num_cut:,} at {settings.max_seq_len:,} tokens")
    say(f"supervised    {int(tally.counts.sum()):,} tokens, {num_supervised:,} of them new")
    say(f"wrote         {settings.output_path}", "done", path=str(settings.output_path), supervised=num_supervised)
