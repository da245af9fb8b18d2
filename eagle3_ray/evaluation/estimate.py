"""How many tokens in a row the draft gets right in a stored sample: nothing is generated, the text is given.

Unlike the accuracy that training logs, this asks for the verifier's first choice among all its tokens: one that the
draft cannot say is a guess that is wrong, as in serving.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eagle3_ray.data.batch import pack_samples
from eagle3_ray.data.samples import Sample, SampleSpec
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.step import cast_states

ROWS_AT_ONCE = 1024


@torch.inference_mode()
def estimate_sample(
    draft: Eagle3Draft,
    kept_ids: Tensor,
    read_last_state: Callable[[Tensor], Tensor],
    sample: Sample,
    spec: SampleSpec,
    num_guesses: int,
) -> tuple[list[int], list[int]]:
    """Count guesses that are right at the supervised positions of a sample.

    Args:
        draft: what guesses, in its compute dtype.
        kept_ids: [V] int64, verifier ids of the draft's.
        read_last_state: [*, H] last state as the sample holds it -> [*, W] logits of the verifier.
        sample: S tokens.
        spec: what it fulfils.
        num_guesses: K.

    Returns:
        [K] positions whose first j guesses are all right, and [K] positions that have j guesses, all supervised.
    """
    num_positions = max(len(sample.input_ids) - 1, 1)
    packed = pack_samples([sample], num_positions, spec)
    window = draft.config.layer.sliding_window
    ready = make_ready(packed, num_guesses, len(draft.decoder_layers), kept_ids.device, window)
    inputs = cast_states(ready.inputs, draft.fc.weight.dtype)
    layout = inputs.layout
    wanted = torch.full((layout.num_tokens + num_guesses,), -1, device=kept_ids.device)  # behind the end: nothing
    for targets in layout.targets.split(ROWS_AT_ONCE):
        wanted[targets] = read_last_state(inputs.last_state[targets]).argmax(dim=-1)
    if not bool(layout.is_valid.any()):
        return [0] * num_guesses, [0] * num_guesses
    still_right = torch.ones(len(layout.rows), dtype=torch.bool, device=kept_ids.device)
    still_there, right, reached = still_right.clone(), [], []
    for step, states in enumerate(draft.unroll(inputs)):
        guesses = torch.cat([draft.lm_head(some).argmax(dim=-1) for some in states.split(ROWS_AT_ONCE)])
        target = wanted[layout.rows + step]
        still_there &= target >= 0
        still_right &= still_there & (kept_ids[guesses] == target)
        right.append(int(still_right.sum()))
        reached.append(int(still_there.sum()))
    return right, reached
