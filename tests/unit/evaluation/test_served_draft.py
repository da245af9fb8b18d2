"""A chain of guesses with keys and values kept, against the unroll that training makes of the same tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.errors import UsageError, VerifierError
from eagle3_ray.evaluation.served_draft import DraftChain, check_draft_fits
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.verifier import VerifierInfo
from tests.unit.model.test_draft import (
    AUX,
    DRAFT_VOCAB,
    HIDDEN,
    OPTIONS,
    STEPS,
    VOCAB,
    inputs_of,
    make_config,
    make_draft,
)

NUM_GUESSES = STEPS
KEPT_IDS = torch.arange(DRAFT_VOCAB) + 10
LENGTH = 13


def make_sequence() -> tuple[Tensor, Tensor]:
    """Ids [LENGTH] of the tokens after each position, and the verifier's states there."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
    return ids, torch.randn(LENGTH, AUX * HIDDEN, generator=generator, dtype=torch.float64)


def unrolled_guesses(draft: Eagle3Draft, ids: Tensor, aux_states: Tensor, num_read: int, guesses: Tensor) -> Tensor:
    """What the training's unroll ranks first behind `num_read` positions, given these guesses as the text."""
    after = NUM_GUESSES - 1
    size = num_read + after
    packed = PackedBin(
        number=0,
        row=0,
        num_tokens=size,
        input_ids=torch.cat((ids[:num_read], guesses[:after])),
        aux_states=torch.cat((aux_states[:num_read], torch.zeros(after, AUX * HIDDEN, dtype=torch.float64))),
        last_state=torch.zeros(size, HIDDEN, dtype=torch.float64),
        loss_mask=torch.arange(size) >= num_read - 1,  # the last position read is a row, and has all its steps
        document_ids=torch.zeros(size, dtype=torch.int64),
        position_ids=torch.arange(1, size + 1),
    )
    inputs = inputs_of(packed, draft)
    row = int((inputs.layout.rows == num_read - 1).nonzero())
    return torch.stack([KEPT_IDS[draft.lm_head(states[row]).argmax()] for states in draft.unroll(inputs)])


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_guesses_are_those_of_the_training_unroll_wherever_the_verifier_stands(
    num_layers: int, options: dict[str, Any]
) -> None:
    draft, (ids, aux_states) = make_draft(make_config(num_layers, **options)), make_sequence()
    chain, num_read = DraftChain(draft, KEPT_IDS), 0
    seen = set()
    for num_new in (4, 1, 3, 1, 4):  # what verifications may give
        chain.extend(ids[num_read : num_read + num_new], aux_states[num_read : num_read + num_new])
        num_read += num_new
        guesses = chain.propose(NUM_GUESSES)  # whatever came of them, they leave no trace
        assert torch.equal(guesses, unrolled_guesses(draft, ids, aux_states, num_read, guesses))
        seen |= set(guesses.tolist())
    assert len(seen) > 3


def test_a_draft_of_another_verifier_is_refused_with_all_that_differs() -> None:
    text: dict[str, int] = {"hidden_size": HIDDEN + 8, "vocab_size": VOCAB + 1, "num_hidden_layers": 4}
    with pytest.raises(VerifierError) as error:
        check_draft_fits(make_config(), VerifierInfo("other", (), text), 3)
    for part in ("other", "hidden_size 16, the verifier's is 24", "vocab_size 40", "auxiliary layers [2, 4, 5]"):
        assert part in str(error.value)
    own = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 5}
    check_draft_fits(make_config(sliding_window=3), VerifierInfo("own", (), own), 3)
    with pytest.raises(UsageError, match=r"--num-speculative-tokens 4 is a longer chain than .* sliding window of 3"):
        check_draft_fits(make_config(sliding_window=3), VerifierInfo("own", (), own), 4)
