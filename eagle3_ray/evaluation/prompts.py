"""What to go on from: prompts of a JSONL file, or what stands before the first supervised token of a sample.

A line is one prompt, in one of the forms of `generation.conversations` (of a chat, what the assistant says last is left
out), or

    {"prompt": "..."}           one user's turn
    {"turns": ["...", ...]}     the first of a user's turns, as in MT-Bench
"""

import json
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eagle3_ray.errors import DataError
from eagle3_ray.generation.conversations import index_lines, iter_lines, parse_conversation
from eagle3_ray.storage import StoragePath

MAX_NAMED = 20


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        name: what an error or a result calls it.
        token_ids: [S] int64, S >= 1.
    """

    name: str
    token_ids: Tensor


@dataclass(frozen=True)
class PromptRules:
    """What a prompt must fulfil.

    Attributes:
        vocab_size: W.
        context: most tokens that the verifier can read, None if it does not say.
        num_new_tokens: tokens that come behind the prompt, guesses included.
    """

    vocab_size: int
    context: int | None
    num_new_tokens: int

    def find_problem(self, token_ids: Tensor) -> str:
        """Return what is wrong with a prompt, or nothing."""
        if token_ids.numel() == 0:
            return "no token is left to go on from"
        if int(token_ids.max()) >= self.vocab_size:
            return f"id {int(token_ids.max())}, the verifier's vocabulary ends at {self.vocab_size - 1}"
        num_all = len(token_ids) + self.num_new_tokens
        if self.context is not None and num_all > self.context:
            return (
                f"{len(token_ids):,} tokens, and {self.num_new_tokens:,} to come, are more than the verifier's context "
                f"of {self.context:,}"
            )
        return ""


def read_prompts(
    path: StoragePath, tokenizer: PreTrainedTokenizerBase, num_prompts: int, rules: PromptRules
) -> list[Prompt]:
    """Read the first prompts of a JSONL file.

    Raises:
        DataError: There are none, or some cannot be used; all of these are named with what is wrong.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    chunks, _ = index_lines(path)
    for number, line in (numbered for chunk in chunks for numbered in iter_lines(path, chunk)):
        if len(prompts) + len(problems) == num_prompts:
            break
        try:
            token_ids = _tokenize(line, tokenizer)
            problem = rules.find_problem(token_ids)
        except (DataError, jinja2.TemplateError) as error:
            token_ids, problem = torch.empty(0, dtype=torch.int64), str(error)
        if problem:
            problems.append(f"line {number}: {problem}")
        else:
            prompts.append(Prompt(f"line {number}", token_ids))
    refuse_prompts(str(path), problems)
    return prompts


def refuse_prompts(source: str, problems: list[str]) -> None:
    """Refuse prompts if anything is wrong with them.

    Raises:
        DataError: Names the first problems.
    """
    if problems:
        more = len(problems) - MAX_NAMED
        rest = [f"... and {more} more"] if more > 0 else []
        raise DataError(
            "\n  ".join([f"{source}: {len(problems)} prompts cannot be used:", *problems[:MAX_NAMED], *rest])
            + "\nCorrect them or take them out; a lower --max-new-tokens leaves more room."
        )


def _tokenize(line: bytes, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    record = _read_own_form(line)
    if record is None:
        conversation = parse_conversation(line)
        if not conversation.turns:
            return _as_tensor(tokenizer(conversation.text)["input_ids"])
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError("only the assistant speaks; a prompt ends with what it answers to")
    else:
        messages = [{"role": "user", "content": record}]
    if not tokenizer.chat_template:
        if record is None:
            raise DataError('the tokenizer has no chat template; give plain text ({"text": ...})')
        return _as_tensor(tokenizer(record)["input_ids"])
    rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return _as_tensor(rendered["input_ids"])


def _read_own_form(line: bytes) -> str | None:
    """Return the prompt of a line in one of the two forms of this file, None of any other line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or ("prompt" in record) == ("turns" in record):
        return None
    text = record["prompt"] if "prompt" in record else next(iter(record["turns"] or [""]), "")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"its {'prompt' if 'prompt' in record else 'turns'} holds no text")
    return text


def _as_tensor(token_ids: list[int]) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64)


def prompt_of_sample(name: str, input_ids: Tensor, loss_mask: Tensor) -> Prompt:
    """Return what stands before a sample's first supervised token; all of it if none is."""
    supervised = loss_mask.nonzero()
    end = int(supervised[0]) if len(supervised) else len(input_ids)
    return Prompt(name, input_ids[:end].clone())
