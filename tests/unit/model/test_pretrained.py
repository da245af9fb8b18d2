"""Drafts to begin with: those that Speculators 0.9.0 wrote, as SGLang and EAGLE have them, and each kind of misfit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3_ray.config import ModelSettings
from eagle3_ray.errors import PretrainedDraftError
from eagle3_ray.export import export_checkpoint
from eagle3_ray.model.config import DraftConfig, build_draft_config
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.pretrained import PretrainedDraft, read_pretrained, take_over
from eagle3_ray.model.verifier import load_verifier_tensors, read_verifier_config
from eagle3_ray.storage import ObjectPath

MakeCheckpoint = Callable[..., Path]
VERIFIER = read_verifier_config(str(Path(__file__).parents[2] / "parity" / "small" / "verifier"))
TENSORS = load_verifier_tensors(VERIFIER)
SHAPES: dict[str, dict[str, Any]] = {
    "decay": {},
    "eagle31": {"preset": "eagle3.1"},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "one_layer": {},
    "residual_first": {"norm_before_residual": False},
    "two_layers": {"num_layers": 2},
}
SERVED_BY_SGLANG = SHAPES["residual_first"]


def run_config(vocab_size: int = 96, **shape: Any) -> DraftConfig:
    return build_draft_config(VERIFIER, ModelSettings(**shape), vocab_size, (2, 4, 5))


def read(folder: Path, **shape: Any) -> PretrainedDraft:
    return read_pretrained(str(folder), run_config(320, **shape), VERIFIER)


def refusal(folder: Path | str, **shape: Any) -> str:
    with pytest.raises(PretrainedDraftError) as caught:
        read_pretrained(str(folder), run_config(320, **shape), VERIFIER)
    assert caught.value.exit_code == 3
    return str(caught.value)


def begin(pretrained: PretrainedDraft, kept_ids: Tensor, **shape: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a new run, and what they would be without the draft it begins with."""
    config = run_config(len(kept_ids), **shape)
    without, weights = (initial_weights(config, TENSORS, kept_ids, seed=3) for _ in range(2))
    take_over(weights, pretrained, kept_ids)
    return weights, without


def assert_taken_over(pretrained: PretrainedDraft, original: dict[str, Tensor], **shape: Any) -> None:
    kept_ids = original["d2t"] + torch.arange(len(original["d2t"]))
    assert torch.equal(pretrained.kept_ids, kept_ids)
    weights, without = begin(pretrained, kept_ids, **shape)
    assert weights.keys() | {"d2t", "t2d"} == original.keys()
    for name, weight in weights.items():
        is_own = name != "embed_tokens.weight"  # that is the verifier's
        assert torch.equal(weight, original[name].float() if is_own else without[name]), name
    assert not torch.equal(weights["fc.weight"], without["fc.weight"])


def change_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"] + 1


@pytest.mark.parametrize("draft", SHAPES)
def test_every_tensor_of_a_speculators_draft_but_the_embedding_is_taken_over(
    draft: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(draft, edit_tensors=change_embedding)
    assert_taken_over(read(folder, **SHAPES[draft]), load_file(folder / "model.safetensors"), **SHAPES[draft])


def test_switches_and_layers_that_an_older_config_does_not_name_are_off_and_the_default(
    make_checkpoint: MakeCheckpoint,
) -> None:
    def age(config: dict[str, Any]) -> None:
        for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad"):
            del config[name]
        del config["eagle_aux_hidden_state_layer_ids"]
        config["architectures"] = ["Eagle3Speculator"]

    folder = make_checkpoint("residual_first", age)
    assert_taken_over(read(folder, **SERVED_BY_SGLANG), load_file(folder / "model.safetensors"), **SERVED_BY_SGLANG)
    assert "norm_before_residual: False of the draft, True of the run: pass --no-norm-before-residual" in refusal(
        folder
    )


def test_a_draft_of_qwen3_layers_with_a_window_is_taken_over(make_checkpoint: MakeCheckpoint) -> None:
    shape: dict[str, Any] = {"layer_type": "qwen3", "sliding_window": 64}

    def edit_config(config: dict[str, Any]) -> None:
        config["transformer_layer_config"] = run_config(**shape).to_speculators()["transformer_layer_config"]

    def add_norms(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"layers.0.self_attn.{name}_norm.weight": torch.full((16,), 1.5) for name in "qk"}

    folder = make_checkpoint("one_layer", edit_config, add_norms)
    assert_taken_over(read(folder, **shape), load_file(folder / "model.safetensors"), **shape)
    text = refusal(folder, sliding_window=32)
    assert "\n  layer type: qwen3 of the draft, llama of the run: pass --layer-type qwen3" in text
    assert "\n  sliding window: 64 of the draft, 32 of the run: pass --sliding-window 64" in text


def test_a_window_that_the_draft_lacks_is_unset(make_checkpoint: MakeCheckpoint) -> None:
    text = refusal(make_checkpoint("one_layer"), sliding_window=64)
    assert "\n  sliding window: None of the draft, 64 of the run: pass --sliding-window none" in text


def test_an_export_for_sglang_is_read_back(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("residual_first")
    export_checkpoint(checkpoint, tmp_path / "out", "sglang")
    original = load_file(checkpoint / "model.safetensors")
    assert_taken_over(read(tmp_path / "out", **SERVED_BY_SGLANG), original, **SERVED_BY_SGLANG)


def write_eagle(checkpoint: Path, folder: Path, prefix: str = "", **changes: Any) -> dict[str, Tensor]:
    """A draft as EAGLE's own repository publishes it: fp16 in a pickle, RoPE in the old form; returns what it holds."""
    layer = json.loads((checkpoint / "config.json").read_text())["transformer_layer_config"]
    rope = layer.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    config = {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 96,
        "rope_theta": theta,
        "rope_scaling": rope,
        "torch_dtype": "float16",
    }
    original = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    renamed = {prefix + name.replace("layers.0.", "midlayer."): tensor for name, tensor in original.items()}
    torch.save(renamed, folder / "pytorch_model.bin")
    return original


@pytest.mark.parametrize("prefix", ["", "model."])
def test_eagles_own_files_are_read(prefix: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    original = write_eagle(make_checkpoint("residual_first"), tmp_path / "eagle", prefix)
    assert_taken_over(read(tmp_path / "eagle", **SERVED_BY_SGLANG), original, **SERVED_BY_SGLANG)


def test_a_pickle_of_anything_but_tensors_is_never_unpickled(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    write_eagle(make_checkpoint("residual_first"), tmp_path / "eagle")
    path = tmp_path / "eagle" / "pytorch_model.bin"
    torch.save({"fc.weight": torch.nn.Linear(2, 2)}, path)
    assert refusal(tmp_path / "eagle", **SERVED_BY_SGLANG) == (
        f"--from-pretrained {path}: not a file of tensors alone (UnpicklingError)."
    )
    path.write_bytes(b"half")
    assert "not a file of tensors alone" in refusal(tmp_path / "eagle", **SERVED_BY_SGLANG)
    torch.save([torch.ones(2)], path)
    assert "holds something else than tensors by their names" in refusal(tmp_path / "eagle", **SERVED_BY_SGLANG)


def test_a_sharded_draft_is_read(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("one_layer")
    original = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file_of = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(original)}
    for file in set(file_of.values()):
        save_file({name: tensor for name, tensor in original.items() if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    assert_taken_over(read(folder), original)
    (folder / "model-1.safetensors").unlink()
    assert "model-1.safetensors, which should hold" in refusal(folder)


def test_of_another_vocabulary_the_rows_that_both_have_are_taken_over(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("one_layer", edit_tensors=lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    pretrained = read(folder)
    own = pretrained.kept_ids.tolist()
    kept_ids = torch.tensor(sorted({*own[::2], *range(0, 320, 7)}))
    weights, without = begin(pretrained, kept_ids)
    head = load_file(folder / "model.safetensors")["lm_head.weight"].float()
    num_own = 0
    for row, verifier_id in enumerate(kept_ids.tolist()):
        is_own = verifier_id in own
        expected = head[own.index(verifier_id)] if is_own else TENSORS.lm_head[verifier_id].float()
        assert torch.equal(weights["lm_head.weight"][row], expected)
        num_own += is_own
    assert 0 < num_own < len(kept_ids) and not torch.equal(weights["lm_head.weight"], without["lm_head.weight"])


def test_a_draft_that_can_say_all_needs_no_mapping(make_checkpoint: MakeCheckpoint) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        del tensors["d2t"], tensors["t2d"]
        tensors["lm_head.weight"] = torch.ones(320, 64)

    folder = make_checkpoint("one_layer", lambda config: config.update(draft_vocab_size=320), widen)
    assert torch.equal(read(folder).kept_ids, torch.arange(320))


def test_all_conflicts_are_named_at_once_with_the_flags_that_mend_them(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("two_layers", lambda config: config.update(eagle_aux_hidden_state_layer_ids=[1, 3, 6]))
    text = refusal(folder, num_layers=1, norm_before_residual=False, fc_norm=True, norm_output=True)
    head, *conflicts, advice = text.split("\n  ")
    assert head == f"--from-pretrained {folder}: is a draft of another shape than the run's:"
    assert conflicts == [
        "decoder layers: 2 of the draft, 1 of the run: pass --num-layers 2",
        "auxiliary layers: [1, 3, 6] of the draft, [2, 4, 5] of the run: pass --aux-layer-ids 1 3 6, with samples of "
        "these layers",
        "norm_before_residual: True of the draft, False of the run: pass --norm-before-residual",
        "fc_norm: False of the draft, True of the run: pass --no-fc-norm",
        "norm_output: False of the draft, True of the run: pass --no-norm-output",
    ]
    assert advice.startswith(f"What names no flag follows {VERIFIER.name_or_path}:")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 321}, "verifier's vocabulary: 321 of the draft, 320 of the run"),
        ({"hidden_size": 128}, "hidden size: 128 of the draft, 64 of the run"),
        ({"intermediate_size": 150}, "intermediate size: 150 of the draft, 160 of the run"),
        ({"num_attention_heads": 8}, "heads: 8 of the draft, 4 of the run"),
        ({"num_key_value_heads": 4}, "key-value heads: 4 of the draft, 2 of the run"),
        ({"hidden_act": "gelu"}, "activation: gelu of the draft, silu of the run"),
        ({"rms_norm_eps": 1e-6}, "epsilon of the norms: 1e-06 of the draft, 1e-05 of the run"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
            'RoPE: {"rope_theta": 50000.0, "rope_type": "default"} of the draft, {"factor": 8.0, ',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_follows_the_verifier_must_be_the_same(
    change: dict[str, Any], expected: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("one_layer", lambda config: config["transformer_layer_config"].update(change))
    (line,) = refusal(folder).split("\n  ")[1:-1]
    assert line.startswith(expected) and ": pass" not in line


def test_heads_of_another_width_are_named_with_what_follows_of_it(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("one_layer", lambda config: config["transformer_layer_config"].update(head_dim=32))
    lines = refusal(folder).split("\n  ")[1:-1]
    assert lines[0] == "head_dim: 32 of the draft, 16 of the run" and lines[1].startswith("RoPE: ") and len(lines) == 2


def test_an_embedding_that_was_trained_is_taken_over_by_a_run_that_trains_its_own(
    make_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_checkpoint("one_layer", lambda c: c.update(embed_requires_grad=True), change_embedding)
    expected = "trained embedding: True of the draft, False of the run: pass --train-embedding"
    assert f"\n  {expected}" in refusal(folder)
    pretrained, original = read(folder, train_embedding=True), load_file(folder / "model.safetensors")
    weights, without = begin(pretrained, pretrained.kept_ids, train_embedding=True)
    assert torch.equal(weights["embed_tokens.weight"], original["embed_tokens.weight"])
    assert not torch.equal(weights["embed_tokens.weight"], without["embed_tokens.weight"])


def test_a_frozen_head_stays_the_verifiers(make_checkpoint: MakeCheckpoint) -> None:
    pretrained = read(make_checkpoint("one_layer"))
    weights = initial_weights(run_config(), TENSORS, pretrained.kept_ids, seed=3)
    of_verifier = weights["lm_head.weight"].clone()
    take_over(weights, pretrained, pretrained.kept_ids, with_head=False)
    assert torch.equal(weights["lm_head.weight"], of_verifier)
    assert torch.equal(weights["fc.weight"], pretrained.weights["fc.weight"].float())


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda t: t.update({"layers.0.self_attn.q_norm.weight": torch.ones(16)}), "q_norm.weight is unknown"),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), "norm.weight has shape [32], expected [64]"),
        (lambda t: t.update({"norm.weight": torch.full((64,), torch.nan)}), "norm.weight has NaN or Inf"),
        (lambda t: t.update({"norm.weight": torch.full((64,), torch.inf)}), "norm.weight has NaN or Inf"),
        (lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int8)}), "norm.weight is torch.int8; quantised"),
        (lambda t: t.pop("d2t"), "d2t is missing, expected [96]"),
        (lambda t: t.update({"d2t": t["d2t"][:-1].clone()}), "d2t has shape [95], expected [96]"),
        (lambda t: t.update({"d2t": t["d2t"] + 320}), "d2t does not name 96 different ids of 0..319, as i + d2t[i]"),
        (lambda t: t.update({"d2t": -torch.arange(96)}), "d2t does not name 96 different ids of 0..319, as i + d2t[i]"),
        (lambda t: t.update({"t2d": ~t["t2d"]}), "d2t and t2d keep different ids"),
    ],
    ids=["missing", "unknown", "shape", "nan", "inf", "int8", "no d2t", "short d2t", "far d2t", "d2t twice", "t2d"],
)
def test_tensors_that_cannot_be_begun_with_are_named(
    edit: Callable[[dict[str, Tensor]], Any], expected: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("one_layer", edit_tensors=edit)
    lines = refusal(folder).split("\n  ")
    assert lines[0] == f"--from-pretrained {folder}: cannot be begun with:"
    assert sum(expected in line for line in lines) == 1


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda c: c.update(speculators_model_type="dflash"),
            "is a dflash draft with llama layers, expected an EAGLE-3",
        ),
        (lambda c: c["transformer_layer_config"].update(model_type="gemma"), "is a eagle3 draft with gemma layers"),
        (lambda c: c.pop("speculators_model_type"), "is a model of ['Eagle3DraftModel'], expected an EAGLE-3 draft"),
        (lambda c: c.pop("transformer_layer_config"), "config.json is not one that can be read ('transformer_layer"),
        (lambda c: c["transformer_layer_config"].update(hidden_size="x"), "config.json is not one that can be read"),
    ],
    ids=["kind", "layers", "neither", "no layer", "text"],
)
def test_a_draft_of_another_kind_is_refused(
    edit: Callable[[dict[str, Any]], Any], expected: str, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("one_layer", edit)
    assert refusal(folder).startswith(f"--from-pretrained {folder}: {expected}")


def test_a_folder_that_holds_no_whole_draft_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = make_checkpoint("one_layer")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    assert refusal(folder).startswith(f"--from-pretrained {folder}: not readable as safetensors (")
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin is there" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "not a readable JSON file" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "holds a list, expected the object of a draft's config" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    shutil.rmtree(folder)
    assert "neither a folder here nor a hub repository" in refusal(folder)
    assert "the hub cannot be reached for config.json" in refusal("someone/some-draft")


def test_a_draft_on_an_object_store_is_read(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, s3_bucket: ObjectPath
) -> None:
    checkpoint = make_checkpoint("residual_first")
    in_fp16 = write_eagle(checkpoint, tmp_path / "eagle")
    for folder, original in ((checkpoint, load_file(checkpoint / "model.safetensors")), (tmp_path / "eagle", in_fp16)):
        for path in folder.iterdir():
            (s3_bucket / folder.name / path.name).write_bytes(path.read_bytes())
        pretrained = read_pretrained(str(s3_bucket / folder.name), run_config(**SERVED_BY_SGLANG), VERIFIER)
        assert_taken_over(pretrained, original, **SERVED_BY_SGLANG)
    text = refusal(str(s3_bucket / "nowhere"))
    assert text == "--from-pretrained s3://bucket/nowhere: no config.json. Name the folder of a draft, or a hub id."


def test_a_draft_in_the_hubs_cache_is_read_without_the_hub(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--some-draft"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    original = write_eagle(make_checkpoint("residual_first"), repository / "snapshots" / ("0" * 40))
    pretrained = read_pretrained("someone/some-draft", run_config(**SERVED_BY_SGLANG), VERIFIER)
    assert_taken_over(pretrained, original, **SERVED_BY_SGLANG)
