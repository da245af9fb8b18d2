"""The estimate of memory against what a step on a CPU really takes, and of a checkpoint by hand."""

import argparse

import pytest
import torch
import torch.distributed as dist

from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.estimate import BinSize, count_weights, estimate_memory
from eagle3_ray.training.optim import build_optimizer
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import StepSettings, train_step
from tests.benchmarks.step import make_bin, make_config, make_weights

SHAPE = {
    "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 2000, "draft_vocab": 1000, "tokens": 512,
    "documents": 4, "steps": 3, "supervised": 0.5,
}  # fmt: skip
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_step_bytes(shape: argparse.Namespace, dtype: torch.dtype) -> tuple[int, BinSize]:
    """The most that a step, other than the first, holds beyond what was there before it, by torch's own record."""
    weights, head_weight = make_weights(shape)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        draft = build_sharded_draft(make_config(shape), weights, CPU, dtype)
        head = TargetHead(head_weight.to(dtype), torch.ones(shape.hidden, dtype=dtype), 1e-6)
        settings = StepSettings(shape.steps, 1.0, 0.05, 0, 1.0, CPU, dtype)
        optimizer = build_optimizer(draft.parameters(), 0.0)
        ready = make_ready(make_bin(shape), shape.steps, 1, CPU)
        train_step(draft, optimizer, head, [ready], 0, settings)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train_step(draft, optimizer, head, [ready], 0, settings)
    finally:
        dist.destroy_process_group()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    layout = ready.inputs.layout
    return peak, BinSize(shape.tokens, layout.targets.numel(), layout.rows.numel(), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [{}, {"steps": 1}, {"steps": 7}, {"tokens": 2048}, {"supervised": 1.0}, {"supervised": 0.1}, {"draft_vocab": 2000}],
    ids=str,
)
def test_the_estimate_of_a_step_is_near_what_it_takes(change: dict[str, float], dtype: str) -> None:
    shape = argparse.Namespace(**(SHAPE | change))
    measured, size = measure_step_bytes(shape, DTYPES[dtype])
    estimate = estimate_memory(make_config(shape), size, 1, CPU, DTYPES[dtype])
    # Kernels' own buffers and what lives between two operations are left out.
    assert estimate.step_bytes == pytest.approx(measured, rel=0.25)


def test_what_stays_between_steps_is_exact() -> None:
    shape = argparse.Namespace(**SHAPE)
    config = make_config(shape)
    weights, head_weight = make_weights(shape)
    frozen = weights.pop("embed_tokens.weight").numel()
    trained = sum(tensor.numel() for tensor in weights.values())
    found = count_weights(config)
    assert (found.num_trained, found.num_frozen) == (trained, frozen)
    estimate = estimate_memory(config, BinSize(512, 256, 264, 1), 1, CPU, torch.float32)
    assert estimate.weights_bytes == 4 * (trained + frozen + head_weight.numel())
    assert (estimate.optimizer_bytes, estimate.copies_bytes) == (8 * trained, 0)


def test_workers_share_masters_and_moments_and_each_gathers_all_weights() -> None:
    config, size = make_config(argparse.Namespace(**SHAPE)), BinSize(512, 256, 264, 1)
    trained = count_weights(config).num_trained
    alone, four = (estimate_memory(config, size, number, CPU, torch.bfloat16) for number in (1, 4))
    assert four.optimizer_bytes == pytest.approx(alone.optimizer_bytes / 4, abs=8)
    assert four.copies_bytes == alone.copies_bytes == 2 * trained
    assert four.activations_bytes == alone.activations_bytes and four.peak_bytes < alone.peak_bytes
