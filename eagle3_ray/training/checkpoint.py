"""Save and restore what must survive a crash: sharded state in fp32, the servable draft in bf16, the record.

The learning rate, the noise and the order of bins are functions of (seed, step), so weights, optimizer state and
the step are all there is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.errors import CheckpointError
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.speculators_format import check_speculators_folder
from eagle3_ray.storage import write_atomically
from eagle3_ray.training.run_folder import RECORD, STATE
from eagle3_ray.training.sharding import gather_weights, trained_state


def write_checkpoint(
    folder: Path,
    draft: Eagle3Draft,
    optimizer: torch.optim.Optimizer,
    mapping: VocabMapping,
    record: Mapping[str, Any],
) -> None:
    """Write this rank's part of a checkpoint to a folder of its own. collective: every rank calls it.

    Every rank writes its shards of weights and optimizer state (fp32, Adam's step included); rank 0 adds the
    servable draft and the record.
    """
    state = {"model": trained_state(draft), "optimizer": get_optimizer_state_dict(draft, optimizer)}
    dcp.save(state, checkpoint_id=folder / STATE)
    weights = gather_weights(draft, torch.bfloat16)
    if dist.get_rank() == 0:
        write_servable_draft(folder, draft, weights, mapping)
        check_speculators_folder(folder)
        write_atomically(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


def write_servable_draft(
    folder: Path, draft: Eagle3Draft, weights: Mapping[str, torch.Tensor], mapping: VocabMapping
) -> None:
    """Write config.json and model.safetensors as vLLM reads them."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    tensors |= {"d2t": mapping.draft_to_verifier_offset, "t2d": mapping.in_draft_vocab}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(draft.config.to_speculators(), indent=2) + "\n", encoding="utf-8")


def restore_checkpoint(state_dir: Path, draft: Eagle3Draft, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state saved by any number of ranks. collective: every rank calls it.

    Args:
        state_dir: The checkpoint's `state/`, on this machine.
        draft: Filled in place.
        optimizer: Filled in place.

    Raises:
        CheckpointError: The state cannot be read, or is of another draft.
    """
    optimizer_state = get_optimizer_state_dict(draft, optimizer)
    try:
        dcp.load({"model": trained_state(draft), "optimizer": optimizer_state}, checkpoint_id=state_dir)
    except (CheckpointException, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{state_dir}: cannot be restored ({error}). Move the checkpoint away to go on from an older one."
        ) from error
    # DCP fills the tensors in place; the optimizer's own wiring is rebuilt from them.
    set_optimizer_state_dict(draft, optimizer, optimizer_state)
