"""Save and restore what must survive a crash: sharded state in fp32, the servable draft in bf16, the record.

The learning rate, the noise and the order of bins are functions of (seed, step), so weights, optimizer state and
the step are all there is.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.errors import CheckpointError, Eagle3RayError
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.speculators_format import check_speculators_folder
from eagle3_ray.storage import ObjectPath, StoragePath, upload_folder, write_atomically
from eagle3_ray.training.ema import Ema
from eagle3_ray.training.run_folder import RECORD, STATE, remove_unfinished
from eagle3_ray.training.sharding import frozen_weights, trained_state


class HostState:
    """This rank's part of the trained state as it was at one step, in host memory.

    Every copy goes to the same buffers: 12 bytes a trained weight (fp32 masters and Adam's two moments; 8 where Muon
    has one; 4 more with a moving average) over the number of ranks, pinned where the state is on a GPU; and on rank 0
    what is frozen, in bf16.

    What is made of it runs behind the training, and its collectives therefore in a process group of its own: a group
    wants its calls in one order on all ranks, which two threads cannot keep.
    """

    def __init__(self, draft: Eagle3Draft, optimizer: torch.optim.Optimizer, ema: Ema | None = None) -> None:
        """Copy what never changes. collective: every rank calls it."""
        self.config = draft.config
        self._draft, self._optimizer, self._ema = draft, optimizer, ema
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # torch has other types for ranks outside it
        self.group = group
        self.is_first = dist.get_rank() == 0
        self._mesh = DeviceMesh.from_group(group, "cpu")
        frozen = frozen_weights(draft) if self.is_first else {}
        self._frozen = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in frozen.items()}
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self.state: dict[str, Any] = {}

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the state as it is now; the training may go on once this returns."""
        state = {
            "model": trained_state(self._draft),
            "optimizer": get_optimizer_state_dict(self._draft, self._optimizer),
            **({} if self._ema is None else {"ema": self._ema.weights}),
        }
        self.state = self._copy_tree(state, ())
        if torch.cuda.is_available():
            # sync: the next update must not overtake the copies, nor the writer read before they are done.
            torch.cuda.current_stream().synchronize()

    def _copy_tree(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._copy_tree(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._copy_tree(inner, (*place, number)) for number, inner in enumerate(value)]
        return self._copy_tensor(value, place) if isinstance(value, Tensor) else value

    def _copy_tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if place not in self._buffers:
            self._buffers[place] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        buffer = self._buffers[place].copy_(local, non_blocking=True)
        return self._shard(buffer, tensor) if isinstance(tensor, DTensor) else buffer

    def _shard(self, local: Tensor, like: DTensor) -> DTensor:
        return DTensor.from_local(
            local, self._mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    @torch.no_grad()
    def gather_weights(self) -> dict[str, Tensor]:
        """Return every tensor of the draft to serve in full, in bf16, on rank 0; nothing elsewhere.

        Those of the moving average where there is one. collective, in `group`.
        """
        full = dict(self._frozen)
        for name, tensor in self.state["model" if self._ema is None else "ema"].items():
            if isinstance(tensor, DTensor):  # cast first: half the bytes cross
                whole = self._shard(tensor.to_local().bfloat16(), tensor).full_tensor()
            else:
                whole = tensor.bfloat16()
            if self.is_first:
                full[name] = whole
        return full

    def together(self, work: Callable[[], None]) -> None:
        """Do this rank's part of something that is nothing unless every rank does its own. collective, in `group`.

        Raises:
            Eagle3RayError: What the first rank that failed has met, on all ranks alike.
        """
        problem: Eagle3RayError | None = None
        try:
            work()
        except Eagle3RayError as error:
            problem = error
        problems: list[Eagle3RayError | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(problems, problem, group=self.group)
        for found in problems:
            if found is not None:
                raise found from problem


def write_checkpoint(path: StoragePath, host: HostState, mapping: VocabMapping, record: Mapping[str, Any]) -> None:
    """Store all of a checkpoint but the marker of a whole one. collective, in the host state's group.

    Every rank writes its shards of weights and optimizer state (fp32, Adam's step included); rank 0 adds the servable
    draft and the record. On this machine, and so on a shared disk, each byte is written once, in its place; for an
    object store to a folder for a while, from where each rank uploads its own.

    Raises:
        CheckpointError: The disk cannot be written. On all ranks alike.
        StorageError: The object store cannot be written. On all ranks alike.
    """

    def finish(folder: Path, weights: Mapping[str, Tensor]) -> None:
        with told_as_not_saved(path):
            if host.is_first:
                remove_unfinished(folder)
                write_servable_draft(folder, host.config.to_speculators(), weights, mapping)
                check_speculators_folder(folder)
                write_atomically(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
            if isinstance(path, ObjectPath):
                upload_folder(folder, path)

    with told_as_not_saved(path), contextlib.ExitStack() as stack:
        if isinstance(path, Path):
            folder = path
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eagle3-checkpoint-")))
        # Nothing is copied ahead: that is for states on a GPU, and would open this thread's default one.
        writer = dcp.FileSystemWriter(folder / STATE, per_thread_copy_ahead=0)
        dcp.save(host.state, storage_writer=writer, process_group=host.group)
        weights = host.gather_weights()
        host.together(lambda: finish(folder, weights))


@contextlib.contextmanager
def told_as_not_saved(path: StoragePath) -> Iterator[None]:
    """Turn what a disk and the libraries that write to it raise into one error that names the checkpoint.

    Raises:
        CheckpointError: It could not be saved.
    """
    try:
        yield
    except (CheckpointException, SafetensorError, OSError) as error:
        # DCP's own message is the traceback of every rank that failed.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(
            f"{path}: cannot be saved ({cause}). See to the disk; the run can go on from the checkpoint before it."
        ) from error


def write_servable_draft(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], mapping: VocabMapping
) -> None:
    """Write config.json and model.safetensors as vLLM reads them, for which no mapping is a full vocabulary."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    if not mapping.is_full:
        tensors |= {"d2t": mapping.draft_to_verifier_offset, "t2d": mapping.in_draft_vocab}
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, weights_path, metadata={"format": "pt"})
    shutil.copymode(config_path, weights_path)  # the library lets nobody else read it, a server of another user say


def restore_checkpoint(
    state_dir: Path, draft: Eagle3Draft, optimizer: torch.optim.Optimizer, ema: Ema | None = None
) -> None:
    """Load weights, optimizer state and average saved by any number of ranks. collective: every rank calls it.

    Args:
        state_dir: The checkpoint's `state/`, on this machine.
        draft: Filled in place.
        optimizer: Filled in place.
        ema: Filled in place.

    Raises:
        CheckpointError: The state cannot be read, or is of another draft.
    """
    optimizer_state = get_optimizer_state_dict(draft, optimizer)
    state = {"model": trained_state(draft), "optimizer": optimizer_state}
    if ema is not None:
        state["ema"] = ema.weights
    try:
        dcp.load(state, checkpoint_id=state_dir)
    except (CheckpointException, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{state_dir}: cannot be restored ({error}). Move the checkpoint away to go on from an older one."
        ) from error
    # DCP fills the tensors in place; the optimizer's own wiring is rebuilt from them.
    set_optimizer_state_dict(draft, optimizer, optimizer_state)
