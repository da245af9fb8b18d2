"""Decoding with a draft against `generate` of transformers, and its counts against a walk over the output."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from eagle3_ray.data.samples import Sample
from eagle3_ray.errors import Eagle3RayError
from eagle3_ray.evaluation.decode import DecodingVerifier, decode_alone, decode_with_draft, evaluate_prompt
from eagle3_ray.evaluation.estimate import estimate_sample
from eagle3_ray.evaluation.served_draft import DraftChain
from eagle3_ray.generation.hidden_states import CapturingVerifier
from eagle3_ray.model.draft import Eagle3Draft
from tests.makers import make_spec
from tests.unit.model.test_draft import HIDDEN, VOCAB, make_config

LAYERS, NUM_GUESSES, NUM_NEW = (2, 4, 5), 3, 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    # Its cache must take tokens back though every other layer sees the last eight alone.
    "window": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=8)),
}


def make_verifier(kind: str = "llama") -> tuple[Any, CapturingVerifier, DecodingVerifier]:
    torch.manual_seed(2)
    model = MODELS[kind]().double().eval()
    hooked = CapturingVerifier(kind, model.model, LAYERS, 7)
    return model, hooked, DecodingVerifier(model, hooked, LAYERS)


def make_prompt(seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (5 + seed,), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: Tensor, num_new: int = NUM_NEW) -> list[int]:
    output = model.generate(prompt[None], max_new_tokens=num_new, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def make_draft(output: list[int]) -> tuple[Eagle3Draft, Tensor]:
    """A random draft that can say little but what stands in the output, and so is right now and then."""
    torch.manual_seed(0)
    kept = sorted(set(output))
    draft = Eagle3Draft(make_config()).double().requires_grad_(False)
    draft.lm_head = torch.nn.Linear(HIDDEN, len(kept), bias=False).double().requires_grad_(False)
    return draft, torch.tensor(kept)


class Scripted(DraftChain):
    """Guesses the output it is given, but for every fourth token of it."""

    def __init__(self, output: list[int], prompt: Tensor) -> None:
        self.num_read = 1 - len(prompt)  # the output begins behind the prompt
        self.output = [token if n % 4 else (token + 1) % VOCAB for n, token in enumerate(output)] + [0] * NUM_GUESSES

    def extend(self, token_ids: Tensor, aux_states: Tensor) -> None:
        assert aux_states.shape == (len(token_ids), 3 * HIDDEN)
        self.num_read += len(token_ids)

    def propose(self, num_tokens: int) -> Tensor:
        return torch.tensor(self.output[self.num_read : self.num_read + num_tokens])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_the_output_is_that_of_generate_with_and_without_a_draft(kind: str, seed: int) -> None:
    model, _, verifier = make_verifier(kind)
    prompt = make_prompt(seed)
    expected = greedy(model, prompt)
    assert decode_alone(verifier, prompt, NUM_NEW)[0] == expected
    draft, kept_ids = make_draft(expected)
    found = decode_with_draft(verifier, DraftChain(draft, kept_ids), prompt, NUM_GUESSES, NUM_NEW)
    assert found.token_ids == expected
    assert decode_with_draft(verifier, Scripted(expected, prompt), prompt, NUM_GUESSES, NUM_NEW).token_ids == expected


@pytest.mark.parametrize("num_new", range(2, 12))
@torch.inference_mode()
def test_counts_equal_a_walk_over_the_output(num_new: int) -> None:
    model, _, verifier = make_verifier()
    prompt = make_prompt(0)
    expected = greedy(model, prompt, num_new)
    chain = Scripted(expected, prompt)
    found = decode_with_draft(verifier, chain, prompt, NUM_GUESSES, num_new)
    place, num_verifications, right, reached = 1, 0, [0] * NUM_GUESSES, [0] * NUM_GUESSES
    while place < num_new:
        num_verifications += 1
        num_right = 0
        while num_right < NUM_GUESSES and (place + num_right) % 4 and place + num_right < num_new:
            num_right += 1
        for j in range(NUM_GUESSES):
            reached[j] += place + j < num_new
            right[j] += j < num_right
        place += num_right + 1
    assert (found.num_verifications, found.right, found.reached) == (num_verifications, right, reached)


@torch.inference_mode()
def test_an_output_ends_with_the_verifiers_end_even_within_guesses() -> None:
    model, hooked, verifier = make_verifier()
    prompt = make_prompt(1)
    expected = greedy(model, prompt)
    end = next(n for n in range(2, NUM_NEW) if n % 4 == 2 and expected[n] not in expected[:n])
    model.generation_config.eos_token_id = [expected[end]]
    verifier = DecodingVerifier(model, hooked, LAYERS)
    chain = Scripted(expected, prompt)
    found = decode_with_draft(verifier, chain, prompt, NUM_GUESSES, NUM_NEW)
    assert found.token_ids == expected[: end + 1] == decode_alone(verifier, prompt, NUM_NEW)[0]
    assert sum(found.right) <= end


@torch.inference_mode()
def test_a_sample_is_counted_as_chains_of_guesses_that_start_at_each_of_its_tokens() -> None:
    model, hooked, _ = make_verifier()
    prompt = make_prompt(2)
    ids = torch.cat((prompt, torch.tensor(greedy(model, prompt))))
    draft, kept_ids = make_draft(ids[len(prompt) :].tolist())
    model.model(input_ids=ids[None])
    captured = copy.copy(hooked.captured)
    aux_states, last_state = tuple(captured[i][0] for i in LAYERS), captured[7][0]
    sample = Sample("s", ids, torch.arange(len(ids)) >= len(prompt) + 1, aux_states, last_state)
    right, reached = [0] * NUM_GUESSES, [0] * NUM_GUESSES
    # A chain behind n tokens read guesses tokens n+1, ...; the last token read gives none, nothing follows it.
    for n in range(len(prompt), len(ids) - 1):
        chain = DraftChain(draft, kept_ids)
        chain.extend(ids[1 : n + 1], torch.cat(aux_states, dim=1)[:n])
        equal = (chain.propose(NUM_GUESSES)[: len(ids) - n - 1] == ids[n + 1 : n + 1 + NUM_GUESSES]).tolist()
        for j in range(len(equal)):
            reached[j] += 1
            right[j] += all(equal[: j + 1])

    def read_last_state(states: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(hooked.final_norm(states))
        return logits

    spec = make_spec(hidden_size=HIDDEN, vocab_size=VOCAB)
    # The text is the verifier's own, so the oracle needs no targets; the last one lies behind the text's end.
    found = estimate_sample(draft, kept_ids, read_last_state, sample, spec, NUM_GUESSES)
    assert sum(right) > 0 and right[0] < reached[0]
    assert found == (right, reached)


@torch.inference_mode()
def test_outputs_that_part_where_the_choice_is_clear_are_an_error_and_near_ties_are_told() -> None:
    class Forgetful(DecodingVerifier):
        def take_back(self, num_tokens: int) -> None:
            pass

    model, hooked, _ = make_verifier()
    prompt = make_prompt(3)
    chain = Scripted([0] * NUM_NEW, prompt)
    with pytest.raises(Eagle3RayError, match="where its best choice is clear"):
        evaluate_prompt(Forgetful(model, hooked, LAYERS), chain, "p", prompt, NUM_GUESSES, NUM_NEW)
    result = evaluate_prompt(
        DecodingVerifier(model, hooked, LAYERS), Scripted([0] * NUM_NEW, prompt), "p", prompt, 2, 9
    )
    assert result.tie is None and result.num_tokens == 9 and len(result.right) == 2
