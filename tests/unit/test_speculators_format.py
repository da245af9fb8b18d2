"""The check of a Speculators folder: what Speculators 0.9.0 and this program write passes, broken copies do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3_ray.errors import CheckpointError
from eagle3_ray.model.config import draft_config_from_speculators
from eagle3_ray.speculators_format import check_speculators_folder

DRAFTS = ("decay", "eagle31", "fc_norm", "one_layer", "residual_first", "two_layers")

MakeCheckpoint = Callable[..., Path]


def _refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_speculators_folder(checkpoint)
    return str(caught.value)


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_config_that_training_writes_passes_the_check(draft: str, make_checkpoint: MakeCheckpoint) -> None:
    def rewrite(config: dict[str, Any]) -> None:
        written = draft_config_from_speculators(config).to_speculators()
        config.clear()
        config.update(written)

    def to_bf16(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()}

    check_speculators_folder(make_checkpoint(draft, rewrite, to_bf16))


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit_config", "problem"),
    [
        (lambda c: c.pop("norm_output"), "config.json: norm_output: Field required"),
        (_set("quantization_config", {}), "config.json: quantization_config: Extra inputs are not permitted"),
        (
            _set("architectures", ["LlamaForCausalLM"]),
            "config.json: architectures.0: Input should be 'Eagle3DraftModel'",
        ),
        (_set("tie_word_embeddings", True), "config.json: tie_word_embeddings: Input should be False"),
        (_set("draft_vocab_size", "96"), "config.json: draft_vocab_size: Input should be a valid integer"),
        (_set("draft_vocab_size", 400), "config.json: draft_vocab_size 400 exceeds vocab_size 320"),
        (_set("eagle_aux_hidden_state_layer_ids", [2, 2, 5]), "[2, 2, 5] repeats an id, which engines collect once"),
        (
            lambda c: c["transformer_layer_config"].pop("rope_parameters"),
            "transformer_layer_config.rope_parameters: Field",
        ),
        (lambda c: c["speculators_config"].pop("verifier"), "config.json: speculators_config.verifier: Field required"),
        (lambda c: c.update(norm_before_fc=True, fc_norm=True), "norm_before_fc and fc_norm exclude each other"),
        (
            lambda c: c["transformer_layer_config"].update(num_key_value_heads=3),
            "4 heads do not share 3 key-value heads",
        ),
        (
            lambda c: c["transformer_layer_config"].update(layer_types=["full_attention"] * 2),
            "layer_types names 2 layers of 1",
        ),
        (
            lambda c: c["transformer_layer_config"].update(layer_types=["sliding_attention"]),
            "layer_types has sliding_attention, but there is no sliding_window",
        ),
        (
            lambda c: c["transformer_layer_config"].update(
                model_type="qwen3", layer_types=["sliding_attention"], sliding_window=64
            ),
            "layer_types has sliding_attention, but use_sliding_window is not true",
        ),
        (
            lambda c: c["transformer_layer_config"].update(model_type="qwen3"),
            "model.safetensors: layers.0.self_attn.k_norm.weight is missing",
        ),
        (_set("fc_norm", True), "model.safetensors: fc_norm.0.weight is missing"),
        (_set("dtype", "bfloat16"), "model.safetensors: fc.weight has dtype F32, expected BF16"),
    ],
)
def test_a_config_that_a_server_would_not_follow_is_refused(
    edit_config: Callable[[dict[str, Any]], Any], problem: str, make_checkpoint: MakeCheckpoint
) -> None:
    message = _refusal(make_checkpoint("one_layer", edit_config))
    assert problem in message and message.splitlines()[0].endswith("/3: not a draft that a server can load:")


def _roll(tensors: dict[str, Tensor]) -> None:
    tensors["t2d"] = tensors["t2d"].roll(1)


@pytest.mark.parametrize(
    ("edit_tensors", "problem"),
    [
        (lambda t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda t: t.update({"target_head.weight": torch.ones(1)}), "target_head.weight is not part of this draft"),
        (lambda t: t.update({"norm.weight": torch.ones(63)}), "norm.weight has shape [63], expected [64]"),
        (lambda t: t.update({"norm.weight": torch.ones(64).half()}), "norm.weight has dtype F16, expected F32"),
        (lambda t: t.update({"d2t": t["d2t"].int()}), "d2t has dtype I32, expected I64"),
        (_roll, "d2t and t2d do not fit: i + d2t[i] must run through the 96 ids that t2d keeps of 320, ascending"),
        (lambda t: t["d2t"].zero_(), "it gives 96 ids from 0 to 95"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    edit_tensors: Callable[[dict[str, Tensor]], Any], problem: str, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint("one_layer", edit_tensors=edit_tensors)
    message = _refusal(checkpoint)
    assert message.splitlines()[1].startswith("  model.safetensors: ") and problem in message.splitlines()[1]


def _make_full(make_checkpoint: MakeCheckpoint, **mapping: Tensor) -> Path:
    """A draft of all 320 tokens, with such of a mapping."""

    def edit_tensors(tensors: dict[str, Tensor]) -> None:
        del tensors["d2t"], tensors["t2d"]
        tensors |= {"lm_head.weight": torch.ones(320, 64), **mapping}

    return make_checkpoint("one_layer", _set("draft_vocab_size", 320), edit_tensors)


ZEROS, ONES = torch.zeros(320, dtype=torch.int64), torch.ones(320, dtype=torch.bool)


@pytest.mark.parametrize("mapping", [{}, {"d2t": ZEROS, "t2d": ONES}], ids=["absent", "identity"])
def test_a_full_vocabulary_needs_no_mapping_and_may_have_that_of_every_id(
    mapping: dict[str, Tensor], make_checkpoint: MakeCheckpoint
) -> None:
    assert check_speculators_folder(_make_full(make_checkpoint, **mapping)).draft_vocab_size == 320


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ({"d2t": ZEROS}, "t2d is missing"),
        ({"t2d": ONES}, "d2t is missing"),
        ({"d2t": ZEROS + 1, "t2d": ONES}, "d2t and t2d do not fit"),
        ({"d2t": ZEROS, "t2d": ~ONES}, "d2t and t2d do not fit"),
    ],
    ids=["d2t alone", "t2d alone", "moved", "none kept"],
)
def test_a_full_vocabulary_with_another_mapping_is_refused(
    mapping: dict[str, Tensor], problem: str, make_checkpoint: MakeCheckpoint
) -> None:
    assert f"model.safetensors: {problem}" in _refusal(_make_full(make_checkpoint, **mapping))


def test_a_part_of_the_vocabulary_needs_its_mapping(make_checkpoint: MakeCheckpoint) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors["d2t"], tensors["t2d"]

    message = _refusal(make_checkpoint("one_layer", edit_tensors=remove))
    assert "d2t is missing" in message and "t2d is missing" in message


def test_all_problems_are_in_one_message(make_checkpoint: MakeCheckpoint) -> None:
    def edit_tensors(tensors: dict[str, Tensor]) -> None:
        del tensors["fc.weight"], tensors["t2d"]
        tensors["norm.weight"] = torch.ones(2)

    message = _refusal(make_checkpoint("one_layer", edit_tensors=edit_tensors))
    assert [line.split(": ")[1].split(" ")[0] for line in message.splitlines()[1:-1]] == [
        "fc.weight",
        "t2d",
        "norm.weight",
    ]


def test_files_that_are_absent_or_cut_short_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("one_layer")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    assert "model.safetensors: cannot be read (" in _refusal(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors: cannot be read (" in _refusal(checkpoint)
    (checkpoint / "config.json").write_text('{"architectures": [')
    assert "config.json: file: Invalid JSON" in _refusal(checkpoint)
    (checkpoint / "config.json").unlink()
    message = _refusal(checkpoint)
    assert "config.json: cannot be read (No such file or directory)" in message
