"""Reading a verifier: the three tensors of models made on the spot, and what is refused, each with its text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3nTextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    VaultGemmaConfig,
)

from eagle3_ray.errors import VerifierError
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.model.verifier import (
    VerifierInfo,
    VerifierTensors,
    load_final_norm,
    load_verifier_tensors,
    read_verifier_config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**SIZES | changes)),
    "qwen2": lambda **changes: Qwen2ForCausalLM(Qwen2Config(**SIZES | changes)),
    "qwen3": lambda **changes: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16} | changes)),
    "mistral": lambda **changes: MistralForCausalLM(MistralConfig(**SIZES | changes)),
}

Edit = Callable[[Any], Any]


def make_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A small random model whose norms are not ones."""
    torch.manual_seed(0)
    model = FAMILIES[family](**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def save_llama(folder: Path, edit_config: Edit = lambda config: None, edit_tensors: Edit = lambda tensors: None) -> str:
    """Save a Llama whose config and tensors may be changed; return its path."""
    make_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    edit_config(config)
    edit_tensors(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def load(path: str | Path) -> tuple[VerifierInfo, VerifierTensors]:
    info = read_verifier_config(str(path))
    return info, load_verifier_tensors(info)


def refusal(path: str | Path) -> str:
    """The text of the error that a verifier's config or tensors are refused with."""
    with pytest.raises(VerifierError) as caught:
        load(path)
    assert caught.value.exit_code == 3
    return str(caught.value)


def module_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


@pytest.mark.parametrize("max_shard_size", ["1GB", "14KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_models_own(family: str, tied: bool, max_shard_size: str, tmp_path: Path) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "14KB")
    info, tensors = load(tmp_path)
    assert torch.equal(tensors.embed_tokens, module_weight(model, "model.embed_tokens"))
    assert torch.equal(tensors.lm_head, module_weight(model, "lm_head"))
    assert torch.equal(tensors.final_norm, module_weight(model, "model.norm"))
    assert torch.equal(load_final_norm(info), tensors.final_norm)
    assert (tensors.lm_head is tensors.embed_tokens) == tied
    assert (info.hidden_size, info.vocab_size, info.num_layers) == (32, 96, 2)
    assert info.rms_norm_eps == model.config.rms_norm_eps
    assert info.architectures == (type(model).__name__,) and info.name_or_path == str(tmp_path)


def test_tensors_keep_the_dtype_of_the_file(tmp_path: Path) -> None:
    make_model().bfloat16().save_pretrained(tmp_path)
    _, tensors = load(tmp_path)
    assert {t.dtype for t in (tensors.embed_tokens, tensors.lm_head, tensors.final_norm)} == {torch.bfloat16}


def test_a_local_folder_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "verifier")
    monkeypatch.chdir(tmp_path)
    assert read_verifier_config("verifier").name_or_path == str(tmp_path / "verifier")


def test_the_text_part_of_a_multimodal_model_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=95)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    info, tensors = load(tmp_path)
    weights = model.state_dict()
    assert torch.equal(tensors.embed_tokens, weights["model.language_model.embed_tokens.weight"])
    assert torch.equal(tensors.lm_head, weights["lm_head.weight"])
    assert torch.equal(tensors.final_norm, weights["model.language_model.norm.weight"])
    assert (info.hidden_size, info.vocab_size) == (32, 96)
    assert info.architectures == ("LlavaForConditionalGeneration",)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",  # as LLaVA's and Mistral's folders have it
        lambda name: name.replace("model.", "model.language_model.", 1),  # as Qwen-VL's
    ],
)
def test_prefixed_names_beside_a_vision_tower_are_found(rename: Callable[[str], str], tmp_path: Path) -> None:
    def prefix_all(tensors: dict[str, Tensor]) -> None:
        prefixed = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(prefixed | {"visual.embed_tokens.weight": torch.ones(2), "visual.norm.weight": torch.ones(2)})

    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config.update({"model_type": "unheard_of", "architectures": ["Seer"], "text_config": text})

    _, tensors = load(save_llama(tmp_path, nest, prefix_all))
    assert torch.equal(tensors.lm_head, module_weight(make_model(), "lm_head"))
    assert torch.equal(tensors.final_norm, module_weight(make_model(), "model.norm"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_target_logits_are_the_models_own_on_the_kept_ids(family: str, tmp_path: Path) -> None:
    """From the state before the final norm, caught on its way into it."""
    model = make_model(family, rms_norm_eps=1e-3)  # large enough to show when it is not inherited
    model.save_pretrained(tmp_path)
    states: list[Tensor] = []
    model.get_submodule("model.norm").register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        logits = model(torch.arange(40)[None]).logits[0]
    kept_ids = torch.tensor([0, 3, 50, 95])
    info, tensors = load(tmp_path)
    head = TargetHead(tensors.lm_head[kept_ids], tensors.final_norm, info.rms_norm_eps)
    # float32: the norm's factors are multiplied in another order.
    torch.testing.assert_close(head.project(states[0][0]) @ head.weight.T, logits[:, kept_ids], rtol=1e-5, atol=1e-6)
    unnormed = replace(head, norm_weight=None)
    assert not torch.allclose(unnormed.project(states[0][0]) @ head.weight.T, logits[:, kept_ids], atol=1e-2)


# ------------------------------------------------------------------------------- what is refused


def test_a_missing_head_norm_or_embedding_is_named_and_never_made_up(tmp_path: Path) -> None:
    no_head = save_llama(tmp_path / "head", edit_tensors=lambda tensors: tensors.pop("lm_head.weight"))
    assert "no lm_head.weight (found none), and the config does not tie it" in refusal(no_head)
    no_norm = save_llama(tmp_path / "norm", edit_tensors=lambda tensors: tensors.pop("model.norm.weight"))
    assert f"{no_norm}: no final norm (model.norm.weight). The folder must hold" in refusal(no_norm)
    no_embedding = save_llama(tmp_path / "embed", edit_tensors=lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "expected one embed_tokens.weight, found none." in refusal(no_embedding)


def test_a_missing_norm_is_refused_for_the_norm_alone_too(tmp_path: Path) -> None:
    path = save_llama(tmp_path, edit_tensors=lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(VerifierError, match="no final norm"):
        load_final_norm(read_verifier_config(path))


def test_a_shard_that_is_missing_is_named_with_the_tensor_it_should_hold(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="14KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = weight_map["lm_head.weight"]
    (tmp_path / shard).unlink()
    assert f"{shard}, which should hold " in refusal(tmp_path)


def test_a_safetensors_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = Path(save_llama(tmp_path)) / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) // 2, 5, 0):
        path.write_bytes(whole[:size])
        assert f"{path}: not a readable safetensors file" in refusal(tmp_path)


def test_a_shard_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="14KB")
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    assert "cannot read " in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_damaged_shard_index_is_refused(content: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: no usable weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("file_name", ["../x.safetensors", "a/../../x", "/etc/x.safetensors", "a\\b", "", 3, None])
def test_a_shard_index_that_reaches_out_of_the_folder_is_refused(file_name: object, tmp_path: Path) -> None:
    path = Path(save_llama(tmp_path / "verifier"))
    (path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file_name}}))
    text = refusal(path)
    assert f"index.json: says that lm_head.weight is in {file_name!r}; expected the name of a file in that" in text


def test_weights_in_another_format_are_refused(tmp_path: Path) -> None:
    path = Path(save_llama(tmp_path))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json. Store the verifier" in refusal(tmp_path)


def test_tensors_of_another_shape_than_the_config_says_are_refused_together(tmp_path: Path) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:90]
        tensors["model.norm.weight"] = torch.ones(16)

    text = refusal(save_llama(tmp_path, edit_tensors=shorten))
    assert "lm_head.weight is [90, 32], the config says [96, 32]" in text
    assert "model.norm.weight is [16], the config says [32]" in text


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    text = refusal(save_llama(tmp_path, edit_tensors=quantise))
    assert "lm_head.weight is torch.float8_e4m3fn; quantised heads and embeddings are not supported" in text


def test_every_field_that_is_missing_is_named(tmp_path: Path) -> None:
    def strip(config: dict[str, Any]) -> None:
        config["model_type"] = "unheard_of"  # a known one has defaults to fill in, as its own class does
        del config["hidden_size"], config["rms_norm_eps"]

    assert "config.json: no hidden_size; no rms_norm_eps." in refusal(save_llama(tmp_path, strip))


def test_a_field_left_out_because_it_is_the_class_default_is_filled_in(tmp_path: Path) -> None:
    def strip(config: dict[str, Any]) -> None:
        del config["rms_norm_eps"]

    assert load(save_llama(tmp_path, strip))[0].rms_norm_eps == LlamaConfig().rms_norm_eps


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_config_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: no config.json. Name a transformers folder or a hub id."


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VaultGemmaConfig(), "model_type vaultgemma: its family's norms"),
        (VaultGemmaConfig(final_logit_softcapping=1.0), "final_logit_softcapping=1.0 changes the logits"),
        (Gemma3nTextConfig(), "model_type gemma3n_text: its family's norms"),
        (Qwen3NextConfig(), "model_type qwen3_next: its family's norms"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling=8.0 changes the logits"),
        (Cohere2Config(), "logit_scale=0.0625 changes the logits"),
    ],
    ids=str,
)
def test_verifiers_whose_logits_are_made_in_another_way_are_refused(
    config: PretrainedConfig, expected: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(VerifierError) as caught:
        read_verifier_config(str(tmp_path))
    assert expected in str(caught.value)


def test_soft_capping_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    path = save_llama(tmp_path, lambda config: config.update(model_type="unheard_of", final_logit_softcapping=30.0))
    assert "final_logit_softcapping=30.0 changes the logits and is not supported" in refusal(path)


def test_a_scale_of_one_changes_nothing_and_is_accepted(tmp_path: Path) -> None:
    GraniteConfig(**SIZES, logits_scaling=1.0).save_pretrained(tmp_path)
    assert read_verifier_config(str(tmp_path)).vocab_size == 96


# ------------------------------------------------------------------------------- without the hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine that may not ask the hub (what HF_HUB_OFFLINE=1 and HF_HUB_CACHE set)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_model(hub_cache: Path, **save_options: Any) -> None:
    """Put a Llama into the cache as `someone/some-model`, as a download would."""
    repository = hub_cache / "models--someone--some-model"
    make_model().save_pretrained(repository / "snapshots" / "0123abcd", **save_options)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")


def test_a_name_that_is_no_folder_is_refused_when_the_hub_cannot_be_asked(hub_cache: Path) -> None:
    expected = "someone/some-model: not a folder here, and the hub cannot be reached for config.json."
    assert refusal("someone/some-model") == expected


def test_a_path_that_does_not_exist_is_no_hub_id_either(hub_cache: Path) -> None:
    assert "/no/such/folder: neither a folder here nor a hub repository" in refusal("/no/such/folder")


@pytest.mark.parametrize("max_shard_size", ["1GB", "14KB"])
def test_a_model_in_the_cache_is_read_without_the_hub(max_shard_size: str, hub_cache: Path) -> None:
    cache_model(hub_cache, max_shard_size=max_shard_size)
    info, tensors = load("someone/some-model")
    assert info.name_or_path == "someone/some-model"
    assert torch.equal(tensors.lm_head, module_weight(make_model(), "lm_head"))


# ---------------------------------------------------------------------------- auxiliary layer ids


def info_of_depth(num_layers: int) -> VerifierInfo:
    return VerifierInfo("deep", (), {"num_hidden_layers": num_layers})


@pytest.mark.parametrize(("num_layers", "ids"), [(7, (2, 3, 4)), (8, (2, 4, 5)), (32, (2, 16, 29)), (61, (2, 30, 58))])
def test_default_layers_are_early_middle_and_late(num_layers: int, ids: tuple[int, ...]) -> None:
    assert info_of_depth(num_layers).default_aux_layer_ids() == ids
    info_of_depth(num_layers).check_aux_layer_ids(ids)


@pytest.mark.parametrize("num_layers", range(1, 7))
def test_a_verifier_of_fewer_than_seven_layers_needs_its_layers_named(num_layers: int) -> None:
    with pytest.raises(VerifierError, match=rf"deep: has {num_layers} layers.*from 7 layers on.*--aux-layer-ids"):
        info_of_depth(num_layers).default_aux_layer_ids()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((1, 2, 2), r"\[1, 2, 2\]: must rise, none twice; engines collect each once"),
        ((5, 2, 3), r"\[5, 2, 3\]: must rise"),
        ((1, 2, 9), r"\[9\]; ids of deep go from 0 to 8"),
        ((-1, 2, 3), r"\[-1\]; ids of deep go from 0 to 8"),
        ((), r"none given"),
    ],
)
def test_repeated_disordered_and_absent_layers_are_refused(ids: tuple[int, ...], expected: str) -> None:
    with pytest.raises(VerifierError, match=expected):
        info_of_depth(8).check_aux_layer_ids(ids)


def test_the_embedding_and_the_last_layers_output_are_layers_too() -> None:
    info_of_depth(8).check_aux_layer_ids((0, 8))
