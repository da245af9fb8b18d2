"""Held-out prompts -> JSONL of chats in which the verifier itself answers.

A draft has to foresee what its verifier says, not what people wrote: so the answers are sampled from the verifier.
At temperature 0 a model this small soon repeats itself, which would flatter the draft; at 1 it rambles.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPERATURE = 0.7
PROMPTS_PER_BATCH = 64  # larger ones spend their time on moving keys and values


def write_conversations(
    path: Path,
    verifier_dir: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    seed: int,
    report: Callable[[int, int], None],
) -> None:
    """Let the verifier answer every prompt and write the chats, a line each, whole or not at all.

    Args:
        path: JSONL file of `{"messages": [user, assistant]}`.
        verifier_dir: folder of `tiny_verifier`.
        prompts: texts; one whose answer is blank is left out.
        max_new_tokens: an answer that does not end by itself is cut there.
        seed: of the sampling.
        report: called with the prompts answered so far, and all.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(verifier_dir)
    model = LlamaForCausalLM.from_pretrained(verifier_dir, dtype=torch.float32).eval()
    lines = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            batch = prompts[start : start + PROMPTS_PER_BATCH]
            lines += [
                json.dumps(to_record(prompt, answer))
                for prompt, answer in zip(batch, sample_answers(model, tokenizer, batch, max_new_tokens), strict=True)
                if answer.strip()
            ]
            report(start + len(batch), len(prompts))
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def to_record(prompt: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Return one line's object."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def sample_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float = TEMPERATURE,
) -> list[str]:
    """Return the verifier's answer to each prompt, without special tokens."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert isinstance(inputs, BatchEncoding)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[misc]  # transformers' own annotation of `self`
            **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
        )
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
