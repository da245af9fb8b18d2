"""What benchmarks of the whole `train` are given: a verifier, samples and a vocabulary mapping of random numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_ray.data.vocab import choose_vocab, write_mapping
from eagle3_ray.demo.tiny_verifier import MAX_POSITIONS, VerifierRecipe
from tests.makers import write_samples


def write_inputs(folder: Path, recipe: VerifierRecipe, lengths: Sequence[int], draft_vocab_size: int) -> None:
    """Make `verifier`, `data`, `d2t.npy` and `t2d.npy` in a folder; `lengths` are the samples' tokens."""
    num_heads = recipe.hidden_size // recipe.head_dim
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "verifier")
    write_samples(folder / "data", list(lengths), hidden_size=recipe.hidden_size, vocab_size=recipe.vocab_size)
    mapping = choose_vocab(np.arange(recipe.vocab_size, 0, -1), draft_vocab_size)
    write_mapping(mapping, str(folder / "d2t.npy"), str(folder / "t2d.npy"))


def train_flags(folder: Path) -> dict[str, object]:
    """Return the settings of `train` that name what `write_inputs` made."""
    return {
        "verifier_name_or_path": str(folder / "verifier"),
        "data_path": str(folder / "data"),
        "d2t_path": str(folder / "d2t.npy"),
        "t2d_path": str(folder / "t2d.npy"),
        "log_dir": str(folder / "logs"),
    }
