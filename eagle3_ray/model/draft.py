"""The draft model and its unroll over TTT steps.

Step 0 reads `fc(auxiliary states)`; step k reads the hidden state that step k-1 put out at the same index, and
the ground-truth token k places further on. Only the rows of `TttLayout` pass through the last layer's queries,
output projection and MLP, and through later steps at all; every index contributes its step-0 keys and values.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eagle3_ray.model.attention import DocumentAttention
from eagle3_ray.model.config import DraftConfig, LayerConfig
from eagle3_ray.model.layout import TttLayout
from eagle3_ray.model.loss import TargetHead, compare_with_targets, sum_matches


class TttOutput(NamedTuple):
    """What one bin gives: a weighted loss to differentiate, and sums to report.

    Attributes:
        loss: Scalar, sum over steps and positions of weight * KL.
        sums: [6, P] float64, see `loss.SUM_NAMES`.
    """

    loss: Tensor
    sums: Tensor


@dataclass(frozen=True)
class DraftInputs:
    """One bin on the device, without its padding.

    Attributes:
        input_ids: [T] int64 verifier token ids.
        aux_states: [T, A*H] in the compute dtype.
        last_state: [T, H] the verifier's last hidden state, in the compute dtype.
        position_ids: [T] int64.
        layout: Its index tensors on the device (`layout.counts` may stay on the host).
        attend_rows: Attention of `layout.rows`.
        attend_all: Attention of every index, built when first used: a draft of one layer never does.
    """

    input_ids: Tensor
    aux_states: Tensor
    last_state: Tensor
    position_ids: Tensor
    layout: TttLayout
    attend_rows: DocumentAttention
    attend_all: DocumentAttention


class RotaryTable(nn.Module):
    """RoPE angles of the verifier's own kind and scaling (a module only for its place in the tree; no state)."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        # The draft is built on the meta device, where these few numbers must not stay.
        self.inverse_frequency = torch.tensor(layer.rope_frequencies, dtype=torch.float32, device="cpu")
        self.scale = layer.rope_scale

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [*, 1, D], of `position_ids` [*]."""
        frequency = self.inverse_frequency.to(position_ids.device, non_blocking=True)
        angle = (position_ids.unsqueeze(-1).float() * frequency).repeat(1, 2).unsqueeze(1)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to x [*, heads, D] in Llama's half-split layout."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@dataclass
class LayerKeys:
    """Keys and values one layer keeps during an unroll: step 0 of every index, later steps of the rows alone."""

    keys: Tensor  # [T, G, D]
    values: Tensor  # [T, G, D]
    diagonal: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # each ([R, G, D], [R, G, D])


class DraftAttention(nn.Module):
    """Projections of grouped-query attention; the rule itself is in `attention.py`."""

    def __init__(self, layer: LayerConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        query_size, key_size = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=False)
        self.k_proj = nn.Linear(input_size, key_size, bias=False)
        self.v_proj = nn.Linear(input_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, layer.hidden_size, bias=False)

    def project_queries(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[*, input] -> [*, Q, D], rotated."""
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rotation)

    def project_keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[*, input] -> keys [*, G, D], rotated, and values [*, G, D]."""
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(keys, rotation), self.v_proj(x).unflatten(-1, (-1, self.head_dim))


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

    def prepare(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's input [*, H or 2H] and the residual [*, H]."""
        if not self.is_first:
            return self.input_layernorm(hidden), hidden
        normed = self.hidden_norm(hidden)
        attention_input = torch.cat((self.input_layernorm(embeds), normed), dim=-1)
        return attention_input, normed if self.norm_before_residual else hidden

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection and MLP: attended [*, Q, D], residual [*, H] -> [*, H]."""
        hidden = residual + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Eagle3Draft(nn.Module):
    """The draft: embedding, fc, decoder layers, final norm and head, under the names the checkpoint carries."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        layer, hidden_size, num_aux = config.layer, config.hidden_size, config.num_aux_layers
        eps = layer.rms_norm_eps
        self.embed_tokens = nn.Embedding(layer.vocab_size, hidden_size)
        self.embed_tokens.requires_grad_(False)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(num_aux * hidden_size, eps=eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(hidden_size, eps=eps) for _ in range(num_aux))
        self.fc = nn.Linear(num_aux * hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList(
            DraftLayer(layer, is_first=i == 0, norm_before_residual=config.norm_before_residual)
            for i in range(layer.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.lm_head = nn.Linear(hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = RotaryTable(layer)

    @property
    def decoder_layers(self) -> list[DraftLayer]:
        """The decoder layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]

    def forward(self, inputs: DraftInputs, target_head: TargetHead, weights: Tensor) -> TttOutput:
        """Unroll the draft over a bin and compare every step with the verifier.

        One call does everything, so that under FSDP the weights are gathered once for all steps.

        Args:
            inputs: The bin on the device.
            target_head: What turns the verifier's last states into its distribution over the draft vocabulary.
            weights: [P] float, weight of each supervised position of step k in the loss.
        """
        layout = inputs.layout
        states_PRH = torch.stack(self.unroll(inputs))
        step_index = torch.arange(states_PRH.shape[0], device=states_PRH.device).unsqueeze(1)
        states_PNH = states_PRH[step_index, layout.row_of_target]
        loss, loss_sums, is_match = compare_with_targets(
            states_PNH,
            self.lm_head.weight,
            target_head.project(inputs.last_state[layout.targets]),
            target_head.weight,
            layout.is_valid,
            weights,
        )
        return TttOutput(loss, sum_matches(loss_sums, is_match, layout))

    def unroll(self, inputs: DraftInputs) -> list[Tensor]:
        """Return the normed hidden state of every step: P tensors [R, H]."""
        rows, attend_rows = inputs.layout.rows, inputs.attend_rows
        hidden = self.combine_aux_states(inputs.aux_states)
        hidden, caches = self._unroll_first_step(hidden, inputs)
        states: list[Tensor] = [self.norm(hidden)]
        for step in range(1, inputs.layout.counts.numel()):
            hidden = states[-1] if self.config.norm_output else hidden
            # Past a document's end the token is another document's; such an index has no valid target there.
            embeds = self.embed_tokens(inputs.input_ids[(rows + step).clamp(max=inputs.input_ids.numel() - 1)])
            rotation = self.rotary(inputs.position_ids[rows] + step, hidden.dtype)
            for layer, cache in zip(self.decoder_layers, caches, strict=True):
                attention_input, residual = layer.prepare(hidden, embeds)
                cache.diagonal.append(layer.self_attn.project_keys_values(attention_input, rotation))
                queries = layer.self_attn.project_queries(attention_input, rotation)
                hidden = layer.finish(attend_rows(queries, cache.keys, cache.values, cache.diagonal), residual)
            states.append(self.norm(hidden))
        return states

    def combine_aux_states(self, aux_states: Tensor) -> Tensor:
        """Reduce the auxiliary states by fc, after its optional norms: [T, A*H] -> [T, H]."""
        if self.config.norm_before_fc:
            aux_states = self.input_norm(aux_states)
        if self.config.fc_norm:
            parts = aux_states.unflatten(-1, (self.config.num_aux_layers, -1)).unbind(-2)
            aux_states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        hidden: Tensor = self.fc(aux_states)
        return hidden

    def _unroll_first_step(self, hidden: Tensor, inputs: DraftInputs) -> tuple[Tensor, list[LayerKeys]]:
        """Causal attention over all tokens; the last layer's output is computed at the rows alone."""
        rows = inputs.layout.rows
        embeds = self.embed_tokens(inputs.input_ids)
        rotation = self.rotary(inputs.position_ids, hidden.dtype)
        caches = []
        for number, layer in enumerate(self.decoder_layers):
            attention_input, residual = layer.prepare(hidden, embeds)
            keys, values = layer.self_attn.project_keys_values(attention_input, rotation)
            caches.append(LayerKeys(keys, values))
            attend = inputs.attend_all
            if number == len(self.layers) - 1:
                attend = inputs.attend_rows
                attention_input, residual = attention_input[rows], residual[rows]
                rotation = (rotation[0][rows], rotation[1][rows])
            queries = layer.self_attn.project_queries(attention_input, rotation)
            hidden = layer.finish(attend(queries, keys, values, ()), residual)
        return hidden, caches
