"""Every family of verifiers that is supported, tiny and random, from its files to the draft's targets.

The oracle is the model's own logits. What is compared with them takes the whole way: states as `generate` stores
them, config and tensors as `train` reads them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from eagle3_ray.config import ModelSettings
from eagle3_ray.generation.hidden_states import load_verifier
from eagle3_ray.model.config import build_draft_config
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.loss import TargetHead, cap_logits
from eagle3_ray.model.verifier import load_final_norm, load_verifier_tensors, read_verifier_config

LAYERS, KEPT_IDS = (0, 2, 5), torch.tensor([0, 3, 50, 95])
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large enough to show when it is not inherited
    "initializer_range": 0.2,  # logits large enough for a cap of 2 to bend them
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = TEXT | {"head_dim": 8}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LLAMA4: dict[str, Any] = {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2}
LLAMA4_VISION: dict[str, Any] = VISION | {
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 14,
}
QWEN_TEXT: dict[str, Any] = TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": 95,
    "video_token_id": 94,
    "vision_start_token_id": 93,
    "vision_end_token_id": 92,
}
IMAGE_IDS: dict[str, Any] = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}

FAMILIES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**TEXT)),
    "llama-tied": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**TEXT)),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**HEADS)),
    "qwen3-moe": (tf.Qwen3MoeForCausalLM, lambda: tf.Qwen3MoeConfig(**HEADS, **MOE)),
    "mistral": (tf.MistralForCausalLM, lambda: tf.MistralConfig(**TEXT)),
    "gpt-oss": (tf.GptOssForCausalLM, lambda: tf.GptOssConfig(**HEADS, num_local_experts=4)),
    "gemma": (tf.GemmaForCausalLM, lambda: tf.GemmaConfig(**HEADS)),
    "gemma2": (tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**HEADS, final_logit_softcapping=2.0)),
    "gemma3": (tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**HEADS)),
    "gemma3-images": (
        tf.Gemma3ForConditionalGeneration,
        lambda: tf.Gemma3Config(text_config=HEADS, vision_config=VISION, mm_tokens_per_image=4, **IMAGE_IDS),
    ),
    "llama4": (tf.Llama4ForCausalLM, lambda: tf.Llama4TextConfig(**LLAMA4)),
    "llama4-images": (
        tf.Llama4ForConditionalGeneration,
        lambda: tf.Llama4Config(text_config=LLAMA4, vision_config=LLAMA4_VISION, **IMAGE_IDS),
    ),
    "qwen2-vl": (
        tf.Qwen2VLForConditionalGeneration,
        lambda: tf.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION, **QWEN_IDS),
    ),
    "mistral3-images": (
        tf.Mistral3ForConditionalGeneration,
        lambda: tf.Mistral3Config(
            text_config=HEADS | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
            image_token_index=95,
        ),
    ),
}


def make_model(family: str) -> Any:
    """A random model whose norms are neither ones nor zeros."""
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    model = model_class(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def text_decoder(model: Any) -> nn.Module:
    """The module of the language model that holds the decoder layers."""
    return next(module for module in model.modules() if "embed_tokens" in dict(module.named_children()))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_from_generated_states_are_the_models_own_distribution_on_the_kept_ids(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_ray.generation.hidden_states.STORED_DTYPE", torch.float32)
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    samples = [torch.arange(3, 40), torch.arange(60, 71)]
    info = read_verifier_config(str(tmp_path))
    tensors = load_verifier_tensors(info)
    verifier = load_verifier(info, LAYERS, "cpu", torch.float32, trust_remote_code=False)
    head = TargetHead(tensors.lm_head[KEPT_IDS], tensors.final_norm, info.rms_norm_eps, logit_cap=info.logit_cap)
    for sample, states in zip(samples, verifier.compute_states(["a", "b"], samples), strict=True):
        logits = cap_logits(head.project(states[-1]) @ head.weight.T, head.logit_cap)
        expected = model(input_ids=sample[None]).logits[0, :, KEPT_IDS]
        # float32: seven layers of sums in the shapes of a padded batch.
        torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-5)
        assert logits.std() > 0.1  # the comparison would show a wrong norm
    assert torch.equal(load_final_norm(info), tensors.final_norm)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_auxiliary_states_are_transformers_own_hidden_states(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_ray.generation.hidden_states.STORED_DTYPE", torch.float32)
    model = make_model(family)
    model.save_pretrained(tmp_path)
    sample = torch.arange(3, 40)
    entered: dict[int, Tensor] = {}
    for number, layer in enumerate(text_decoder(model).layers):  # type: ignore[arg-type]
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: entered.__setitem__(
                number, (args[0] if args else kwargs["hidden_states"])[0]
            ),
            with_kwargs=True,
        )
    model(input_ids=sample[None])
    verifier = load_verifier(read_verifier_config(str(tmp_path)), LAYERS, "cpu", torch.float32, trust_remote_code=False)
    [states] = verifier.compute_states(["a"], [sample])
    for layer_id, state in zip(LAYERS, states, strict=False):
        torch.testing.assert_close(state, entered[layer_id], rtol=1e-4, atol=1e-5)  # as above


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_begins_with_the_embedding_as_it_is_stored(family: str, tmp_path: Path) -> None:
    """Gemma's models scale what they look up; a server gives a draft the table itself."""
    model = make_model(family)
    model.save_pretrained(tmp_path)
    info = read_verifier_config(str(tmp_path))
    config = build_draft_config(info, ModelSettings(), len(KEPT_IDS), LAYERS)
    weights = initial_weights(config, load_verifier_tensors(info), KEPT_IDS, seed=0)
    assert torch.equal(weights["embed_tokens.weight"], model.get_input_embeddings().weight)
    assert torch.equal(weights["lm_head.weight"], model.get_output_embeddings().weight[KEPT_IDS])
    assert config.layer.head_dim == 8 and config.layer.rms_norm_eps == 1e-3


def test_a_config_from_before_text_configs_were_nested_is_read(tmp_path: Path) -> None:
    """As Qwen2-VL's on the hub: the language model's sizes stand beside `vision_config`."""
    make_model("qwen2-vl").save_pretrained(tmp_path)
    nested = tf.AutoConfig.from_pretrained(tmp_path).to_dict()
    flat: dict[str, Any] = {"model_type": "qwen2_vl", "vision_config": QWEN_VISION, "tie_word_embeddings": False} | TEXT
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    info = read_verifier_config(str(tmp_path))
    assert info.text_config["hidden_size"] == nested["text_config"]["hidden_size"] == 32
    assert load_verifier_tensors(info).lm_head.shape == (96, 32)


@pytest.mark.parametrize("has_head", [False, True])
def test_where_the_file_leaves_tying_to_the_class_a_stored_head_counts(has_head: bool, tmp_path: Path) -> None:
    model = make_model("mistral3-images")
    head = torch.full((96, 32), 0.5)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    model.save_pretrained(tmp_path, state_dict=weights | ({"lm_head.weight": head} if has_head else {}))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = read_verifier_config(str(tmp_path))
    assert info.text_config["tie_word_embeddings"] is None
    tensors = load_verifier_tensors(info)
    assert torch.equal(tensors.lm_head, head if has_head else tensors.embed_tokens)
