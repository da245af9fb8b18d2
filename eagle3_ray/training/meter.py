"""Sums between two logged points, reduced over ranks once; means are made of them by `metrics.summarize`."""

import resource
import time

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.metrics import TttSums
from eagle3_ray.model.loss import SUM_NAMES


class Meter:
    """Accumulates one rank's sums without waiting for the device."""

    def __init__(self, num_ttt_steps: int, device: torch.device) -> None:
        self._device, self._num_ttt_steps = device, num_ttt_steps
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._sums = torch.zeros(6, self._num_ttt_steps, dtype=torch.float64, device=self._device)
        self._num_tokens, self._wait_s, self._elapsed_s = 0, 0.0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step (validating, saving) out of the time."""
        self._last = time.perf_counter()

    def add(self, sums: Tensor, num_tokens: int, wait_s: float) -> None:
        """Add one step: sums [6, P], tokens without padding, seconds waited for data."""
        self._sums += sums
        self._num_tokens += num_tokens
        self._wait_s += wait_s
        now = time.perf_counter()
        self._elapsed_s, self._last = self._elapsed_s + now - self._last, now

    def reduce(self) -> tuple[TttSums, dict[str, float]]:
        """Return the sums of all ranks, and speed and memory since the last reset; then start over.

        collective: every rank calls it. sync: waits for the device.
        """
        own = torch.tensor([self._num_tokens, self._wait_s, self._elapsed_s], dtype=torch.float64, device=self._device)
        everything = torch.cat((self._sums.flatten(), own))
        if dist.is_initialized():
            dist.all_reduce(everything)
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        sums, (num_tokens, wait_s, total_s) = everything[:-3].view_as(self._sums).cpu(), everything[-3:].tolist()
        self.reset()
        return TttSums.from_array(sums.numpy()), {
            "tokens_per_s": num_tokens / (total_s / num_ranks),
            "data_wait_frac": wait_s / total_s,
            "peak_memory_bytes": float(peak_memory_bytes(self._device)),
        }


class Spread:
    """How a validation's sums vary from bin to bin, which is what its intervals are made of; one rank's bins."""

    def __init__(self, num_ttt_steps: int, device: torch.device) -> None:
        size = 2 * num_ttt_steps + 1
        self._moments = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, sums: Tensor) -> None:
        """Add one bin, from its sums [6, P], without waiting for the device."""
        right, reached = sums[SUM_NAMES.index("prefix_right")], sums[SUM_NAMES.index("prefix_count")]
        row = torch.cat((right, reached, (reached[:1] > 0).double()))
        self._moments += torch.outer(row, row)

    def reduce(self) -> npt.NDArray[np.float64]:
        """Return the `intervals.cross_moments` [2P+1, 2P+1] of all ranks' bins. collective. sync."""
        if dist.is_initialized():
            dist.all_reduce(self._moments)
        return self._moments.cpu().numpy()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
