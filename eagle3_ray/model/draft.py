"""The draft model and its unroll over TTT steps.

Step 0 reads `fc(auxiliary states)`; step k reads the hidden state that step k-1 put out at the same index, and
the ground-truth token k places further on. Only the rows of `TttLayout` pass through the last layer's queries,
output projection and MLP, and through later steps at all; every index contributes its step-0 keys and values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eagle3_ray.model.attention import DocumentAttention
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.layer import DraftLayer, LayerPass, RotaryTable
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
        layout: Its tensors on the device.
        attend_rows: Attention of `layout.rows` in each step, P of them.
        attend_all: Attention of every index in step 0, for all layers but the last.
    """

    input_ids: Tensor
    aux_states: Tensor
    last_state: Tensor
    position_ids: Tensor
    layout: TttLayout
    attend_rows: tuple[DocumentAttention, ...]
    attend_all: DocumentAttention


def look_up(embedding: Tensor, ids: Tensor) -> Tensor:
    """Return the rows [T, H] of an embedding [W, H] for ids [T] int64."""
    # On a CPU embedding adds up a frequent token's bf16 gradients in bf16, and most of them are lost; index_select does
    # so in fp32. On a GPU index_select adds them in any order.
    return nn.functional.embedding(ids, embedding) if embedding.is_cuda else embedding.index_select(0, ids)


class Eagle3Draft(nn.Module):
    """The draft: embedding, fc, decoder layers, final norm and head, under the names the checkpoint carries.

    Attributes:
        recomputes_layers: The backward pass computes anew what the decoder layers compute in each TTT step, instead of
            keeping it; the gradients are the same.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_layers = False
        layer, hidden_size, num_aux = config.layer, config.hidden_size, config.num_aux_layers
        eps = layer.rms_norm_eps
        self.embed_tokens = nn.Embedding(layer.vocab_size, hidden_size)
        self.embed_tokens.requires_grad_(config.embed_requires_grad)
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
        self.lm_head.requires_grad_(not config.freeze_lm_head)
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
            target_head.losses,
            target_head.logit_cap,
        )
        return TttOutput(loss, sum_matches(loss_sums, is_match, layout))

    def unroll(self, inputs: DraftInputs) -> list[Tensor]:
        """Return the normed hidden state of every step: P tensors [R, H]."""
        layout, hidden = inputs.layout, self.combine_aux_states(inputs.aux_states)
        *early, last = [
            LayerPass(layer, layout, layer is self.layers[-1], self.recomputes_layers) for layer in self.decoder_layers
        ]
        passes = [*early, last]
        passes[0].read_tokens(look_up(self.embed_tokens.weight, inputs.input_ids))
        rotation = self.rotary(inputs.position_ids, hidden.dtype)
        for layer_pass in early:
            hidden = layer_pass.first_step(hidden, rotation, inputs.attend_all)
        hidden = last.first_step(hidden, rotation, inputs.attend_rows[0])
        states: list[Tensor] = [self.norm(hidden)]
        for step in range(1, layout.counts.numel()):
            hidden = states[-1] if self.config.norm_output else hidden
            rotation = self.rotary(inputs.position_ids[layout.rows] + step, hidden.dtype)
            for layer_pass in passes:
                hidden = layer_pass.later_step(step, hidden, rotation, inputs.attend_rows[step])
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
