"""What only a GPU can show: FlexAttention's gradients, parity on CUDA, FSDP with bf16 compute. Needs no Ray."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.config import OptimizerSettings
from eagle3_ray.model.attention import build_document_attention
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.ema import build_ema
from eagle3_ray.training.optim import build_draft_optimizer, build_optimizer, set_learning_rate
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.sharding import build_sharded_draft, gather_weights
from eagle3_ray.training.step import StepSettings, add_noise, cast_states, train_step
from tests.unit.training.world import PARITY, load_bins, load_config, load_target_head, load_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

EXPECTED = json.loads((PARITY / "expected.json").read_text())["cases"]


def attend(device: str, dtype: torch.dtype, reach: int | None) -> list[Tensor]:
    """Output and gradients of two later steps over documents that fit no attention block."""
    documents, num_tokens = ((0, 300), (300, 301), (301, 777)), 777
    rows = torch.arange(num_tokens)[torch.rand(num_tokens, generator=torch.Generator().manual_seed(0)) < 0.6]
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(rows), 8, 64), *[(num_tokens, 2, 64)] * 2, *[(len(rows), 2, 64)] * 4]
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes]
    queries, keys, values, k1, v1, k2, v2 = inputs
    place = torch.device(device)
    attend_rows = build_document_attention(documents, rows, num_tokens, place, lambda x: x.to(place), reach)
    merged = attend_rows(queries, keys, values, [(k1, v1), (k2, v2)])
    weight = torch.randn(merged.shape, generator=generator).to(dtype).to(device)
    grads = torch.autograd.grad((merged * weight).sum(), inputs)
    return [tensor.detach().float().cpu() for tensor in (merged, *grads)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])  # TF32; bf16
@pytest.mark.parametrize("reach", [None, 200])
def test_flex_attention_and_its_gradients_equal_the_cpu_implementation(
    reach: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    for found, expected in zip(attend("cuda", dtype, reach), attend("cpu", dtype, reach), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(case: str, compute_dtype: torch.dtype, num_steps: int) -> tuple[Eagle3Draft, list[list[float]]]:
    device = torch.device("cuda")
    draft = build_sharded_draft(load_config(case), load_weights(case), device, compute_dtype)
    optimizer = build_optimizer(draft.parameters(), 0.01)
    on_cpu = load_target_head()
    assert on_cpu.norm_weight is not None
    head = TargetHead(on_cpu.weight.to(device, compute_dtype), on_cpu.norm_weight.to(device, compute_dtype), on_cpu.eps)
    spec = EXPECTED[case]["case"]
    settings = StepSettings(spec["ttt_steps"], spec["decay"], 0.0, 0, 1.0, device, compute_dtype)
    bins = [make_ready(packed, spec["ttt_steps"], len(draft.layers), device) for packed in load_bins()]
    found = []
    for _ in range(num_steps):
        set_learning_rate(optimizer, 1e-3)
        result = train_step(draft, optimizer, head, bins, 0, settings)
        decay = spec["decay"] ** torch.arange(spec["ttt_steps"], dtype=torch.float64)
        found.append([float((result.sums[0] / result.sums[1]).cpu() @ decay), result.wait()[0]])
    return draft, found


@pytest.mark.parametrize("case", sorted(EXPECTED))
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_five_steps_on_cuda_follow_the_recorded_ones(
    case: str, compute_dtype: torch.dtype, tolerance: float, process_group: None
) -> None:
    _, found = train(case, compute_dtype, 5)
    expected = torch.tensor(EXPECTED[case]["adamw_5_steps_loss_gradnorm"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=tolerance, atol=0)


def test_masters_stay_fp32_under_bf16_compute_and_norms_move(process_group: None) -> None:
    draft, _ = train("one_layer", torch.bfloat16, 3)
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    assert not torch.all(gather_weights(draft, torch.float32)["norm.weight"] == 1)


def test_noise_on_cuda_is_a_function_of_seed_epoch_and_bin(process_group: None) -> None:
    packed = load_bins()[0]
    settings = StepSettings(3, 1.0, 0.05, 0, 1.0, torch.device("cuda"), torch.bfloat16)
    clean = cast_states(make_ready(packed, 3, 1, settings.device).inputs, settings.compute_dtype)
    assert torch.equal(add_noise(clean, 1, 4, settings).aux_states, add_noise(clean, 1, 4, settings).aux_states)
    assert not torch.equal(add_noise(clean, 1, 4, settings).aux_states, add_noise(clean, 1, 5, settings).aux_states)


@pytest.mark.parametrize(
    "chosen",
    [OptimizerSettings(), OptimizerSettings(optimizer="muon", ema_decay=0.9, gradient_checkpointing=True)],
    ids=["default", "muon, averaged, recomputed"],
)
def test_a_step_waits_for_nothing_on_the_device(chosen: OptimizerSettings, process_group: None) -> None:
    device = torch.device("cuda")
    draft = build_sharded_draft(load_config("one_layer"), load_weights("one_layer"), device, torch.float32)
    draft.recomputes_layers = chosen.gradient_checkpointing
    optimizer, ema = build_draft_optimizer(draft, chosen), build_ema(draft, chosen.ema_decay)
    on_cpu = load_target_head()
    assert on_cpu.norm_weight is not None
    head = TargetHead(on_cpu.weight.to(device), on_cpu.norm_weight.to(device), on_cpu.eps)
    settings = StepSettings(3, 1.0, 0.05, 0, 1.0, device, torch.float32)
    bins = [make_ready(packed, 3, 1, device) for packed in load_bins()]
    train_step(draft, optimizer, head, bins, 0, settings, ema=ema).wait()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(draft, optimizer, head, bins, 1, settings, ema=ema)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    result.wait()
