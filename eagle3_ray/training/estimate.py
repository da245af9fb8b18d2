"""What a draft takes of a worker's memory at its peak, from shapes alone.

A step has two moments at which memory may peak, beside what is there all the time (weights, moments, inputs):

    forward ──────────────> loss                  all activations, and the loss's own gradients of states and head
            <────────────── backward              after the last TTT step: one step's activations are gone, and there
                                                  is a gradient of every weight

What a kernel or a library keeps for itself (CUDA's context, NCCL, the allocator's gaps) is not in it.
"""

from dataclasses import dataclass

import torch

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import CHUNK_ELEMENTS
from eagle3_ray.training.optim import suits_muon

BINS_AHEAD = 4  # buffers of the thread that reads bins: one in the step, two ready, one being filled
MASTER_BYTES, MOMENT_BYTES, STATE_BYTES = 4, 4, 2  # of a weight: fp32; of a number in a sample: bf16
DEFAULTS = OptimizerSettings()


@dataclass(frozen=True)
class DraftWeights:
    """How many numbers a draft is.

    Attributes:
        num_trained: All that are trained.
        num_frozen: All others: as a rule the embedding.
        num_for_muon: Those of the trained that Muon would update.
    """

    num_trained: int
    num_frozen: int
    num_for_muon: int

    def optimizer_bytes(self, settings: OptimizerSettings) -> int:
        """Return what updates keep of the trained weights: Adam's two moments, or Muon's one; a moving average."""
        num_with_one = self.num_for_muon if settings.optimizer == "muon" else 0
        num_averaged = self.num_trained if settings.ema_decay else 0
        return MOMENT_BYTES * (2 * self.num_trained - num_with_one + num_averaged)

    def state_bytes(self, settings: OptimizerSettings) -> int:
        """Return what a checkpoint's full-precision state holds: fp32 masters, and what updates keep of them."""
        return MASTER_BYTES * self.num_trained + self.optimizer_bytes(settings)


@dataclass(frozen=True)
class BinSize:
    """The bin that takes most.

    Attributes:
        num_tokens: T.
        num_targets: N, its supervised positions.
        num_rows: R, indexes whose output is needed in some TTT step.
        num_per_step: Bins of one worker in one step.
    """

    num_tokens: int
    num_targets: int
    num_rows: int
    num_per_step: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker: on its GPU, or of its process without one.

    Attributes:
        weights_bytes: Its share of the fp32 masters, and what is frozen.
        optimizer_bytes: Its share of the optimizer's moments, and of the moving average.
        copies_bytes: All weights in the compute dtype, for the length of a step; none for one worker in fp32.
        gradients_bytes: Of all weights.
        activations_bytes: What the forward pass keeps for the backward one, and the loss's gradients.
        step_bytes: The most of a step's copies, activations and gradients that is there at once.
        bins_bytes: Bins that are ready or being filled.
        checkpoint_bytes: The copy that a checkpoint is stored from; in host memory, for a GPU too.
        peak_bytes: Of the device; all that is there at once.
    """

    weights_bytes: int
    optimizer_bytes: int
    copies_bytes: int
    gradients_bytes: int
    activations_bytes: int
    step_bytes: int
    bins_bytes: int
    checkpoint_bytes: int
    peak_bytes: int


def count_weights(config: DraftConfig) -> DraftWeights:
    """Count a draft's numbers, without making any."""
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    trained = {name: weight for name, weight in draft.named_parameters() if weight.requires_grad}
    num_trained = sum(weight.numel() for weight in trained.values())
    return DraftWeights(
        num_trained=num_trained,
        num_frozen=sum(weight.numel() for weight in draft.parameters()) - num_trained,
        num_for_muon=sum(weight.numel() for name, weight in trained.items() if suits_muon(name, weight)),
    )


def estimate_memory(
    config: DraftConfig,
    size: BinSize,
    num_workers: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    settings: OptimizerSettings = DEFAULTS,
) -> MemoryEstimate:
    """Estimate what one of some workers holds at its peak.

    Args:
        config: Shape of the draft.
        size: Of the largest bin.
        num_workers: Ranks that share masters and moments.
        device: A GPU or a CPU.
        compute_dtype: Of forward and backward.
        settings: What the optimizer is, whether there is an average, layers are recomputed, and the verifier's whole
            head is asked what the draft cannot say.
    """
    weights, width = count_weights(config), compute_dtype.itemsize
    share = -(-weights.num_trained // num_workers)
    # One worker computes with its masters unless they have to be cast; several gather all weights once for the unroll.
    is_cast = num_workers > 1 or compute_dtype != torch.float32
    copies_bytes = width * weights.num_trained if is_cast else 0
    num_head_rows = config.layer.vocab_size if settings.mask_out_of_vocab_targets else config.draft_vocab_size
    if config.freeze_lm_head:
        num_head_rows -= config.draft_vocab_size  # the draft's own head serves
    weights_bytes = MASTER_BYTES * share + width * (
        weights.num_frozen + num_head_rows * config.hidden_size  # what is frozen, and the verifier's head
    )
    optimizer_bytes = -(-weights.optimizer_bytes(settings) // num_workers)
    gradients_bytes = MASTER_BYTES * share + copies_bytes  # in the compute dtype until they are reduced or cast
    is_gpu = device.type == "cuda"
    kept_bytes, again_bytes = _activation_bytes(config, size, width, is_gpu, settings.gradient_checkpointing)
    loss_bytes = _loss_bytes(config, size, width, is_gpu)
    num_steps = config.speculative_tokens
    after_one_step = kept_bytes * (num_steps - 1) // num_steps + gradients_bytes + again_bytes
    step_bytes = copies_bytes + max(kept_bytes + loss_bytes, after_one_step)
    bins_bytes = BINS_AHEAD * size.num_per_step * _bin_bytes(config, size)
    saved_bytes = -(-weights.state_bytes(settings) // num_workers) + 2 * weights.num_frozen
    on_device_bytes = weights_bytes + optimizer_bytes + step_bytes + bins_bytes
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        optimizer_bytes=optimizer_bytes,
        copies_bytes=copies_bytes,
        gradients_bytes=gradients_bytes,
        activations_bytes=kept_bytes + loss_bytes,
        step_bytes=step_bytes,
        bins_bytes=bins_bytes,
        checkpoint_bytes=saved_bytes,
        peak_bytes=on_device_bytes if is_gpu else on_device_bytes + saved_bytes,
    )


def _bin_bytes(config: DraftConfig, size: BinSize) -> int:
    """Of one bin's tensors: states in bf16, three int64 and a mask a token."""
    return size.num_tokens * (STATE_BYTES * (config.num_aux_layers + 1) * config.hidden_size + 3 * 8 + 1)


def _activation_bytes(
    config: DraftConfig, size: BinSize, width: int, is_gpu: bool, recomputes: bool
) -> tuple[int, int]:
    """Of what the forward pass keeps for the backward one: so many numbers a token, a row and step, and a target.

    And of what the backward pass makes again at a time, where layers are recomputed: one step of one layer.
    """
    layer, num_steps, hidden = config.layer, config.speculative_tokens, config.hidden_size
    queries, keys = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    # One operation on a GPU; on a CPU several, which keep what they compute between them, in fp32.
    norm_bytes = 0 if is_gpu else hidden * (4 if width == 4 else 8)
    # Noised and last states; fc's output and the embeddings, each before and after its norm; keys and values.
    of_token = width * (config.num_aux_layers * hidden + 5 * hidden + 2 * keys) + 2 * norm_bytes
    # Of a pass through a layer: after each of three norms, and before two of them; queries, attention's output, keys
    # and values; and the MLP between its projections.
    of_row = width * (5 * hidden + 2 * queries + 2 * keys + 4 * layer.intermediate_size) + 3 * norm_bytes
    if layer.has_qk_norms:  # what goes into them
        norm_bytes_a_number = width + norm_bytes // hidden
        of_token += norm_bytes_a_number * keys
        of_row += norm_bytes_a_number * (queries + keys)
    # The first layer's embeddings of the rows and their projections, made once; what rows take of the tokens.
    of_selected = width * (2 * hidden + queries + 2 * keys)
    num_later = num_steps - 1
    # On a GPU, what merges the later steps keeps queries and outputs in fp32, and keys and values of all steps so far.
    of_merges = 4 * num_later * (2 * queries + keys * num_steps) if is_gpu else 0
    num_layers = layer.num_hidden_layers
    again_bytes = 0
    if recomputes:
        num_again = size.num_tokens if num_layers > 1 else size.num_rows
        again_bytes = num_again * of_row + size.num_tokens * (width * hidden + norm_bytes)
        # What is left between the layers: states before and after the last norm; keys and values.
        of_row, of_merges = width * (2 * hidden + 2 * keys) + norm_bytes, 0
        of_token -= width * hidden + norm_bytes
    early = (num_layers - 1) * size.num_tokens * of_row
    late = size.num_rows * (of_selected + of_row * (1 + num_later * num_layers) + of_merges * num_layers)
    kept_bytes = size.num_tokens * of_token + early + late + width * num_steps * size.num_targets * hidden
    return kept_bytes, again_bytes


def _loss_bytes(config: DraftConfig, size: BinSize, width: int, is_gpu: bool) -> int:
    """Of the loss's gradients of states and head, which it makes in the forward pass, and of a chunk of logits."""
    head = config.draft_vocab_size * config.hidden_size
    num_steps = config.speculative_tokens
    chunk = min(CHUNK_ELEMENTS, num_steps * size.num_targets * config.draft_vocab_size)
    # In fp32, and rounded; a CPU takes fp32 once more where it rounds the difference of two.
    of_logit = 4 if width == 4 else width + (4 if is_gpu else 8)
    logits = chunk * of_logit + 4 * chunk // num_steps
    states = width * num_steps * size.num_targets * config.hidden_size
    if config.freeze_lm_head:
        return states + logits
    return states + 4 * head + max(logits, width * head)
