"""A verifier small enough for tests: random weights, a byte-level BPE tokenizer trained on the spot, chat templates."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_ray.data.samples import Sample, SampleSpec, read_sample
from eagle3_ray.jobs import generate
from eagle3_ray.model.verifier import load_final_norm, read_verifier_config
from eagle3_ray.verbs import GenerateSettings

HIDDEN_SIZE = 32
SPECIAL_TOKENS = ["<s>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
TRAINING_TEXT = ["Hello there, how are you today? I am fine, thank you. Why do you ask? Because."] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_TAG = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "(m['content'] | trim)")
# As Llama 2's: no header before the assistant's text, so nothing that add_generation_prompt could add.
WITHOUT_PROMPT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<s>[' + m['content'] + ']' }}{% endif %}{% endfor %}"
)
# As Qwen 3's: only the last turn keeps a block of thoughts, here an empty one.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(think)' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOUTING = CHATML.replace("m['content']", "(m['content'] | upper)")
COUNTING = "{{ messages | length }}" + CHATML  # what stands before a turn depends on what comes after it
REFUSING = "{{ raise_exception('roles must alternate') }}"


@functools.cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 320 ids."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained(), bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(num_layers: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama, hidden size 32, norms that are not ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.to(dtype)
    return model


def write_verifier(
    folder: Path, chat_template: str | None = CHATML, num_layers: int = 7, seed: int = 0
) -> LlamaForCausalLM:
    """Write a transformers folder with weights and tokenizer; return the model in fp32."""
    model = make_model(num_layers, seed)
    model.save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return model


NUM_LINES = 24
BLANK_LINE, UNTRAINABLE_LINE, TEXT_LINE = 5, 9, 12  # counted from 1
MAX_SEQ_LEN = 60


def make_line(number: int) -> str:
    if number == BLANK_LINE:
        return ""
    if number == UNTRAINABLE_LINE:
        return json.dumps({"messages": [{"role": "user", "content": "Hello?"}]})
    if number == TEXT_LINE:
        return json.dumps({"text": "Hello there, how are you today? " * 2})
    words = "I am fine, thank you. " * (1 + 7 * number % 5)
    turns = [{"from": "human", "value": f"Why {number}?"}, {"from": "gpt", "value": words.strip()}]
    return json.dumps({"conversations": turns * (1 + number % 2)})


class World:
    """A verifier, conversations and settings in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verifier_path, self.conversations_path = folder / "verifier", folder / "c.jsonl"
        self.output_path = folder / "data"
        self.model: LlamaForCausalLM = write_verifier(self.verifier_path)
        self.conversations_path.write_text("\n".join(make_line(number) for number in range(1, NUM_LINES + 1)))

    def run(self, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "verifier_name_or_path": str(self.verifier_path),
            "conversations_path": self.conversations_path,
            "output_path": self.output_path,
            "max_seq_len": MAX_SEQ_LEN,
            "batch_tokens": 150,
            "num_workers": 2,
        }
        generate.run(GenerateSettings(**(settings | changes)))

    def read(self, number: int) -> Sample:
        spec = SampleSpec(
            1, HIDDEN_SIZE, 3, VOCAB_SIZE, load_final_norm(read_verifier_config(str(self.verifier_path))), 1e-6
        )
        return read_sample(str(self.output_path / f"data_{number}.pt"), spec)

    def times(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.output_path.glob("data_*.pt")}

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.output_path.iterdir()}


def trainable() -> list[int]:
    return [number - 1 for number in range(1, NUM_LINES + 1) if number not in (BLANK_LINE, UNTRAINABLE_LINE)]
