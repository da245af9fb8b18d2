"""The only file that knows FSDP2: shard a draft over the ranks, fill it from rank 0, run it, gather it again.

The draft is one FSDP unit: every TTT step reads every weight, so gathering once for the whole unroll moves the
fewest bytes. What is frozen, as a rule the embedding, is no part of it: it has no gradient to reduce, and each rank
holds a copy.

One rank alone has nothing to gather or to reduce, and is spared FSDP's copies of weights and gradients: it casts
its fp32 masters to the compute dtype itself, as FSDP would, and autograd brings the gradients back to fp32.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import DraftInputs, Eagle3Draft, TttOutput
from eagle3_ray.model.loss import TargetHead


def build_sharded_draft(
    config: DraftConfig, weights: Mapping[str, Tensor] | None, device: torch.device, compute_dtype: torch.dtype
) -> Eagle3Draft:
    """Build the draft sharded over all ranks, with fp32 masters, and fill it from rank 0.

    Needs an initialised process group. collective: every rank calls it.

    Args:
        config: Shape of the draft.
        weights: Rank 0: every tensor of the draft (fp32, CPU). Other ranks: None.
        device: This rank's device.
        compute_dtype: dtype of the forward and backward passes, and of what is frozen; gradients are reduced in fp32.
    """
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    if dist.get_world_size() > 1:
        _shard(draft, device, compute_dtype)
    draft.to_empty(device=device)
    # Strict: memory that to_empty left uninitialised (norms, once, upstream) must be overwritten in full.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(draft, dict(weights or {}), options=options)
    for weight in frozen_weights(draft).values():
        weight.data = weight.data.to(compute_dtype)
    return draft


def _shard(draft: Eagle3Draft, device: torch.device, compute_dtype: torch.dtype) -> None:
    # A sum, not a mean: the loss is divided by the global count of targets before it is differentiated.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    frozen = set(frozen_weights(draft).values())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(draft, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
    assert isinstance(draft, FSDPModule)  # fully_shard adds it to the draft's own class
    draft.set_gradient_divide_factor(1.0)
    draft.set_force_sum_reduction_for_comms(True)


def run_draft(
    draft: Eagle3Draft, inputs: DraftInputs, target_head: TargetHead, weights: Tensor, compute_dtype: torch.dtype
) -> TttOutput:
    """Unroll the draft over a bin in the compute dtype; arguments as in `Eagle3Draft.forward`. collective."""
    if isinstance(draft, FSDPModule) or compute_dtype == torch.float32:
        output: TttOutput = draft(inputs, target_head, weights)
    else:
        cast = {name: parameter.to(compute_dtype) for name, parameter in draft.named_parameters()}
        output = torch.func.functional_call(draft, cast, (inputs, target_head, weights))
    return output


def frozen_weights(draft: Eagle3Draft) -> dict[str, nn.Parameter]:
    """Return what is not trained by name: whole on every rank, in the compute dtype."""
    return {name: weight for name, weight in draft.named_parameters() if not weight.requires_grad}


def trained_state(draft: Eagle3Draft) -> dict[str, Tensor]:
    """Return the sharded fp32 masters by name, without what is frozen."""
    frozen = frozen_weights(draft)
    return {name: tensor for name, tensor in draft.state_dict().items() if name not in frozen}


def gather_weights(draft: Eagle3Draft, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every tensor of the draft in full, on the CPU. collective: every rank calls it."""
    full = {}
    for name, tensor in draft.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        full[name] = whole.to("cpu", dtype)
    return full


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_whole(own: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in full on every rank from each one's part of it, dealt out like another. collective."""
    if not isinstance(like, DTensor):
        return own
    mesh, placements = like.device_mesh, like.placements
    sharded = DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that every rank has in full, dealt out like another."""
    if not isinstance(like, DTensor):
        return whole
    copies = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return copies.redistribute(placements=like.placements).to_local()


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip to a global norm over all ranks and return the norm before clipping (scalar). collective."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
