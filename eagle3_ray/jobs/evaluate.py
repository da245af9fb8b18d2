"""`evaluate`: how many tokens a verification gives with this draft, by decoding for real and by an estimate.

    driver    checks draft and verifier, reads the prompts, adds up
    actors    a copy of verifier and draft each; a prompt at a time, or a sample of the estimate

Nothing of the draft's folder changes but evaluation.json in it.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from eagle3_ray.console import say, warn
from eagle3_ray.data.index import split_index, survey_folder
from eagle3_ray.data.planned import read_planned
from eagle3_ray.data.samples import SampleSpec, inspect_tokens, read_sample
from eagle3_ray.errors import CheckpointError, ClusterError, DataError, StorageError
from eagle3_ray.evaluation.decode import DecodingVerifier, PromptResult, evaluate_prompt
from eagle3_ray.evaluation.estimate import estimate_sample
from eagle3_ray.evaluation.prompts import Prompt, PromptRules, prompt_of_sample, read_prompts, refuse_prompts
from eagle3_ray.evaluation.result import describe, sum_up_decoded, sum_up_estimate, to_record
from eagle3_ray.evaluation.served_draft import DraftChain, check_draft_fits, load_served_draft, read_served_config
from eagle3_ray.generation.hidden_states import CapturingVerifier, load_model
from eagle3_ray.generation.loss_mask import load_tokenizer
from eagle3_ray.jobs.cluster import WorkerRequest, choose_workers, ray_session
from eagle3_ray.jobs.failures import raise_cause
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.verifier import VerifierInfo, load_final_norm, read_verifier_config
from eagle3_ray.speculators_format import CONFIG_FILE, WEIGHTS_FILE
from eagle3_ray.stopping import when_stopped
from eagle3_ray.storage import StoragePath, local_copy, write_atomically
from eagle3_ray.training.run_folder import EVALUATION, RECORD, SAMPLES, follow_best
from eagle3_ray.verbs import EvaluateSettings
from eagle3_ray.versions import installed_versions

# The first passes of a process are slower than all others.
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class EvaluateJob:
    """What an actor needs to know.

    Attributes:
        draft_path: The draft's folder.
        verifier: What decodes.
        aux_layer_ids: Which of its states the draft reads.
        spec: Of the samples.
        device: "cpu" or "cuda".
        dtype: Of both models.
        trust_remote_code: Run Python code that comes with the verifier.
        num_speculative_tokens: K.
        max_new_tokens: Where an output is cut.
        num_threads: Of an actor.
    """

    draft_path: StoragePath
    verifier: VerifierInfo
    aux_layer_ids: tuple[int, ...]
    spec: SampleSpec
    device: str
    dtype: torch.dtype
    trust_remote_code: bool
    num_speculative_tokens: int
    max_new_tokens: int
    num_threads: int


@when_stopped("; nothing was written")
def run(settings: EvaluateSettings) -> None:
    """Evaluate a draft, write evaluation.json, show a table.

    Raises:
        Eagle3RayError: Draft, verifier, prompts or cluster do not allow it, or outputs differ.
    """
    draft_path = follow_best(settings.draft_path.resolve())
    config = read_draft_config(draft_path)
    verifier = read_verifier_config(settings.verifier_name_or_path or config.verifier_name_or_path)
    if settings.trust_remote_code:
        warn(f"--trust-remote-code: Python code that comes with {verifier.name_or_path} runs with your rights")
    with ray_session():
        workers = choose_workers(settings.num_workers, settings.use_gpu)
        job = decide_job(settings, draft_path, config, verifier, workers)
        prompts, sample_paths = choose_texts(settings, job)
        print_plan(settings, job, workers, len(prompts), len(sample_paths))
        actors = start_actors(job, workers, max(len(prompts), len(sample_paths)))
        try:
            results = call_each(actors, lambda actor, prompt: actor.decode.remote(prompt), prompts)
            counts = call_each(actors, lambda actor, path: actor.estimate.remote(path), sample_paths)
        except RayTaskError as error:
            raise_cause(error)
        except RayError as error:
            raise ClusterError(
                f"a process of this evaluation was lost: {error}\nType the same command again."
            ) from error
    decoded, estimate = sum_up_decoded(results), sum_up_estimate(counts) if counts else None
    for line in describe(decoded, estimate):
        say(line)
    output = draft_path / EVALUATION if settings.output_path is None else settings.output_path
    write_result(settings, job, output, to_record(decoded, estimate, results))


def read_draft_config(draft_path: StoragePath) -> DraftConfig:
    """Return the draft's shape.

    Raises:
        CheckpointError: There is no draft that a server could load.
    """
    if not (draft_path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{draft_path}: no draft ({CONFIG_FILE} is missing). Name a checkpoint or an exported folder."
        )
    with local_copy(draft_path, (CONFIG_FILE, WEIGHTS_FILE)) as folder:
        return read_served_config(folder)


def decide_job(
    settings: EvaluateSettings,
    draft_path: StoragePath,
    config: DraftConfig,
    verifier: VerifierInfo,
    workers: WorkerRequest,
) -> EvaluateJob:
    """Fill in what was not asked for, and check that draft and verifier belong together.

    Raises:
        VerifierError: They do not.
        UsageError: The draft cannot guess so many tokens in a row.
    """
    num_guesses = settings.num_speculative_tokens or config.speculative_tokens
    check_draft_fits(config, verifier, num_guesses)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if workers.use_gpu else "fp32"
    spec = SampleSpec(
        settings.data_format_version,
        verifier.hidden_size,
        config.num_aux_layers,
        verifier.vocab_size,
        load_final_norm(verifier).float(),
        verifier.rms_norm_eps,
    )
    return EvaluateJob(
        draft_path=draft_path,
        verifier=verifier,
        aux_layer_ids=config.aux_layer_ids,
        spec=spec,
        device="cuda" if workers.use_gpu else "cpu",
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        trust_remote_code=settings.trust_remote_code,
        num_speculative_tokens=num_guesses,
        max_new_tokens=settings.max_new_tokens,
        num_threads=workers.cpus_per_worker,
    )


def choose_texts(settings: EvaluateSettings, job: EvaluateJob) -> tuple[list[Prompt], list[str]]:
    """Return the prompts to decode, and the samples to estimate on.

    Raises:
        DataError: There are none, or some cannot be used.
    """
    rules = PromptRules(
        job.verifier.vocab_size,
        job.verifier.text_config.get("max_position_embeddings"),
        settings.max_new_tokens + job.num_speculative_tokens,
    )
    paths: list[str] = []
    if settings.data_path is not None:
        paths = held_out_samples(settings, job, settings.data_path)[: settings.num_prompts]
    if settings.prompts_path is not None:
        tokenizer = load_tokenizer(job.verifier.name_or_path, settings.trust_remote_code)
        return read_prompts(settings.prompts_path, tokenizer, settings.num_prompts, rules), paths
    prompts, problems = [], []
    for path in paths:
        found = inspect_tokens(path, job.spec.data_format_version, job.spec.vocab_size)
        assert isinstance(found, tuple)  # the index has looked at it
        prompts.append(prompt_of_sample(path, *found))
        if problem := rules.find_problem(prompts[-1].token_ids):
            problems.append(f"{path}: {problem}")
    refuse_prompts(str(settings.data_path), problems)
    return prompts, paths


def held_out_samples(settings: EvaluateSettings, job: EvaluateJob, data_path: StoragePath) -> list[str]:
    """Return the samples that the draft was not trained on, as far as its run tells.

    Those that the run was planned with are split as it split them, whatever came to the folder since.

    Raises:
        DataError: There are none.
    """
    survey = survey_folder(str(data_path.resolve()), job.spec)
    index = survey.to_index()
    if survey.bad_files.num_files:
        warn(f"{survey.bad_files.num_files:,} of {survey.num_files:,} .pt files are no usable samples and left out")
    record_path = job.draft_path / RECORD
    trained = json.loads(record_path.read_text(encoding="utf-8"))["settings"] if record_path.is_file() else None
    if trained is None or trained["data_path"] == survey.root:
        planned = None if trained is None else read_planned(job.draft_path.parent / SAMPLES, survey.root)
        if trained is None or planned is None:
            warn(
                f"{job.draft_path} does not tell what it was trained on: all samples of {data_path} are used; those it "
                "knows flatter it"
            )
        else:
            known = set(split_index(planned, trained["train_frac"], trained["seed"])[0].paths)
            index = index.select(np.array([path not in known for path in index.paths]))
    if not index.paths:
        raise DataError(f"{data_path}: the draft was trained on all of its samples; none is left to evaluate on.")
    return [f"{index.root}/{path}" for path in index.paths]


class EvaluateActor:
    """Holds one copy of both models for the life of an actor."""

    def __init__(self, job: EvaluateJob) -> None:
        self._job = job

    def decode(self, prompt: Prompt) -> PromptResult:
        """Decode a prompt with and without the draft."""
        models, job = self._models, self._job
        return evaluate_prompt(
            models.verifier,
            models.make_chain(),
            prompt.name,
            prompt.token_ids,
            job.num_speculative_tokens,
            job.max_new_tokens,
        )

    def estimate(self, path: str) -> tuple[list[int], list[int]]:
        """Count right guesses in a sample."""
        models, job = self._models, self._job
        sample = read_sample(path, job.spec)
        return estimate_sample(
            models.draft, models.kept_ids, models.read_last_state, sample, job.spec, job.num_speculative_tokens
        )

    # Loaded by the first call, not by the constructor: an error there would reach the driver as text only.
    @functools.cached_property
    def _models(self) -> "Models":
        torch.set_num_threads(self._job.num_threads)
        disable_progress_bar()  # of transformers: Ray would print each actor's on the driver
        return load_models(self._job)


@dataclass(frozen=True)
class Models:
    """Verifier and draft on one device."""

    verifier: DecodingVerifier
    draft: Eagle3Draft
    kept_ids: Tensor
    read_last_state: Callable[[Tensor], Tensor]

    def make_chain(self) -> DraftChain:
        """Return the draft, with nothing read yet."""
        return DraftChain(self.draft, self.kept_ids)


def load_models(job: EvaluateJob) -> Models:
    """Load both, and decode a few tokens: the first passes are not to be timed.

    Raises:
        Eagle3RayError: One cannot be loaded.
    """
    model, decoder = load_model(job.verifier, job.device, job.dtype, job.trust_remote_code, with_head=True)
    hooked = CapturingVerifier(job.verifier.name_or_path, decoder, job.aux_layer_ids, job.verifier.num_layers)
    with local_copy(job.draft_path, (CONFIG_FILE, WEIGHTS_FILE)) as folder:
        draft, kept_ids = load_served_draft(folder, job.device, job.dtype)
    head: nn.Module = model.get_output_embeddings()

    def read_last_state(last_state: Tensor) -> Tensor:
        states = last_state.to(job.dtype)
        logits: Tensor = head(hooked.final_norm(states) if job.spec.data_format_version == 1 else states)
        return logits

    models = Models(DecodingVerifier(model, hooked, job.aux_layer_ids), draft, kept_ids, read_last_state)
    few = torch.zeros(WARM_UP_TOKENS, dtype=torch.int64)
    evaluate_prompt(models.verifier, models.make_chain(), "warm-up", few, job.num_speculative_tokens, WARM_UP_TOKENS)
    return models


def start_actors(job: EvaluateJob, workers: WorkerRequest, num_texts: int) -> list[Any]:
    """Start as many actors as there are workers, or texts if these are fewer."""
    actor = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=1 if workers.use_gpu else 0)(EvaluateActor)
    job_ref = ray.put(job)
    return [actor.remote(job_ref) for _ in range(min(workers.num_workers, num_texts))]


def call_each(actors: list[Any], call: Callable[[Any, Any], Any], items: list[Any]) -> list[Any]:
    """Have the actors do each item, one at a time each; return what came of them in the order of the items."""
    return list(ActorPool(actors).map(call, items))


def print_plan(
    settings: EvaluateSettings, job: EvaluateJob, workers: WorkerRequest, num_prompts: int, num_samples: int
) -> None:
    """Tell what will be done, with what."""
    copies = "1 copy" if workers.num_workers == 1 else f"{workers.num_workers} copies"
    dtype = str(job.dtype).removeprefix("torch.")
    say(f"draft     {job.draft_path}, {job.num_speculative_tokens} tokens in a row")
    say(f"verifier  {job.verifier.name_or_path}, {dtype}, {copies} on {'GPU' if workers.use_gpu else 'CPU'}")
    source = settings.data_path if settings.prompts_path is None else settings.prompts_path
    say(f"prompts   {num_prompts:,} of {source}, {job.max_new_tokens} new tokens at most", "plan", prompts=num_prompts)
    if num_samples:
        say(f"estimate  {num_samples:,} held-out samples of {settings.data_path}")


def write_result(settings: EvaluateSettings, job: EvaluateJob, output: StoragePath, result: dict[str, Any]) -> None:
    """Write the JSON file.

    Raises:
        StorageError: It cannot be written.
    """
    record = {
        **result,
        "draft": str(job.draft_path),
        "verifier": job.verifier.name_or_path,
        "device": job.device,
        "dtype": str(job.dtype).removeprefix("torch."),
        "num_speculative_tokens": job.num_speculative_tokens,
        "settings": settings.model_dump(mode="json"),
        "versions": installed_versions(),
    }
    try:
        write_atomically(output, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{output}: cannot be written ({error}). Name another file with --output-path.") from error
    say(f"wrote     {output}", "done", path=str(output), tokens_per_verification=result["tokens_per_verification"])
