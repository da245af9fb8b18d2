"""What one task and one worker do; `jobs/generate.py` decides where.

A task turns a chunk of lines into batches, a worker turns a batch into files. In between a batch is an Arrow table
with a row a sample: `line_number` int64, `input_ids` list of int64, `loss_mask` list of bool.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eagle3_ray.errors import DataError, VerifierError
from eagle3_ray.generation.conversations import LineChunk, iter_lines, parse_conversation
from eagle3_ray.generation.hidden_states import CapturingVerifier, plan_batches
from eagle3_ray.generation.loss_mask import TokenizedSample, TokenRules, tokenize_conversation
from eagle3_ray.generation.output_folder import DataConfig, read_whole_sample, sample_path, write_sample
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.verbs import GenerateSettings

MAX_PROBLEMS_SHOWN = 20
NUM_WRITERS = 4  # threads a worker writes its batch with
BATCH_SCHEMA = pa.schema(
    [("line_number", pa.int64()), ("input_ids", pa.list_(pa.int64())), ("loss_mask", pa.list_(pa.bool_()))]
)


@dataclass(frozen=True)
class GenerateJob:
    """What tasks and workers need to know.

    Attributes:
        settings: of the command, every path absolute.
        verifier: the verifier.
        config: what is made from what.
        device: of the workers, "cpu" or "cuda".
        threads_per_worker: CPU threads of each.
    """

    settings: GenerateSettings
    verifier: VerifierInfo
    config: DataConfig
    device: str
    threads_per_worker: int


@dataclass
class Tally:
    """Sums over lines or files, of a chunk, a batch, or all of them.

    Attributes:
        counts: [W] int64, supervised tokens of each id in the samples that lie in the folder.
        num_whole: samples that lay there whole before.
        num_missing: samples to generate.
        num_cut: those of them that are cut at max_seq_len.
        num_untrainable: conversations without a supervised token; they get no file.
        num_problems: lines that cannot be used.
        problems: "file:line: what is wrong" of the first 20.
    """

    counts: NDArray[np.int64]
    num_whole: int = 0
    num_missing: int = 0
    num_cut: int = 0
    num_untrainable: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add another one's sums to this one's."""
        self.counts += other.counts
        self.num_whole += other.num_whole
        self.num_missing += other.num_missing
        self.num_cut += other.num_cut
        self.num_untrainable += other.num_untrainable
        self.num_problems += other.num_problems
        self.problems = (self.problems + other.problems)[:MAX_PROBLEMS_SHOWN]


def prepare_chunk(
    job: GenerateJob, chunk: LineChunk, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tally, list[pa.Table]]:
    """Look at every line of a chunk; make batches of those whose sample is not there yet.

    Args:
        job: what to generate.
        chunk: which lines.
        tokenizer: the verifier's.

    Returns:
        What became of the lines, and the batches, longest samples first.

    Raises:
        VerifierError: The tokenizer cannot render chats.
    """
    settings, config = job.settings, job.config
    rules = TokenRules(settings.max_seq_len, settings.skip_first_tokens, config.vocab_size)
    tally = Tally(np.zeros(config.vocab_size, np.int64))
    line_numbers: list[int] = []
    missing: list[TokenizedSample] = []
    for line_number, line in iter_lines(settings.conversations_path, chunk):
        try:
            conversation = parse_conversation(line)
            whole = read_whole_sample(sample_path(settings.output_path, line_number), config.sample_spec)
            if whole is not None:
                tally.num_whole += 1
                tally.counts += _count(whole.input_ids, whole.loss_mask, config.vocab_size)
                continue
            sample = tokenize_conversation(conversation, tokenizer, rules)
        except VerifierError:  # the tokenizer's fault, not the line's
            raise
        except DataError as error:
            tally.num_problems += 1
            if len(tally.problems) < MAX_PROBLEMS_SHOWN:
                tally.problems.append(f"{settings.conversations_path.name}:{line_number}: {error}")
            continue
        if not sample.can_train:
            tally.num_untrainable += 1
            continue
        line_numbers.append(line_number)
        missing.append(sample)
        tally.num_cut += sample.num_cut > 0
    tally.num_missing = len(missing)
    return tally, make_batches(line_numbers, missing, settings.batch_tokens)


def make_batches(line_numbers: list[int], samples: list[TokenizedSample], batch_tokens: int) -> list[pa.Table]:
    """Group samples by length into tables of `BATCH_SCHEMA`, longest first.

    Args:
        line_numbers: of each sample.
        samples: with one token or more each.
        batch_tokens: most tokens of a padded batch; a longer sample is a batch of its own.
    """
    num_tokens = np.array([len(sample.input_ids) for sample in samples], np.int64)
    return [
        pa.table(
            {
                "line_number": [line_numbers[number] for number in numbers],
                "input_ids": [samples[number].input_ids for number in numbers],
                "loss_mask": [samples[number].loss_mask for number in numbers],
            },
            schema=BATCH_SCHEMA,
        )
        for numbers in plan_batches(num_tokens, batch_tokens)
    ]


def generate_batch(job: GenerateJob, verifier: CapturingVerifier, batch: pa.Table) -> NDArray[np.int64]:
    """Run one batch through the verifier and write its samples; when this returns, they are all in the folder.

    Args:
        job: what to generate.
        verifier: the loaded verifier.
        batch: table of `BATCH_SCHEMA`.

    Returns:
        [W] int64 supervised tokens of each id.

    Raises:
        VerifierError: A state is NaN or infinite.
        ClusterError: The batch does not fit into the device's memory.
    """
    folder, conversations = job.settings.output_path, job.settings.conversations_path.name
    line_numbers = batch["line_number"].to_pylist()
    # Copies: what Arrow hands out is read-only, which torch does not know.
    ids = [torch.tensor(row.values.to_numpy()) for row in batch["input_ids"]]
    masks = [torch.tensor(row.values.to_numpy(zero_copy_only=False)) for row in batch["loss_mask"]]
    states = verifier.compute_states([f"{conversations}:{number}" for number in line_numbers], ids)
    paths = [sample_path(folder, number) for number in line_numbers]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(write_sample, paths, ids, masks, states))
    return _count(torch.cat(ids), torch.cat(masks), job.config.vocab_size)


def _count(input_ids: Tensor, loss_mask: Tensor, vocab_size: int) -> NDArray[np.int64]:
    """Return [W] int64: how often each id occurs among the supervised ones of [S] ids."""
    return torch.bincount(input_ids[loss_mask], minlength=vocab_size).numpy()
