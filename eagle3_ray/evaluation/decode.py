"""Greedy decoding of one prompt: by the verifier alone, and by the verifier with a draft.

A verification reads the token chosen last and K guesses in one pass. The guesses are right up to the first that is not
what the verifier itself chooses there; its own choice follows them. So a verification gives 1 to K+1 tokens, and the
output is the verifier's own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eagle3_ray.errors import Eagle3RayError
from eagle3_ray.evaluation.served_draft import DraftChain
from eagle3_ray.generation.hidden_states import CapturingVerifier

# A pass over several tokens rounds differently from one over a single token; of two choices whose logits are this
# close, relative to the larger, either is the verifier's.
TIE_FRAC = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Reading:
    """What the verifier makes of m tokens.

    Attributes:
        choices: [m] int64, the token it would say after each; [1] of the last one if only that was asked for.
        margins: like `choices`, float32: how far the next best is behind, relative to the best logit.
        aux_states: [m, A*H], its auxiliary states.
    """

    choices: Tensor
    margins: Tensor
    aux_states: Tensor


class DecodingVerifier:
    """A verifier with one sequence's keys and values."""

    def __init__(self, model: Any, hooked: CapturingVerifier, aux_layer_ids: Sequence[int]) -> None:
        self._model, self._hooked, self._aux_layer_ids = model, hooked, tuple(aux_layer_ids)
        self._cache = DynamicCache()
        eos = model.generation_config.eos_token_id
        self.stop_ids = frozenset([eos] if isinstance(eos, int) else eos or ())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._hooked.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def start(self) -> None:
        """Begin another sequence."""
        # Not made of the model's config: a window's cache cannot take tokens back. The masks keep the window.
        self._cache = DynamicCache()

    def read(self, token_ids: Tensor, last_only: bool = False) -> Reading:
        """Read on: token_ids [m] int64 on the device."""
        outputs = self._model(
            input_ids=token_ids[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        best = outputs.logits[0].float().topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]) / best.values.abs().amax(dim=1).clamp(min=1e-6)
        captured = self._hooked.captured
        return Reading(best.indices[:, 0], margins, torch.cat([captured[i][0] for i in self._aux_layer_ids], dim=-1))

    def take_back(self, num_tokens: int) -> None:
        """Forget the last tokens read."""
        self._cache.crop(self._cache.get_seq_length() - num_tokens)


@dataclass(frozen=True)
class PromptResult:
    """One prompt, decoded both ways.

    Attributes:
        name: which one.
        num_prompt_tokens: its length.
        num_tokens: tokens of the output, and of the verifier's alone.
        num_verifications: passes of the verifier over guesses.
        right: [K] of those that reached guess j, those whose first j guesses are all right.
        reached: [K] verifications whose guess j lies within the output.
        with_draft_s: seconds from the prompt's pass to the last token.
        alone_s: the same of the verifier alone.
        tie: None if both outputs are one; else the relative margin between the verifier's two best choices where they
            part, which is as close as rounding.
    """

    name: str
    num_prompt_tokens: int
    num_tokens: int
    num_verifications: int
    right: tuple[int, ...]
    reached: tuple[int, ...]
    with_draft_s: float
    alone_s: float
    tie: float | None


@torch.inference_mode()
def evaluate_prompt(
    verifier: DecodingVerifier,
    chain: DraftChain,
    name: str,
    prompt: Tensor,
    num_speculative_tokens: int,
    max_new_tokens: int,
) -> PromptResult:
    """Decode a prompt with and without the draft, and compare.

    Args:
        verifier: what decodes.
        chain: the draft, with nothing read yet.
        name: of the prompt.
        prompt: [S] int64, S >= 1.
        num_speculative_tokens: K.
        max_new_tokens: where the output is cut.

    Raises:
        Eagle3RayError: The outputs differ by more than rounding explains.
    """
    prompt = prompt.to(verifier.device)
    alone, margins, alone_s = decode_alone(verifier, prompt, max_new_tokens)
    found = decode_with_draft(verifier, chain, prompt, num_speculative_tokens, max_new_tokens)
    tie = None
    if found.token_ids != alone:
        place = next(
            (n for n, (a, b) in enumerate(zip(alone, found.token_ids, strict=False)) if a != b), len(margins) - 1
        )
        tie = margins[place]
        dtype = verifier.dtype
        if tie > TIE_FRAC.get(dtype, TIE_FRAC[torch.bfloat16]):
            raise Eagle3RayError(
                f"{name}: with the draft the output differs from the verifier's own at token {place}, where its best "
                f"choice is clear (by {tie:.2g} of its logit). This is a bug in decoding or in the verifier's cache."
            )
    return PromptResult(
        name,
        len(prompt),
        len(found.token_ids),
        found.num_verifications,
        tuple(found.right),
        tuple(found.reached),
        found.seconds,
        alone_s,
        tie,
    )


def decode_alone(
    verifier: DecodingVerifier, prompt: Tensor, max_new_tokens: int
) -> tuple[list[int], list[float], float]:
    """Return the verifier's greedy output, the margin of each choice, and the seconds after the prompt's pass."""
    verifier.start()
    reading = verifier.read(prompt, last_only=True)
    token_ids, margins = [int(reading.choices[-1])], [float(reading.margins[-1])]
    start = time.perf_counter()
    while len(token_ids) < max_new_tokens and token_ids[-1] not in verifier.stop_ids:
        reading = verifier.read(reading.choices[-1:])
        token_ids.append(int(reading.choices[-1]))  # sync: the end must be seen
        margins.append(float(reading.margins[-1]))
    return token_ids, margins, time.perf_counter() - start


@dataclass
class Speculated:
    """What decoding with a draft gives; see `PromptResult`."""

    token_ids: list[int]
    num_verifications: int
    right: list[int]
    reached: list[int]
    seconds: float

    def count(self, num_right: int, num_within: int) -> None:
        """Count a verification whose first `num_right` guesses are right, with `num_within` inside the output."""
        self.num_verifications += 1
        for j in range(len(self.right)):
            self.reached[j] += j < num_within
            self.right[j] += j < min(num_right, num_within)


def decode_with_draft(
    verifier: DecodingVerifier, chain: DraftChain, prompt: Tensor, num_speculative_tokens: int, max_new_tokens: int
) -> Speculated:
    """Decode greedily; each pass of the verifier reads what it chose last and the draft's guesses of what follows."""
    num_guesses = num_speculative_tokens
    verifier.start()
    reading = verifier.read(prompt, last_only=True)
    found = Speculated([int(reading.choices[-1])], 0, [0] * num_guesses, [0] * num_guesses, 0.0)
    start = time.perf_counter()
    new_ids, aux_states = torch.cat((prompt[1:], reading.choices)), reading.aux_states
    while len(found.token_ids) < max_new_tokens and found.token_ids[-1] not in verifier.stop_ids:
        chain.extend(new_ids, aux_states)
        guesses = chain.propose(num_guesses)
        reading = verifier.read(torch.cat((new_ids[-1:], guesses)))
        num_right = int((guesses == reading.choices[:-1]).long().cumprod(0).sum())  # sync: the next pass depends on it
        verifier.take_back(num_guesses - num_right)
        new_ids, aux_states = reading.choices[: num_right + 1], reading.aux_states[: num_right + 1]
        kept = _until_stop(new_ids.tolist(), verifier.stop_ids)[: max_new_tokens - len(found.token_ids)]
        is_over = kept[-1] in verifier.stop_ids or len(found.token_ids) + len(kept) == max_new_tokens
        found.count(num_right, len(kept) if is_over else num_guesses)
        found.token_ids += kept
    found.seconds = time.perf_counter() - start
    return found


def _until_stop(token_ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to the first that ends the output."""
    for number, token_id in enumerate(token_ids):
        if token_id in stop_ids:
            return token_ids[: number + 1]
    return token_ids
