"""Some steps of a draft on this machine, timed: as a rank makes them, but alone, without Ray and without a trace."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.verifier import VerifierInfo, load_verifier_tensors
from eagle3_ray.training.ema import build_ema
from eagle3_ray.training.optim import build_draft_optimizer, set_learning_rate
from eagle3_ray.training.rank import build_step_settings, build_target_head, resolve_compute_dtype
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import train_step


@dataclass(frozen=True)
class Trial:
    """What a step took.

    Attributes:
        num_tokens: Of the bin, without padding.
        step_s: Median of the steps timed.
    """

    num_tokens: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of one worker."""
        return self.num_tokens / self.step_s


def time_steps(
    settings: TrainSettings,
    verifier: VerifierInfo,
    config: DraftConfig,
    kept_ids: Tensor,
    packed: PackedBin,
    device: torch.device,
    num_steps: int,
) -> Trial:
    """Make some steps of a new draft on one bin, after one that is not timed: it allocates, and compiles on a GPU.

    Args:
        settings: Of the run.
        verifier: Where the frozen tensors are read from.
        config: Shape of the draft.
        kept_ids: [V] int64, ids of the verifier that the draft can say.
        packed: The bin.
        device: Where to compute.
        num_steps: At least 1.

    Raises:
        VerifierError: Its tensors cannot be read.
        NonFiniteError: A gradient is NaN or Inf.
    """
    compute_dtype = resolve_compute_dtype(settings.precision, device)
    tensors = load_verifier_tensors(verifier)
    step_settings = build_step_settings(settings, device, compute_dtype)
    seconds = []
    with _lone_rank(device):
        weights = initial_weights(config, tensors, kept_ids, settings.seed)
        draft = build_sharded_draft(config, weights, device, compute_dtype)
        draft.recomputes_layers = settings.gradient_checkpointing
        target_head = build_target_head(settings, verifier, kept_ids, tensors, device, compute_dtype)
        optimizer, ema = build_draft_optimizer(draft, settings), build_ema(draft, settings.ema_decay)
        set_learning_rate(optimizer, settings.lr)
        for _ in range(num_steps + 1):
            start = time.perf_counter()
            ready = make_ready(packed, settings.ttt_steps, len(draft.layers), device, settings.sliding_window)
            train_step(
                draft, optimizer, target_head, [ready], 0, step_settings, ema=ema
            ).wait()  # sync: the step is timed
            seconds.append(time.perf_counter() - start)
    return Trial(packed.num_tokens, statistics.median(seconds[1:]))


@contextlib.contextmanager
def _lone_rank(device: torch.device) -> Iterator[None]:
    """Have a process group of this process alone for the length of a block."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
