"""A verifier small enough for tests: random weights, a byte-level BPE tokenizer trained on the spot, chat templates."""

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        hidden_size=32,
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
