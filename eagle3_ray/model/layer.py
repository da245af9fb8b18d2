"""A decoder layer of the draft, and its pass through an unroll.

The first layer's queries, keys and values read `cat(embedding, hidden)`, of which they are the sum of two products:

    W @ cat(e, h)  =  W[:, :H] @ e  +  W[:, H:] @ h

A token's embedding is the same in every TTT step that reads it, so the first product is made once, and each step makes
the second alone: half of these projections' cost is gone from all steps but one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eagle3_ray.model.attention import DocumentAttention
from eagle3_ray.model.config import LayerConfig
from eagle3_ray.model.layout import TttLayout

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [*, 1, D]
Attended = tuple[Tensor, Tensor, Tensor]  # a layer's output [*, H], and the keys and values [*, G, D] it has made


class RotaryTable(nn.Module):
    """RoPE angles of the verifier's own kind and scaling (a module only for its place in the tree; no state)."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        # The draft is built on the meta device, where these few numbers must not stay.
        self.inverse_frequency = torch.tensor(layer.rope_frequencies, dtype=torch.float32, device="cpu")
        self.scale = layer.rope_scale

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [*, 1, D], of `position_ids` [*]."""
        # Moved once: a copy from pageable memory in every step would wait for the device.
        self.inverse_frequency = self.inverse_frequency.to(position_ids.device)
        angle = (position_ids.unsqueeze(-1).float() * self.inverse_frequency).repeat(1, 2).unsqueeze(1)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE to x [*, heads, D] in Llama's half-split layout."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class DraftAttention(nn.Module):
    """Weights of grouped-query attention under the checkpoint's names; the rule itself is in `attention.py`."""

    def __init__(self, layer: LayerConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        query_size, key_size = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=False)
        self.k_proj = nn.Linear(input_size, key_size, bias=False)
        self.v_proj = nn.Linear(input_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, layer.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps=layer.rms_norm_eps) if layer.has_qk_norms else nn.Identity()
        self.k_norm = nn.RMSNorm(layer.head_dim, eps=layer.rms_norm_eps) if layer.has_qk_norms else nn.Identity()

    def split_queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[*, Q*D] -> [*, Q, D], normed if this draft norms them, rotated."""
        return rotate(self.q_norm(x.unflatten(-1, (-1, self.head_dim))), rotation)

    def split_keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[*, G*D] -> [*, G, D], normed if this draft norms them, rotated."""
        return rotate(self.k_norm(x.unflatten(-1, (-1, self.head_dim))), rotation)


class DraftMlp(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=False)
        self.up_proj = nn.Linear(layer.hidden_size, layer.intermediate_size, bias=False)
        self.down_proj = nn.Linear(layer.intermediate_size, layer.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[*, H] -> [*, H]."""
        output: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class DraftLayer(nn.Module):
    """A decoder layer; the first one reads `cat(embedding, hidden)`, which is 2H wide."""

    def __init__(self, layer: LayerConfig, is_first: bool, norm_before_residual: bool) -> None:
        super().__init__()
        self.is_first, self.norm_before_residual = is_first, norm_before_residual
        self.input_layernorm = nn.RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        if is_first:
            self.hidden_norm = nn.RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.self_attn = DraftAttention(layer, layer.hidden_size * (2 if is_first else 1))
        self.post_attention_layernorm = nn.RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.mlp = DraftMlp(layer)

    def forward(self, work: Callable[..., Attended], *arguments: Any) -> Attended:
        """Do a step's work, for which the caller may have put other weights in place."""
        return work(*arguments)

    def prepare(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention reads of the hidden state, and the residual, both [*, H]."""
        if not self.is_first:
            return self.input_layernorm(hidden), hidden
        normed = self.hidden_norm(hidden)
        return normed, normed if self.norm_before_residual else hidden

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection and MLP: attended [*, Q, D], residual [*, H] -> [*, H]."""
        hidden = residual + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class LayerPass:
    """One layer in one unroll: its weights as the steps use them, and the keys and values it keeps.

    Step 0 gives keys and values of every index [T, G, D], each later step those of the rows [R, G, D].
    """

    def __init__(self, layer: DraftLayer, layout: TttLayout, is_last: bool, recomputes: bool = False) -> None:
        """Take the weights apart, once for all steps.

        Args:
            layer: Its weights.
            layout: Of the bin, on the device.
            is_last: Its output is needed at the rows alone, in step 0 too.
            recomputes: Of each step the backward pass makes anew what lies between its arguments and its results.
        """
        self._layer, self._layout, self._is_last, self._recomputes = layer, layout, is_last, recomputes
        self._weights: dict[str, Tensor] = dict(layer.named_parameters())
        attention = layer.self_attn
        queries, keys_values = attention.q_proj.weight, torch.cat((attention.k_proj.weight, attention.v_proj.weight))
        hidden_size = attention.o_proj.out_features
        # One part, or in the first layer two: the embedding's and the hidden state's.
        *self._token_query_weight, self._query_weight = queries.split(hidden_size, dim=1)
        *self._token_key_value_weight, self._key_value_weight = keys_values.split(hidden_size, dim=1)
        self._token_queries: Tensor | None = None
        self._token_keys_values: Tensor | None = None
        self._later: list[tuple[Tensor, Tensor]] = []

    def read_tokens(self, embeds: Tensor) -> None:
        """Make the embeddings' share of the first layer's projections, from embeds [T, H], before its first step."""
        x = self._layer.input_layernorm(embeds)
        (query_weight,), (key_value_weight,) = self._token_query_weight, self._token_key_value_weight
        self._token_keys_values = x @ key_value_weight.T
        self._token_queries = (x[self._layout.tokens] if self._is_last else x) @ query_weight.T

    def first_step(self, hidden: Tensor, rotation: Rotation, attend: DocumentAttention) -> Tensor:
        """Causal attention over the documents: hidden [T, H] -> [T, H], or [R, H] from the last layer."""
        token_keys_values, token_queries = self._token_keys_values, self._token_queries
        output, self._keys, self._values = self._run(
            self._attend_first, hidden, token_queries, token_keys_values, rotation, attend
        )
        # Later steps read the tokens of the rows alone.
        self._token_keys_values = _select(token_keys_values, self._layout.tokens)
        if not self._is_last:
            self._token_queries = _select(token_queries, self._layout.tokens)
        return output

    def later_step(self, step: int, hidden: Tensor, rotation: Rotation, attend: DocumentAttention) -> Tensor:
        """Attention over step 0 and the row's own later steps, up to this one: hidden [R, H] -> [R, H]."""
        place, tokens = self._layout.token_of_row[step], (self._token_queries, self._token_keys_values)
        output, keys, values = self._run(
            self._attend_later, hidden, *tokens, place, rotation, attend, self._keys, self._values, tuple(self._later)
        )
        self._later.append((keys, values))
        return output

    def _run(self, work: Callable[..., Attended], *arguments: Any) -> Attended:
        """Do a step's work, of which the backward pass needs all that lies between, or its arguments and results."""
        if not self._recomputes:
            return work(*arguments)

        def do(*arguments: Any) -> Attended:
            # With the weights of now: copies cast for the forward pass are gone from the layer in the backward one.
            attended: Attended = torch.func.functional_call(self._layer, self._weights, (work, *arguments))
            return attended

        attended: Attended = checkpoint(do, *arguments, use_reentrant=False, preserve_rng_state=False)
        return attended

    def _attend_first(
        self,
        hidden: Tensor,
        token_queries: Tensor | None,
        token_keys_values: Tensor | None,
        rotation: Rotation,
        attend: DocumentAttention,
    ) -> Attended:
        x, residual = self._layer.prepare(hidden)
        keys, values = self._split(_project(x, self._key_value_weight, token_keys_values), rotation)
        if self._is_last:
            rows = self._layout.rows
            x, residual, rotation = x[rows], residual[rows], (rotation[0][rows], rotation[1][rows])
            token_queries = _select(token_queries, self._layout.token_of_row[0])
        queries = self._layer.self_attn.split_queries(_project(x, self._query_weight, token_queries), rotation)
        return self._layer.finish(attend(queries, keys, values, ()), residual), keys, values

    def _attend_later(
        self,
        hidden: Tensor,
        token_queries: Tensor | None,
        token_keys_values: Tensor | None,
        place: Tensor,
        rotation: Rotation,
        attend: DocumentAttention,
        keys: Tensor,
        values: Tensor,
        earlier: tuple[tuple[Tensor, Tensor], ...],
    ) -> Attended:
        x, residual = self._layer.prepare(hidden)
        own = self._split(_project(x, self._key_value_weight, _select(token_keys_values, place)), rotation)
        projected = _project(x, self._query_weight, _select(token_queries, place))
        queries = self._layer.self_attn.split_queries(projected, rotation)
        return self._layer.finish(attend(queries, keys, values, (*earlier, own)), residual), *own

    def _split(self, keys_values: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[*, 2G*D] -> keys [*, G, D], rotated, and values [*, G, D]."""
        attention = self._layer.self_attn
        keys, values = keys_values.chunk(2, dim=-1)
        # A copy of the values: a view of them would keep the unrotated keys as well.
        return attention.split_keys(keys, rotation), values.unflatten(-1, (-1, attention.head_dim)).contiguous()


def _project(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    """[M, in] by [out, in] -> [M, out], added to `addend` [M, out] if there is one."""
    return x @ weight.T if addend is None else torch.addmm(addend, x, weight.T)


def _select(x: Tensor | None, index: Tensor) -> Tensor | None:
    # Not x[index], whose backward runs on one core.
    return None if x is None else x.index_select(0, index)
