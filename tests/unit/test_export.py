"""Exports of drafts that Speculators 0.9.0 wrote, and of broken copies; each refusal with its text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

import eagle3_ray.export as export_module
from eagle3_ray.errors import CheckpointError, ExportError
from eagle3_ray.export import ExportFormat, export_checkpoint
from eagle3_ray.jobs import export as export_job
from eagle3_ray.speculators_format import check_speculators_folder
from eagle3_ray.verbs import ExportSettings

DRAFTS = ("decay", "eagle31", "fc_norm", "one_layer", "residual_first", "two_layers")
# What SGLang's LlamaForCausalLMEagle3 has parameters for, plus the mapping that its loader looks for.
SGLANG_NAMES = {
    "d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight",
    "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight", "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight", "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
}  # fmt: skip

MakeCheckpoint = Callable[..., Path]


def _refusal(checkpoint: Path, output: Path, target: ExportFormat) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, output, target)
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_speculators_export_holds_the_same_tensors_and_config(
    draft: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(draft)
    (checkpoint / "state").mkdir()
    exported = export_checkpoint(checkpoint, tmp_path / "deep" / "out", "speculators")
    assert exported.path == tmp_path / "deep" / "out" and exported.serve_command == f"vllm serve {exported.path}"
    assert sorted(path.name for path in exported.path.iterdir()) == ["config.json", "model.safetensors"]
    written, original = load_file(exported.path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert written.keys() == original.keys() and exported.num_tensors == len(original)
    assert all(torch.equal(written[name], original[name]) for name in original)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (exported.path, checkpoint)]
    assert configs[0] == configs[1]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_best_is_followed_and_an_empty_output_folder_is_used(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    best = make_checkpoint("one_layer").parent / "best"
    best.symlink_to("3")
    (tmp_path / "out").mkdir()
    export_checkpoint(best, tmp_path / "out", "speculators")
    check_speculators_folder(tmp_path / "out")


def test_an_sglang_export_has_its_names_and_the_same_values(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("residual_first")
    exported = export_checkpoint(checkpoint, tmp_path / "out", "sglang")
    written, original = load_file(exported.path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert set(written) == SGLANG_NAMES
    for name, tensor in written.items():
        assert torch.equal(tensor, original[name.replace("midlayer", "layers.0")])
    assert "--speculative-num-steps 3" in exported.serve_command and str(exported.path) in exported.serve_command


@pytest.mark.parametrize("target", ["speculators", "sglang"])
def test_a_full_vocabulary_is_exported_without_a_mapping(
    target: ExportFormat, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Without d2t, SGLang takes a draft's ids for the verifier's."""

    def fill(tensors: dict[str, Tensor]) -> None:
        del tensors["d2t"], tensors["t2d"]
        tensors["lm_head.weight"] = torch.ones(320, 64)

    checkpoint = make_checkpoint("residual_first", lambda config: config.update(draft_vocab_size=320), fill)
    export_checkpoint(checkpoint, tmp_path / "out", target)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "midlayer.hidden_norm.weight" not in written or written.keys() == SGLANG_NAMES - {"d2t", "t2d"}
    assert not written.keys() & {"d2t", "t2d"} and written["lm_head.weight"].shape == (320, 64)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["draft_vocab_size"] == 320


def test_an_sglang_config_says_what_sglang_reads(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("residual_first")
    export_checkpoint(checkpoint, tmp_path / "out", "sglang")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = json.loads((checkpoint / "config.json").read_text())["transformer_layer_config"]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 96
    assert config["num_hidden_layers"] == 1 and config["tie_word_embeddings"] is False
    assert "target_hidden_size" not in config and config["vocab_size"] == 320
    # Serving ids 2, 4, 5: the states that enter these layers are the outputs of 1, 3, 4.
    assert config["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    assert config["rope_theta"] == 50000.0 and config["rope_scaling"]["rope_type"] == "llama3"
    loaded, trained = AutoConfig.from_pretrained(tmp_path / "out"), LlamaConfig(**layer)
    assert isinstance(loaded, LlamaConfig) and loaded.rope_parameters == trained.rope_parameters
    sizes = (
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    assert {name: getattr(loaded, name) for name in sizes} == {name: getattr(trained, name) for name in sizes}


def test_an_unscaled_rope_is_null_for_older_readers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def unscale(config: dict[str, Any]) -> None:
        config["transformer_layer_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}

    export_checkpoint(make_checkpoint("residual_first", unscale), tmp_path / "out", "sglang")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("draft", "reasons"),
    [
        ("one_layer", ["norm_before_residual true: its residual is the raw hidden state (--no-norm-before-residual)"]),
        ("two_layers", ["num_hidden_layers 2: it has one layer", "norm_before_residual true"]),
        (
            "eagle31",
            ["norm_before_residual true", "norm_before_fc true: it has no norm", "norm_output true: it hands on"],
        ),
        ("fc_norm", ["norm_before_residual true", "fc_norm true: it has no norms before fc", "norm_output true"]),
    ],
)
def test_a_draft_that_sglang_would_compute_wrongly_is_refused_with_every_reason(
    draft: str, reasons: list[str], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    message = _refusal(make_checkpoint(draft), tmp_path / "out", "sglang")
    assert all(reason in message for reason in reasons) and message.count("\n") == len(reasons) + 1
    assert "SGLang cannot serve this draft as it was trained" in message and "--format speculators" in message
    assert not (tmp_path / "out").exists()


def test_sglang_refuses_what_no_recorded_draft_has(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def edit_config(config: dict[str, Any]) -> None:
        config["transformer_layer_config"] |= {
            **{"model_type": "qwen3", "hidden_act": "gelu"},
            **{"layer_types": ["sliding_attention"], "sliding_window": 64, "use_sliding_window": True},
        }
        config |= {"embed_requires_grad": True, "eagle_aux_hidden_state_layer_ids": [0, 4]}

    def edit_tensors(tensors: dict[str, Tensor]) -> None:
        tensors["fc.weight"] = tensors["fc.weight"][:, :128].contiguous()
        tensors |= {f"layers.0.self_attn.{name}_norm.weight": torch.ones(16) for name in "qk"}

    checkpoint = make_checkpoint("residual_first", edit_config, edit_tensors)
    message = _refusal(checkpoint, tmp_path / "out", "sglang")
    for reason in (
        "model_type qwen3: it has no q/k norms",
        "sliding_window 64: it reads none from config.json",
        "hidden_act gelu: it has silu only",
        "embed_requires_grad true: it takes the verifier's embedding",
        "auxiliary layers [0, 4]: its fc reads 3 states",
        "auxiliary layers [0, 4]: it cannot take id 0, the embedding",
    ):
        assert reason in message
    export_checkpoint(checkpoint, tmp_path / "out", "speculators")


@pytest.mark.parametrize(
    ("ids", "verifier", "reason"),
    [
        ([2, 4, 5], "verifier", None),
        ([1, 4, 5], "verifier", "auxiliary layers [1, 4, 5]: its releases read listed ids of GptOssForCausalLM"),
        ([2, 4, 5], "nowhere", "auxiliary layers [2, 4, 5] of GptOssForCausalLM: cannot tell if they are its default"),
    ],
)
def test_no_ids_are_listed_where_sglangs_releases_disagree_on_them(
    ids: list[int], verifier: str, reason: str | None, make_checkpoint: MakeCheckpoint, parity: Path, tmp_path: Path
) -> None:
    (tmp_path / "nowhere").mkdir()
    place = parity / "verifier" if verifier == "verifier" else tmp_path / "nowhere"

    def edit_config(config: dict[str, Any]) -> None:
        config["eagle_aux_hidden_state_layer_ids"] = ids
        reference = {"name_or_path": str(place), "architectures": ["GptOssForCausalLM"]}
        config["speculators_config"]["verifier"] = reference

    checkpoint = make_checkpoint("residual_first", edit_config)
    if reason is None:
        # The recorded verifier has 8 layers, so 2, 4, 5 is what SGLang takes unasked.
        export_checkpoint(checkpoint, tmp_path / "out", "sglang")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["eagle_config"] == {"use_aux_hidden_state": True}
    else:
        assert reason in _refusal(checkpoint, tmp_path / "out", "sglang")


def test_an_uncommitted_or_missing_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("one_layer")
    (checkpoint / "COMMITTED").unlink()
    message = _refusal(checkpoint, tmp_path / "out", "speculators")
    assert "/3: has no COMMITTED file, so it is half-written or no checkpoint." in message
    best = checkpoint.parent / "best"
    best.symlink_to("7")
    message = _refusal(best, tmp_path / "out", "speculators")
    assert "best -> " in message and "/7: no such checkpoint folder." in message
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_a_tensor_is_not_exported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("one_layer", edit_tensors=lambda tensors: tensors.pop("fc.weight"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: fc\.weight is missing"):
        export_checkpoint(checkpoint, tmp_path / "out", "speculators")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_that_is_not_free_is_left_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("one_layer")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    message = _refusal(checkpoint, tmp_path / "out", "speculators")
    assert message == f"{tmp_path}/out: is not empty. Give --output-path a new or an empty folder."
    message = _refusal(checkpoint, tmp_path / "out" / "precious", "speculators")
    assert "precious: is not a folder." in message
    message = _refusal(checkpoint, tmp_path / "out" / "precious" / "out", "speculators")
    assert "cannot be written" in message
    assert (tmp_path / "out" / "precious").read_text() == "keep" and len(list((tmp_path / "out").iterdir())) == 1


def test_a_disk_that_changes_a_value_is_noticed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_changed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["fc.weight"][0, 0] += 1
        save_file(changed, path, metadata)

    monkeypatch.setattr(export_module, "save_file", save_changed)
    message = _refusal(make_checkpoint("one_layer"), tmp_path / "out", "speculators")
    assert "reads back differently from what was written: fc.weight. Check the disk." in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_numbers_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("one_layer", edit_tensors=lambda tensors: tensors["norm.weight"].fill_(float("nan")))
    message = _refusal(checkpoint, tmp_path / "out", "speculators")
    assert "NaN or Inf in norm.weight." in message


def test_the_job_says_where_the_draft_lies_and_how_to_serve_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint("residual_first")
    export_job.run(ExportSettings(checkpoint_path=checkpoint, output_path=tmp_path / "out", format="sglang"))
    assert capsys.readouterr().out.splitlines() == [
        f"exported  {checkpoint} -> {tmp_path}/out",
        "checked   15 tensors, 0.3 MB, reopened and equal",
        "serve     python -m sglang.launch_server --model-path ../../verifier --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {tmp_path}/out --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4",
    ]
