import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_ray.demo.conversations import sample_answers, write_conversations
from eagle3_ray.demo.corpus import Corpus, build_corpus
from eagle3_ray.demo.tiny_verifier import (
    ASSISTANT,
    END,
    QUALITY_FILE,
    USER,
    Quality,
    VerifierRecipe,
    build_model,
    cut_windows,
    encode,
    make_verifier,
    measure_model,
    measure_unigram,
    read_quality,
    train_tokenizer,
)
from eagle3_ray.errors import UsageError

RECIPE = VerifierRecipe(
    hidden_size=64,
    intermediate_size=64,
    num_train_tokens=60 * 2 * 64,
    num_layers=8,
    vocab_size=300,
    window_tokens=64,
    windows_per_step=2,
)


def make_corpus() -> Corpus:
    """Arithmetic in words: easy enough to be learnt in some dozen steps."""
    names = ["one", "two", "three", "four", "five", "six"]
    documents = [
        "".join(f"line {number}: {first} and {second} make a pair\n" for number, second in enumerate(names * 8))
        for first in [f"{a} {b}" for a in names for b in names]
    ]
    return build_corpus(documents, seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Quality, list[int]]:
    verifier_dir = tmp_path_factory.mktemp("made") / "verifier"
    steps: list[int] = []
    quality = make_verifier(verifier_dir, make_corpus(), RECIPE, 0, lambda step, _, __: steps.append(step))
    return verifier_dir, quality, steps


def test_trained_verifier_predicts_held_out_text_better_than_token_frequencies(
    made: tuple[Path, Quality, list[int]],
) -> None:
    _, quality, steps = made
    assert quality.verifier.accuracy > 2 * quality.unigram.accuracy
    assert quality.verifier.loss < quality.unigram.loss < quality.uniform.loss == math.log(300)
    assert steps == list(range(1, 61))
    assert quality.num_train_tokens == 60 * 2 * 64


def test_folder_is_one_that_transformers_loads_by_itself(made: tuple[Path, Quality, list[int]]) -> None:
    verifier_dir, quality, _ = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(verifier_dir), AutoTokenizer.from_pretrained(verifier_dir)
    assert isinstance(model, LlamaForCausalLM) and isinstance(tokenizer, PreTrainedTokenizerFast)
    assert {tensor.dtype for tensor in load_file(verifier_dir / "model.safetensors").values()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(END) == 0
    config = json.loads((verifier_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    windows = cut_windows(encode(tokenizer, make_corpus().held_out), RECIPE.window_tokens)[:128]
    found = measure_model(model.float(), windows)
    assert found.accuracy == pytest.approx(quality.verifier.accuracy, abs=1e-3)  # one position of 5,000 on a tie
    assert found.loss == pytest.approx(quality.verifier.loss, rel=1e-4)  # float32, other threads


def test_same_seed_gives_the_same_weights(made: tuple[Path, Quality, list[int]], tmp_path: Path) -> None:
    verifier_dir, quality, _ = made
    again = make_verifier(tmp_path / "verifier", make_corpus(), RECIPE, 0, lambda *_: None)
    assert again == quality
    first, second = load_file(verifier_dir / "model.safetensors"), load_file(tmp_path / "verifier/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (verifier_dir / "tokenizer.json").read_bytes() == (tmp_path / "verifier/tokenizer.json").read_bytes()


def test_finished_verifier_is_known_again(made: tuple[Path, Quality, list[int]], tmp_path: Path) -> None:
    verifier_dir, quality, _ = made
    assert read_quality(verifier_dir, RECIPE, 0) == quality
    assert read_quality(tmp_path / "absent", RECIPE, 0) is None


def test_verifier_of_another_seed_or_without_marker_is_refused(
    made: tuple[Path, Quality, list[int]], tmp_path: Path
) -> None:
    verifier_dir, _, _ = made
    with pytest.raises(UsageError, match="was made with other settings") as caught:
        read_quality(verifier_dir, RECIPE, 1)
    assert "Choose another --output-path, or remove that folder." in str(caught.value)
    with pytest.raises(UsageError, match=f"found no {QUALITY_FILE}"):
        read_quality(tmp_path, RECIPE, 0)


def test_interrupted_training_leaves_no_folder_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    verifier_dir = tmp_path / "verifier"

    def interrupt(step: int, _: int, __: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_verifier(verifier_dir, make_corpus(), RECIPE, 0, interrupt)
    assert read_quality(verifier_dir, RECIPE, 0) is None


def test_any_text_is_encoded_and_comes_back() -> None:
    tokenizer = train_tokenizer(make_corpus().train, 300)
    text = "  Grüße, 世界!\n\ttabs and 'quotes'\r\n\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_gives_the_stream_that_was_trained_on_and_marks_the_answer() -> None:
    tokenizer = train_tokenizer(make_corpus().train, 300)
    messages = [{"role": "user", "content": "a question\n"}, {"role": "assistant", "content": "  an answer"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str) and text == f"{USER}a question\n{ASSISTANT}  an answer{END}"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str) and text.startswith(prompt) and prompt.endswith(ASSISTANT)
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert isinstance(marked, BatchEncoding)
    answer = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == f"  an answer{END}"


def test_unigram_is_measured_as_by_hand() -> None:
    train_ids = torch.tensor([1, 1, 1, 2])
    found = measure_unigram(train_ids, torch.tensor([[0, 1, 2]]), vocab_size=3)
    # counts 1 (never seen), 3, 1 of 5; targets 1 and 2
    assert found.loss == pytest.approx(-(math.log(3 / 5) + math.log(1 / 5)) / 2)
    assert found.accuracy == 0.5


def test_untrained_verifier_is_at_uniform_chance() -> None:
    tokenizer = train_tokenizer(make_corpus().train, 300)
    model = build_model(RECIPE, tokenizer, seed=0)
    found = measure_model(model, torch.randint(0, 300, (2, 64)))
    assert found.loss == pytest.approx(math.log(300), rel=1e-6)  # its head starts at zero


def test_conversations_follow_the_seed_and_keep_the_prompts(
    made: tuple[Path, Quality, list[int]], tmp_path: Path
) -> None:
    verifier_dir, _, _ = made
    prompts = make_corpus().prompts[:3]
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        write_conversations(tmp_path / name, verifier_dir, prompts, 16, seed, lambda *_: None)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (tmp_path / "third").read_bytes() != (tmp_path / "first").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "first").read_text().splitlines()]
    assert [[turn["role"] for turn in record["messages"]] for record in records] == [["user", "assistant"]] * 3
    assert [record["messages"][0]["content"] for record in records] == list(prompts)
    assert not any(mark in (tmp_path / "first").read_text() for mark in (USER, ASSISTANT, END))


def test_answer_does_not_depend_on_the_padding_of_its_batch(made: tuple[Path, Quality, list[int]]) -> None:
    verifier_dir, _, _ = made
    model = LlamaForCausalLM.from_pretrained(verifier_dir, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(verifier_dir)
    long, short = make_corpus().prompts[0], make_corpus().prompts[0][:30]
    # So cold that sampling takes the first choice: answers of two calls can be compared.
    alone = sample_answers(model, tokenizer, (short,), 12, temperature=1e-4)
    assert sample_answers(model, tokenizer, (long, short), 12, temperature=1e-4)[1] == alone[0]
