"""The estimate of memory against what a step on a CPU really takes, and of a checkpoint by hand."""

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._profiler import _ExtraFields_Allocation

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.estimate import BinSize, count_weights, estimate_memory
from eagle3_ray.training.optim import build_draft_optimizer, build_optimizer
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


def most_held_bytes(profile: torch.profiler.profile) -> int:
    """The most that was held beyond what was there before, by the allocator's own count at each of its records."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    waiting, records = profile.profiler.kineto_results.experimental_event_tree(), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if isinstance(event.extra_fields, _ExtraFields_Allocation):
            records.append(event.extra_fields)
    before = min(record.total_allocated - record.alloc_size for record in records)
    return max(record.total_allocated for record in records) - before


def measure_step_bytes(
    shape: argparse.Namespace,
    dtype: torch.dtype,
    *,
    recomputes: bool = False,
    config: DraftConfig | None = None,
    **parts: Any,
) -> tuple[int, BinSize]:
    """The most that a step, other than the first, holds beyond what was there before it, by torch's own record."""
    weights, head_weight = make_weights(shape)
    config = config or make_config(shape)
    if config.layer.has_qk_norms:
        weights |= {f"layers.0.self_attn.{name}_norm.weight": torch.ones(config.layer.head_dim) for name in "qk"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        draft = build_sharded_draft(replace(config, **parts), weights, CPU, dtype)
        draft.recomputes_layers = recomputes
        head = TargetHead(head_weight.to(dtype), torch.ones(shape.hidden, dtype=dtype), 1e-6)
        settings = StepSettings(shape.steps, 1.0, 0.05, 0, 1.0, CPU, dtype)
        optimizer = build_optimizer(draft.parameters(), 0.0)
        ready = make_ready(make_bin(shape), shape.steps, 1, CPU, config.layer.sliding_window)
        train_step(draft, optimizer, head, [ready], 0, settings)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train_step(draft, optimizer, head, [ready], 0, settings)
    finally:
        dist.destroy_process_group()
    peak = most_held_bytes(profile)
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


@pytest.mark.parametrize("window", [5, 200])
def test_a_window_takes_no_memory_that_the_estimate_leaves_out(window: int) -> None:
    shape = argparse.Namespace(**(SHAPE | {"tokens": 2048}))
    plain = make_config(shape)
    config = replace(plain, layer=replace(plain.layer, sliding_window=window))
    measured, size = measure_step_bytes(shape, torch.float32, config=config)
    assert estimate_memory(config, size, 1, CPU, torch.float32).step_bytes == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_counts_norms_of_queries_and_keys(dtype: str) -> None:
    shape = argparse.Namespace(**(SHAPE | {"steps": 7, "heads": 16, "kv_heads": 8, "draft_vocab": 200}))
    plain = make_config(shape)
    normed = replace(plain, layer=replace(plain.layer, has_qk_norms=True))
    sizes = {}
    for name, config in (("plain", plain), ("normed", normed)):
        measured, size = measure_step_bytes(shape, DTYPES[dtype], config=config)
        estimate = estimate_memory(config, size, 1, CPU, DTYPES[dtype])
        assert estimate.step_bytes == pytest.approx(measured, rel=0.25)
        sizes[name] = measured, estimate.step_bytes
    more, estimated = (normed - plain for plain, normed in zip(*sizes.values(), strict=True))
    assert estimated == pytest.approx(more, rel=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change", [{}, {"steps": 7}, {"tokens": 2048}, {"tokens": 2048, "steps": 7}, {"supervised": 1.0}], ids=str
)
def test_the_estimate_follows_layers_that_are_recomputed(change: dict[str, float], dtype: str) -> None:
    shape = argparse.Namespace(**(SHAPE | change))
    measured, size = measure_step_bytes(shape, DTYPES[dtype], recomputes=True)
    settings = OptimizerSettings(gradient_checkpointing=True)
    estimate = estimate_memory(make_config(shape), size, 1, CPU, DTYPES[dtype], settings)
    assert estimate.step_bytes == pytest.approx(measured, rel=0.25)
    kept_all = estimate_memory(make_config(shape), size, 1, CPU, DTYPES[dtype])
    assert estimate.activations_bytes < kept_all.activations_bytes and estimate.step_bytes <= kept_all.step_bytes


PARTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "freeze-lm-head": ({"freeze_lm_head": True}, {"embed_tokens.weight", "lm_head.weight"}),
    "train-embedding": ({"embed_requires_grad": True}, set()),
    "both": ({"embed_requires_grad": True, "freeze_lm_head": True}, {"lm_head.weight"}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PARTS)
def test_the_estimate_follows_what_is_trained(name: str, dtype: str) -> None:
    parts, frozen = PARTS[name]
    shape = argparse.Namespace(**SHAPE)
    config = replace(make_config(shape), **parts)
    measured, size = measure_step_bytes(shape, DTYPES[dtype], **parts)
    estimate = estimate_memory(config, size, 1, CPU, DTYPES[dtype])
    assert estimate.step_bytes == pytest.approx(measured, rel=0.25)
    sizes = {weight_name: weight.numel() for weight_name, weight in make_weights(shape)[0].items()}
    found, num_frozen = count_weights(config), sum(sizes[weight_name] for weight_name in frozen)
    num_targets = 0 if config.freeze_lm_head else sizes["lm_head.weight"]  # a frozen head is that of the targets
    assert estimate.weights_bytes == 4 * found.num_trained + DTYPES[dtype].itemsize * (num_frozen + num_targets)
    assert (found.num_trained, found.num_frozen) == (sum(sizes.values()) - num_frozen, num_frozen)


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
    assert estimate.checkpoint_bytes == 12 * trained + 2 * frozen


def test_muon_keeps_one_moment_of_a_matrix_and_an_average_is_one_number_more() -> None:
    config = make_config(argparse.Namespace(**SHAPE))
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    settings = OptimizerSettings(optimizer="muon")
    optimizer = build_draft_optimizer(draft, settings)
    of_muon, of_adamw = (sum(weight.numel() for weight in group["params"]) for group in optimizer.param_groups)
    frozen = draft.embed_tokens.weight.numel()
    estimate = estimate_memory(config, BinSize(512, 256, 264, 1), 1, CPU, torch.float32, settings)
    assert of_muon > of_adamw > 0 and estimate.optimizer_bytes == 4 * of_muon + 8 * of_adamw
    assert estimate.checkpoint_bytes == 8 * of_muon + 12 * of_adamw + 2 * frozen
    averaged = estimate_memory(
        config, BinSize(512, 256, 264, 1), 1, CPU, torch.float32, OptimizerSettings(optimizer="muon", ema_decay=0.9)
    )
    assert averaged.optimizer_bytes - estimate.optimizer_bytes == 4 * (of_muon + of_adamw)
    assert averaged.checkpoint_bytes - estimate.checkpoint_bytes == 4 * (of_muon + of_adamw)


def test_asking_what_the_draft_cannot_say_takes_the_whole_head() -> None:
    config, size = make_config(argparse.Namespace(**SHAPE)), BinSize(512, 256, 264, 1)
    settings = OptimizerSettings(mask_out_of_vocab_targets=True)
    kept, whole = (
        estimate_memory(config, size, 1, CPU, torch.bfloat16, each) for each in (OptimizerSettings(), settings)
    )
    assert whole.weights_bytes - kept.weights_bytes == whole.peak_bytes - kept.peak_bytes == 2 * 1000 * 128


def test_workers_share_masters_and_moments_and_each_gathers_all_weights() -> None:
    config, size = make_config(argparse.Namespace(**SHAPE)), BinSize(512, 256, 264, 1)
    trained = count_weights(config).num_trained
    alone, four = (estimate_memory(config, size, number, CPU, torch.bfloat16) for number in (1, 4))
    assert four.optimizer_bytes == pytest.approx(alone.optimizer_bytes / 4, abs=8)
    assert four.copies_bytes == alone.copies_bytes == 2 * trained
    assert four.activations_bytes == alone.activations_bytes and four.peak_bytes < alone.peak_bytes
