"""Weights before the first step: embedding and head from the verifier, the rest from a seed."""

import torch
from torch import Tensor, nn

from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.verifier import VerifierTensors


def initial_weights(config: DraftConfig, tensors: VerifierTensors, kept_ids: Tensor, seed: int) -> dict[str, Tensor]:
    """Return every tensor of a new draft, float32 on the CPU.

    Projections are normal with the verifier's `initializer_range` as standard deviation, norms are ones, the
    embedding [W, H] and the head [V, H] (rows `kept_ids` [V]) are copies of the verifier's.
    """
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    draft.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, config.layer.initializer_range, generator=generator)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
        draft.embed_tokens.weight.copy_(tensors.embed_tokens)
        draft.lm_head.weight.copy_(tensors.lm_head[kept_ids])
    return dict(draft.state_dict())
