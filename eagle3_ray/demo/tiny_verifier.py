"""A verifier made on the spot: byte-level BPE tokenizer with a chat template, and a Llama trained on passages.

    <|user|>prompt<|assistant|>continuation<|end|><|user|>prompt...     one stream of tokens, cut into windows

It answers a chat by going on with the user's text. The folder is an ordinary transformers folder (bf16 weights);
`quality.json` beside the weights holds what was measured, and is how a finished verifier is known again.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_ray.demo.corpus import Corpus, Passage
from eagle3_ray.demo.muon import Muon
from eagle3_ray.errors import UsageError

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ASSISTANT}{{% generation %}}{{{{ message['content'] }}}}{END}{{% endgeneration %}}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
QUALITY_FILE = "quality.json"
MAX_POSITIONS = 2048
EMBEDDING_STD = 0.5
WARMUP_STEPS, DECAY_FRAC = 10, 0.5  # rise, stay, then fall to 0 over the last half
ADAM_BETAS = (0.8, 0.95)
MAX_HELD_OUT_WINDOWS = 128
NUM_THREADS = 2  # fixed: the order of sums, and with it every weight, depends on it

Report = Callable[[int, int, float], None]  # steps done, all steps, loss in nats


@dataclass(frozen=True)
class VerifierRecipe:
    """Size of the verifier and length of its training.

    Attributes:
        hidden_size: H.
        num_train_tokens: tokens of all steps together.
        window_tokens: length of a training sequence.
        windows_per_step: sequences in one update.
        matrix_rate: peak rate of Muon, for the matrices inside the layers.
        vector_rate: peak rate of Adam, for embedding, head and norms.
    """

    hidden_size: int
    num_train_tokens: int
    intermediate_size: int
    num_layers: int = 8
    head_dim: int = 32
    vocab_size: int = 512
    window_tokens: int = 256
    windows_per_step: int = 4
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3

    @property
    def num_steps(self) -> int:
        """Updates."""
        return max(1, self.num_train_tokens // (self.window_tokens * self.windows_per_step))


@dataclass(frozen=True)
class Predictions:
    """How well the next token is told: mean loss in nats, and share (0..1) of first choices that are right."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Quality:
    """What the finished verifier and two kinds of chance do on held-out passages.

    Attributes:
        num_train_tokens: tokens it was trained on, repeats counted.
        num_held_out_tokens: tokens it was measured on.
        verifier: of the stored bf16 weights.
        unigram: of the training text's token frequencies.
        uniform: of any token being as likely as any other.
    """

    num_train_tokens: int
    num_held_out_tokens: int
    verifier: Predictions
    unigram: Predictions
    uniform: Predictions


def make_verifier(verifier_dir: Path, corpus: Corpus, recipe: VerifierRecipe, seed: int, report: Report) -> Quality:
    """Train a verifier and write its folder, whole or not at all.

    Args:
        verifier_dir: must not exist.
        corpus: what to train on, what to measure on.
        recipe: size and length.
        seed: of the weights and of the order of the windows. Same seed, text and machine: same weights.
        report: called after every step.
    """
    work_dir = verifier_dir.with_name(f".{verifier_dir.name}.tmp")
    shutil.rmtree(work_dir, ignore_errors=True)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
        train_ids, held_out_ids = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
        model = build_model(recipe, tokenizer, seed)
        train_model(model, cut_windows(train_ids, recipe.window_tokens), recipe, seed, report)
        save_folder(work_dir, tokenizer, model)
        windows = cut_windows(held_out_ids, recipe.window_tokens)[:MAX_HELD_OUT_WINDOWS]
        quality = Quality(
            num_train_tokens=recipe.num_steps * recipe.windows_per_step * recipe.window_tokens,
            num_held_out_tokens=windows[:, 1:].numel(),
            verifier=measure_model(model.float(), windows),
            unigram=measure_unigram(train_ids, windows, recipe.vocab_size),
            uniform=Predictions(math.log(recipe.vocab_size), 1 / recipe.vocab_size),
        )
    finally:
        torch.set_num_threads(num_threads)
    record = {"recipe": dataclasses.asdict(recipe), "seed": seed, "quality": dataclasses.asdict(quality)}
    (work_dir / QUALITY_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    work_dir.rename(verifier_dir)
    return quality


def read_quality(verifier_dir: Path, recipe: VerifierRecipe, seed: int) -> Quality | None:
    """Return what was measured when the verifier was made, or None if there is no folder yet.

    Raises:
        UsageError: The folder holds something else, or a verifier of another recipe or seed.
    """
    if not verifier_dir.exists():
        return None
    path = verifier_dir / QUALITY_FILE
    advice = "Choose another --output-path, or remove that folder."
    if not path.is_file():
        raise UsageError(f"{verifier_dir}: expected a verifier this demo made, found no {QUALITY_FILE}. {advice}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["recipe"] != dataclasses.asdict(recipe) or record["seed"] != seed:
        raise UsageError(
            f"{verifier_dir}: was made with other settings (--short, --seed, or another version). {advice}"
        )
    measured = record["quality"]
    for name in ("verifier", "unigram", "uniform"):
        measured[name] = Predictions(**measured[name])
    return Quality(**measured)


def train_tokenizer(passages: tuple[Passage, ...], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the chat template; any text can be encoded and comes back as it was."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((passage.prompt + passage.continuation for passage in passages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    """Write tokenizer and model, in bf16 from here on, under names that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", encoding="utf-8"
    )
    model.bfloat16().save_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, passages: tuple[Passage, ...]) -> Tensor:
    """Return one stream of chats, [tokens] int64."""
    chats = [f"{USER}{passage.prompt}{ASSISTANT}{passage.continuation}{END}" for passage in passages]
    return torch.tensor([token for ids in tokenizer(chats)["input_ids"] for token in ids])


def cut_windows(ids: Tensor, window_tokens: int) -> Tensor:
    """[tokens] -> [windows, window_tokens]; the rest is left out."""
    return ids[: len(ids) // window_tokens * window_tokens].view(-1, window_tokens)


def build_model(recipe: VerifierRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained Llama, float32, whose layers and head start at zero output."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // recipe.head_dim,
        num_key_value_heads=recipe.hidden_size // recipe.head_dim // 2,
        head_dim=recipe.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(0.0, EMBEDDING_STD, generator=generator)
            elif weight.ndim == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    return model


def train_model(model: LlamaForCausalLM, windows: Tensor, recipe: VerifierRecipe, seed: int, report: Report) -> None:
    """Train on windows [N, window_tokens], passing over them as often as the recipe's tokens ask for."""
    inside = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (".layers." in n and p.ndim == 2)]
    muon, adam = Muon(inside), torch.optim.AdamW(others, betas=ADAM_BETAS, weight_decay=0.0)
    batches = _iter_batches(windows, recipe.windows_per_step, seed)
    model.train()
    for step in range(recipe.num_steps):
        loss = _next_token_losses(model, next(batches))[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / WARMUP_STEPS, (1 - step / recipe.num_steps) / DECAY_FRAC, 1.0)
        muon.step(recipe.matrix_rate * factor)
        adam.param_groups[0]["lr"] = recipe.vector_rate * factor
        adam.step()
        model.zero_grad()
        report(step + 1, recipe.num_steps, loss.item())


@torch.no_grad()
def measure_model(model: LlamaForCausalLM, windows: Tensor) -> Predictions:
    """Measure next-token predictions on windows [N, window_tokens]."""
    model.eval()
    parts = [_next_token_losses(model, batch) for batch in windows.split(16)]
    losses, is_right = (torch.cat(part) for part in zip(*parts, strict=True))
    return Predictions(losses.double().mean().item(), is_right.double().mean().item())


def measure_unigram(train_ids: Tensor, windows: Tensor, vocab_size: int) -> Predictions:
    """Measure guessing by frequency alone; a token never seen counts as seen once."""
    counts = torch.bincount(train_ids, minlength=vocab_size).clamp(min=1).double()
    targets = windows[:, 1:].flatten()
    loss = -(counts / counts.sum()).log()[targets].mean()
    return Predictions(loss.item(), (targets == counts.argmax()).double().mean().item())


def _next_token_losses(model: LlamaForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T] ids -> loss in nats [N * (T-1)] of each next token, and whether the first choice is it."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _iter_batches(windows: Tensor, windows_per_step: int, seed: int) -> Iterator[Tensor]:
    """Yield [windows_per_step, window_tokens] without end; each pass in a new order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < windows_per_step:
            order = torch.cat((order, torch.randperm(len(windows), generator=generator)))
        yield windows[order[:windows_per_step]]
        order = order[windows_per_step:]
