"""What a draft inherits from its verifier, and that its config.json comes back as it was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_ray.config import ModelSettings
from eagle3_ray.errors import CheckpointError, VerifierError
from eagle3_ray.model.config import DraftConfig, build_draft_config, draft_config_from_speculators
from eagle3_ray.model.layer import RotaryTable
from eagle3_ray.model.verifier import read_verifier_config

VERIFIER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 64 / 8
    "num_hidden_layers": 8,
    "vocab_size": 320,
    "rms_norm_eps": 3e-6,
    "max_position_embeddings": 4096,
    "initializer_range": 0.01,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


def without(config: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names} | changes


def build(folder: Path, config: dict[str, Any], settings: ModelSettings | None = None) -> DraftConfig:
    """The draft of a verifier with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    info = read_verifier_config(str(folder))
    return build_draft_config(info, settings or ModelSettings(), 96, (2, 4, 5))


def written_layer(draft: DraftConfig) -> dict[str, Any]:
    """The `transformer_layer_config` that a server reads."""
    layer: dict[str, Any] = json.loads(json.dumps(draft.to_speculators()))["transformer_layer_config"]
    return layer


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "unheard_of"])
def test_sizes_heads_and_epsilon_are_the_verifiers(model_type: str, tmp_path: Path) -> None:
    layer = written_layer(build(tmp_path, VERIFIER | {"model_type": model_type}, ModelSettings(num_layers=2)))
    assert layer["num_hidden_layers"] == 2 and layer["model_type"] == "llama"  # the draft's own
    inherited = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "rms_norm_eps", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    assert {name: layer[name] for name in inherited} == {name: VERIFIER[name] for name in inherited}


def test_head_dim_and_key_value_heads_left_out_are_those_of_plain_attention(tmp_path: Path) -> None:
    for model_type in ("llama", "unheard_of"):
        config = without(VERIFIER, "head_dim", "num_key_value_heads", model_type=model_type)
        layer = written_layer(build(tmp_path, config))
        assert (layer["head_dim"], layer["num_key_value_heads"]) == (8, 8)


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])  # completed by transformers, and read as it stands
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 500000}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},  # an older spelling
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}},
            {"rope_type": "yarn", "rope_theta": 5e5, **YARN},
        ),
    ],
    ids=str,
)
def test_rope_is_the_verifiers_in_either_form_of_config_files(
    model_type: str, written: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = without(VERIFIER, "rope_theta", model_type=model_type) | written
    draft = build(tmp_path, config)
    assert written_layer(draft)["rope_parameters"] == expected
    # The oracle: the angles of the verifier's own rotary embedding.
    own = LlamaRotaryEmbedding(LlamaConfig(**without(config, "model_type")))
    table = RotaryTable(draft.layer)
    assert torch.equal(table.inverse_frequency, own.inv_freq) and table.scale == own.attention_scaling


def test_a_base_that_is_named_nowhere_is_not_guessed(tmp_path: Path) -> None:
    config = without(VERIFIER, "rope_theta", model_type="unheard_of")
    with pytest.raises(VerifierError, match=r"config.json names no rope_theta; a draft must share the verifier's"):
        build(tmp_path, config)


def test_rope_that_a_llama_layer_cannot_follow_is_refused(tmp_path: Path) -> None:
    partial = VERIFIER | {"model_type": "unheard_of", "partial_rotary_factor": 0.25}
    with pytest.raises(VerifierError, match="partial rotary embeddings are not supported"):
        build(tmp_path, partial)
    default = {"rope_type": "default", "rope_theta": 1e4}
    by_layer = VERIFIER | {"model_type": "unheard_of", "rope_parameters": {"full": default, "sliding": default}}
    with pytest.raises(VerifierError, match=r"RoPE differs by layer type \(\['full', 'sliding'\]\)"):
        build(tmp_path, by_layer)


def test_of_rope_by_layer_type_the_draft_takes_that_of_full_attention(tmp_path: Path) -> None:
    full, sliding = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, {"rope_theta": 1e4}
    config = VERIFIER | {"model_type": "unheard_of", "rope_parameters": {"full_attention": full, "sliding": sliding}}
    assert written_layer(build(tmp_path, config))["rope_parameters"] == full


def test_of_three_positions_a_text_has_one(tmp_path: Path) -> None:
    """Qwen-VL's: sections of a head turn by a position each, which are equal in text."""
    scaling = {"type": "mrope", "mrope_section": [1, 1, 2]}
    config = VERIFIER | {"model_type": "unheard_of", "rope_scaling": scaling}
    rope = written_layer(build(tmp_path, config))["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]}


def test_the_text_part_of_a_multimodal_config_is_inherited_from(tmp_path: Path) -> None:
    config = {"model_type": "unheard_of", "architectures": ["Seer"], "hidden_size": 9, "text_config": VERIFIER}
    draft = build(tmp_path, config)
    assert (draft.hidden_size, draft.verifier_architectures) == (64, ("Seer",))


OPTIONS = [
    ModelSettings(),
    ModelSettings(num_layers=2, norm_before_residual=False, norm_output=True, ttt_steps=5),
    ModelSettings(norm_before_fc=True),
    ModelSettings(fc_norm=True, train_embedding=True),
    ModelSettings(layer_type="qwen3"),
    ModelSettings(sliding_window=64, num_layers=2),
    ModelSettings(layer_type="qwen3", sliding_window=64),
]


@pytest.mark.parametrize("settings", OPTIONS, ids=range(len(OPTIONS)))
def test_a_config_comes_back_through_json_as_it_was(settings: ModelSettings, tmp_path: Path) -> None:
    draft = build(tmp_path, VERIFIER | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, settings)
    written = json.loads(json.dumps(draft.to_speculators()))
    assert written == draft.to_speculators()  # nothing that JSON turns into something else
    again = draft_config_from_speculators(written)
    assert again == draft
    assert again.to_speculators() == written


def test_what_a_server_reads_says_what_was_asked_for(tmp_path: Path) -> None:
    settings = ModelSettings(
        norm_before_residual=False, norm_before_fc=True, norm_output=True, ttt_steps=5, train_embedding=True
    )
    written = build(tmp_path, VERIFIER, settings).to_speculators()
    expected = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 96,
        "norm_before_residual": False,
        "norm_before_fc": True,
        "fc_norm": False,
        "norm_output": True,
        "embed_requires_grad": True,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "tie_word_embeddings": False,
    }
    assert {name: written[name] for name in expected} == expected
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert written["speculators_config"]["verifier"] == {
        "name_or_path": str(tmp_path),
        "architectures": ["LlamaForCausalLM"],
    }


def test_drafts_of_other_kinds_are_refused(tmp_path: Path) -> None:
    written = build(tmp_path, VERIFIER).to_speculators()
    with pytest.raises(CheckpointError, match=r"eagle draft with llama layers; expected eagle3 with llama") as caught:
        draft_config_from_speculators(written | {"speculators_model_type": "eagle"})
    assert caught.value.exit_code == 4
    layer = written["transformer_layer_config"] | {"model_type": "gemma"}
    with pytest.raises(CheckpointError, match="eagle3 draft with gemma layers; expected eagle3 with llama or qwen3"):
        draft_config_from_speculators(written | {"transformer_layer_config": layer})
    mixed = {"num_hidden_layers": 2, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    layer = written["transformer_layer_config"] | mixed
    with pytest.raises(CheckpointError, match="some layers have a sliding window and some have none"):
        draft_config_from_speculators(written | {"transformer_layer_config": layer})


@pytest.mark.parametrize(("layer_type", "missing"), [("llama", "sliding_window"), ("qwen3", "use_sliding_window")])
def test_a_window_that_transformers_would_not_see_is_refused(layer_type: str, missing: str, tmp_path: Path) -> None:
    settings = ModelSettings.model_validate({"layer_type": layer_type, "sliding_window": 64})
    written = build(tmp_path, VERIFIER, settings).to_speculators()
    layer = without(written["transformer_layer_config"], missing)
    with pytest.raises(CheckpointError, match="sliding_attention without a sliding_window that is in use; expected"):
        draft_config_from_speculators(written | {"transformer_layer_config": layer})


@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
@pytest.mark.parametrize("window", [None, 64])
def test_layers_are_described_as_servers_read_them(layer_type: str, window: int | None, tmp_path: Path) -> None:
    settings = ModelSettings.model_validate({"layer_type": layer_type, "sliding_window": window, "num_layers": 2})
    draft = build(tmp_path, VERIFIER, settings)
    layer = written_layer(draft)
    assert layer["model_type"] == layer_type and draft.layer.has_qk_norms == (layer_type == "qwen3")
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert draft.layer.sliding_window == window
    if window is not None:
        assert layer["layer_types"] == ["sliding_attention"] * 2 and layer["sliding_window"] == window
    if layer_type == "qwen3":
        assert layer["use_sliding_window"] == (window is not None)


@pytest.mark.parametrize("name", ["draft_vocab_size", "norm_output", "transformer_layer_config", "speculators_config"])
def test_a_config_without_a_field_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    written = without(build(tmp_path, VERIFIER).to_speculators(), name)
    with pytest.raises(CheckpointError, match=f"no '{name}'; not a Speculators EAGLE-3 draft"):
        draft_config_from_speculators(written)
