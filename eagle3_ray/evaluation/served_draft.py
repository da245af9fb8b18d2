"""The folder a server loads, as a draft that guesses a chain of tokens ahead, as serving engines run it.

    verified so far      x0 x1 x2 x3 | x4            the verifier has read x0..x3, and chose x4
    entries of step 0    (x1,g0) (x2,g1) (x3,g2) (x4,g3)        g: the verifier's auxiliary states
    guess 1              from the last entry
    guess k+1            from an entry (guess k, the draft's own hidden state), one position further on

Once the verifier has read the guesses, their entries give way to ones with its own states.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eagle3_ray.errors import UsageError, VerifierError
from eagle3_ray.model.config import DraftConfig, draft_config_from_speculators
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.layer import DraftLayer
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.speculators_format import CONFIG_FILE, WEIGHTS_FILE, check_speculators_folder


def read_served_config(folder: Path) -> DraftConfig:
    """Return a draft's shape.

    Raises:
        CheckpointError: The folder is not whole, or holds a draft of another kind.
    """
    check_speculators_folder(folder)
    return draft_config_from_speculators(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))


def load_served_draft(folder: Path, device: str, dtype: torch.dtype) -> tuple[Eagle3Draft, Tensor]:
    """Load a draft for inference.

    Args:
        folder: config.json and model.safetensors in the Speculators format.
        device: "cpu" or "cuda".
        dtype: of weights and computation.

    Returns:
        The draft, and the verifier id of each of its ids, [V] int64 on the device.

    Raises:
        CheckpointError: The folder is not whole, or holds a draft of another kind.
    """
    config = read_served_config(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    kept_ids = torch.arange(config.draft_vocab_size)
    if "d2t" in tensors:  # absent where all ids are kept
        kept_ids += tensors.pop("d2t")
        del tensors["t2d"]
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    draft = draft.to_empty(device="cpu").requires_grad_(False).eval()
    draft.load_state_dict(tensors)
    return draft.to(device, dtype), kept_ids.to(device)


def check_draft_fits(config: DraftConfig, verifier: VerifierInfo, num_guesses: int) -> None:
    """Refuse a draft that was not made for a verifier of this shape, or cannot guess so many tokens in a row.

    Raises:
        VerifierError: Names every difference.
        UsageError: The chain is longer than the draft's window.
    """
    pairs = {
        "hidden_size": (config.hidden_size, verifier.hidden_size),
        "vocab_size": (config.layer.vocab_size, verifier.vocab_size),
    }
    problems = [f"{name} {own}, the verifier's is {other}" for name, (own, other) in pairs.items() if own != other]
    if max(config.aux_layer_ids) > verifier.num_layers:
        problems.append(f"auxiliary layers {list(config.aux_layer_ids)}, the verifier has {verifier.num_layers} layers")
    if problems:
        raise VerifierError(
            f"the draft does not fit {verifier.name_or_path}: {'; '.join(problems)}. It was trained for "
            f"{config.verifier_name_or_path}."
        )
    if config.layer.sliding_window is not None and num_guesses > config.layer.sliding_window:
        raise UsageError(
            f"--num-speculative-tokens {num_guesses} is a longer chain than the draft's sliding window of "
            f"{config.layer.sliding_window}."
        )


class DraftChain:
    """A draft beside one sequence that a verifier decodes."""

    def __init__(self, draft: Eagle3Draft, kept_ids: Tensor) -> None:
        self._draft, self._kept_ids = draft, kept_ids
        self._caches: list[tuple[Tensor, Tensor] | None] = [None] * len(draft.decoder_layers)
        self._window = draft.config.layer.sliding_window
        self._num_verified = 0
        self._hidden: Tensor | None = None

    def extend(self, token_ids: Tensor, aux_states: Tensor) -> None:
        """Take over what the verifier has read since; guesses are forgotten.

        Args:
            token_ids: [m] int64, the token after each position that it has read.
            aux_states: [m, A*H], its states at these positions.
        """
        self._crop(self._num_verified)
        hidden = self._draft.combine_aux_states(aux_states)
        self._hidden = self._read(token_ids, hidden)[-1:]
        self._num_verified += len(token_ids)

    def propose(self, num_tokens: int) -> Tensor:
        """Return the draft's greedy guesses of the tokens that come next: [num_tokens] int64 ids of the verifier."""
        assert self._hidden is not None  # something was verified before
        hidden, guesses = self._hidden, []
        for number in range(num_tokens):
            normed = self._draft.norm(hidden)
            guesses.append(self._kept_ids[self._draft.lm_head(normed).argmax(dim=-1)])
            if number + 1 < num_tokens:
                hidden = self._read(guesses[-1], normed if self._draft.config.norm_output else hidden)
        return torch.cat(guesses)

    def _read(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Pass entries through all layers, behind those that are there: [m], [m, H] -> [m, H]."""
        draft, start = self._draft, self._num_cached
        embeds = draft.embed_tokens(token_ids)
        positions = torch.arange(start + 1, start + 1 + len(token_ids), device=token_ids.device)
        rotation = draft.rotary(positions, hidden.dtype)
        for number, layer in enumerate(draft.decoder_layers):
            hidden = self._pass(number, layer, hidden, embeds, rotation)
        return hidden

    def _pass(
        self, number: int, layer: DraftLayer, hidden: Tensor, embeds: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        x, residual = layer.prepare(hidden)
        if layer.is_first:
            x = torch.cat((layer.input_layernorm(embeds), x), dim=-1)
        attention = layer.self_attn
        queries = attention.split_queries(attention.q_proj(x), rotation)
        keys = attention.split_keys(attention.k_proj(x), rotation)
        values = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
        if (before := self._caches[number]) is not None:
            keys, values = torch.cat((before[0], keys)), torch.cat((before[1], values))
        self._caches[number] = keys, values
        place, num_new, window = torch.arange(len(keys), device=keys.device), len(queries), self._window
        distance = place[-num_new:, None] - place
        is_visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        attended = scaled_dot_product_attention(
            _as_batch(queries),
            _as_batch(keys),
            _as_batch(values),
            attn_mask=None if num_new == 1 and window is None else is_visible,
            enable_gqa=True,
        )
        return layer.finish(attended[0].transpose(0, 1), residual)

    @property
    def _num_cached(self) -> int:
        first = self._caches[0]
        return 0 if first is None else len(first[0])

    def _crop(self, length: int) -> None:
        self._caches = [None if cache is None else (cache[0][:length], cache[1][:length]) for cache in self._caches]


def _as_batch(x: Tensor) -> Tensor:
    """[m, heads, D] -> [1, heads, m, D]."""
    return x.transpose(0, 1).unsqueeze(0)
