"""Weights before the first step: copies of the verifier's, ones, and noise of the right size from the seed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ray.model.config import DraftConfig, LayerConfig
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.verifier import VerifierTensors

HIDDEN, VOCAB, KEPT = 64, 200, torch.tensor([0, 7, 50, 199])
CONFIG = DraftConfig(
    layer=LayerConfig.from_transformers(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.03,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
    draft_vocab_size=len(KEPT),
    aux_layer_ids=(2, 4, 5),
    speculative_tokens=3,
    norm_before_residual=True,
    norm_before_fc=False,
    fc_norm=False,
    norm_output=False,
    verifier_name_or_path="verifier",
    verifier_architectures=("LlamaForCausalLM",),
)
COPIED = ("embed_tokens.weight", "lm_head.weight")


def verifier_tensors() -> VerifierTensors:
    """Random ones in bfloat16, the head not the embedding."""
    generator = torch.Generator().manual_seed(1)
    embed, head = (torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    return VerifierTensors(embed, head, torch.full((HIDDEN,), 0.5).bfloat16())


def make_weights(seed: int = 0, config: DraftConfig = CONFIG) -> dict[str, Tensor]:
    return initial_weights(config, verifier_tensors(), KEPT, seed)


def is_norm(name: str) -> bool:
    return "norm" in name


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = make_weights(5)
    torch.manual_seed(2)
    second, other = make_weights(5), make_weights(6)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        is_drawn = name not in COPIED and not is_norm(name)
        assert torch.equal(weight, other[name]) != is_drawn, name


def test_everything_is_float32_on_the_cpu_with_the_names_a_checkpoint_has() -> None:
    weights = make_weights()
    assert {(weight.dtype, weight.device.type) for weight in weights.values()} == {(torch.float32, "cpu")}
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    of_layer = [*attention, *mlp, "input_layernorm", "post_attention_layernorm"]
    expected = {f"layers.{number}.{name}.weight" for number in (0, 1) for name in of_layer}
    expected |= {"embed_tokens.weight", "lm_head.weight", "fc.weight", "norm.weight", "layers.0.hidden_norm.weight"}
    assert weights.keys() == expected


@pytest.mark.parametrize("option", ["none", "norm_before_fc", "fc_norm", "qwen3"])
def test_every_norm_is_exactly_ones(option: str) -> None:
    change: dict[str, Any] = {"none": {}, "qwen3": {"layer": replace(CONFIG.layer, has_qk_norms=True)}}.get(
        option, {option: True}
    )
    config = replace(CONFIG, **change)
    norms = {name: weight for name, weight in make_weights(config=config).items() if is_norm(name)}
    assert len(norms) == 6 + {"none": 0, "norm_before_fc": 1, "fc_norm": 3, "qwen3": 4}[option]
    for name, weight in norms.items():
        assert torch.equal(weight, torch.ones_like(weight)), name


def test_the_embedding_is_the_verifiers_and_the_head_its_kept_rows() -> None:
    weights, tensors = make_weights(), verifier_tensors()
    assert torch.equal(weights["embed_tokens.weight"], tensors.embed_tokens.float())
    assert torch.equal(weights["lm_head.weight"], tensors.lm_head[KEPT].float())


def test_projections_are_normal_with_the_range_of_the_config() -> None:
    """Within four standard errors of a normal sample's mean and deviation; the seed is fixed, so never flaky."""
    drawn = {name: w for name, w in make_weights().items() if name not in COPIED and not is_norm(name)}
    assert len(drawn) == 15
    for name, weight in drawn.items():
        count = weight.numel()
        assert abs(float(weight.mean())) < 4 * 0.03 / math.sqrt(count), name
        assert abs(float(weight.std()) - 0.03) < 4 * 0.03 / math.sqrt(2 * count), name
    flat = torch.cat([weight.flatten() for weight in drawn.values()]) / 0.03
    inside = [float((flat.abs() < bound).float().mean()) for bound in (1, 2, 3)]
    assert inside == pytest.approx([0.683, 0.954, 0.997], abs=0.005)  # a normal distribution's


def test_no_two_projections_are_drawn_alike() -> None:
    weights = make_weights()
    firsts = [float(w.flatten()[0]) for name, w in weights.items() if name not in COPIED and not is_norm(name)]
    assert len(set(firsts)) == len(firsts)
