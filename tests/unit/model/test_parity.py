"""The six recorded cases: losses, counts, gradient norms and five AdamW steps, to 1e-4 relative in float32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.config import draft_config_from_speculators
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.model.verifier import load_verifier_tensors, read_verifier_config
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.step import NO_WISHES, StepSettings, agree_on_step, cast_states, train_step

PARITY = Path(__file__).parents[2] / "parity" / "small"
EXPECTED = json.loads((PARITY / "expected.json").read_text())
CASES = sorted(EXPECTED["cases"])


def load_packed_bin() -> PackedBin:
    tensors = {name: tensor[0] for name, tensor in load_file(PARITY / "packed_batch.safetensors").items()}
    return PackedBin(
        number=0,
        row=0,
        num_tokens=int((tensors["document_ids"] >= 0).sum()),
        input_ids=tensors["input_ids"],
        aux_states=tensors["hidden_states"],
        last_state=tensors["verifier_last_hidden_states"],
        loss_mask=tensors["loss_mask"],
        document_ids=tensors["document_ids"],
        position_ids=tensors["position_ids"],
    )


def load_draft(case: str) -> Eagle3Draft:
    folder = PARITY / "drafts" / case
    draft = Eagle3Draft(draft_config_from_speculators(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    draft.load_state_dict({name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d")})
    return draft


def load_target_head(is_normed: bool = False) -> TargetHead:
    info = read_verifier_config(str(PARITY / "verifier"))
    tensors = load_verifier_tensors(info)
    kept = torch.from_numpy(np.load(PARITY / "t2d.npy"))
    norm = None if is_normed else tensors.final_norm.float()
    return TargetHead(tensors.lm_head.float()[kept], norm, info.rms_norm_eps)


def step_settings(case: dict[str, Any]) -> StepSettings:
    return StepSettings(
        num_ttt_steps=case["ttt_steps"],
        loss_decay=case["decay"],
        noise_std=0.0,
        seed=0,
        max_grad_norm=1.0,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_counts_and_gradient_norms_equal_the_recorded_ones(case: str) -> None:
    expected = EXPECTED["cases"][case]
    draft, packed, settings = load_draft(case), load_packed_bin(), step_settings(expected["case"])
    ready = make_ready(packed, settings.num_ttt_steps, len(draft.layers), settings.device)
    weights, _ = agree_on_step([ready], settings, NO_WISHES)
    loss, sums = draft(cast_states(ready.inputs, settings.compute_dtype), load_target_head(), weights)
    loss.backward()
    loss_sum, count, _, prefix_right, _, _ = sums
    metrics = expected["metrics"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    for step in range(settings.num_ttt_steps):
        assert float(loss_sum[step] * weights[step]) == pytest.approx(metrics[f"loss_{step}_sum"], rel=1e-4)
        assert count[step] == metrics[f"full_acc_{step}_total"]
        assert prefix_right[step] == metrics[f"full_acc_{step}_sum"] == metrics[f"cond_acc_{step}_sum"]
    found = {name: float(p.grad.norm()) for name, p in draft.named_parameters() if p.grad is not None}
    assert found == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_five_adamw_steps_equal_the_recorded_ones(case: str) -> None:
    expected = EXPECTED["cases"][case]
    draft, packed, settings = load_draft(case), load_packed_bin(), step_settings(expected["case"])
    optimizer = build_optimizer(draft.parameters(), weight_decay=0.01)
    set_learning_rate(optimizer, 1e-3)
    ready = make_ready(packed, settings.num_ttt_steps, len(draft.layers), settings.device)
    decay = settings.loss_decay ** np.arange(settings.num_ttt_steps)
    found = []
    for _ in range(5):
        result = train_step(draft, optimizer, load_target_head(), [ready], 0, settings)
        found.append([float((result.sums[0] / result.sums[1]).numpy() @ decay), result.wait()[0]])
    np.testing.assert_allclose(found, expected["adamw_5_steps_loss_gradnorm"], rtol=1e-4)


def test_padding_is_never_computed_and_changes_nothing() -> None:
    """What lies in the padding, NaN included, must not reach a loss or a gradient."""
    expected = EXPECTED["cases"]["one_layer"]
    draft, packed, settings = load_draft("one_layer"), load_packed_bin(), step_settings(expected["case"])
    dirty = packed.aux_states.clone()
    dirty[packed.num_tokens :] = torch.nan
    ready = make_ready(replace(packed, aux_states=dirty), settings.num_ttt_steps, 1, settings.device)
    weights, _ = agree_on_step([ready], settings, NO_WISHES)
    inputs = cast_states(ready.inputs, settings.compute_dtype)
    assert draft(inputs, load_target_head(), weights).loss.item() == pytest.approx(expected["loss"], rel=1e-4)
