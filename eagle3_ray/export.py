"""A checkpoint becomes the folder a server loads: Speculators (vLLM), or SGLang's names.

    speculators                              sglang
    layers.0.self_attn.q_proj.weight ...     midlayer.self_attn.q_proj.weight ...
    embed_tokens.weight                      (taken from the verifier)
    fc, norm, lm_head                        the same
    d2t, t2d: absent for a full vocabulary   the same
    id k: the state that enters layer k      id k-1: the layer whose output that is

Nothing appears under the output's name before it was written, reopened and compared tensor by tensor.

Source: SGLang's models/llama_eagle3.py (names, what it computes) and `set_eagle3_layers_to_capture` of its
verifier models (layer ids; its pull requests 25454 and 32334 changed them for some), as of August 2026.
"""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3_ray.errors import ExportError, VerifierError
from eagle3_ray.model.verifier import read_verifier_config
from eagle3_ray.speculators_format import CONFIG_FILE, WEIGHTS_FILE, SpeculatorsConfig, check_speculators_folder
from eagle3_ray.storage import StoragePath, local_copy
from eagle3_ray.training.run_folder import COMMITTED, follow_best

ExportFormat = Literal["speculators", "sglang"]
# Drafts that SGLang serves read three auxiliary states; the width of its fc is fixed.
SGLANG_NUM_AUX_LAYERS = 3
# Verifiers for which SGLang's releases disagree on what a listed id means; without a list all of them take
# [2, n//2, n-3] in serving numbering.
SGLANG_AMBIGUOUS_VERIFIERS = ("GptOss", "Deepseek", "Kimi")


@dataclass(frozen=True)
class ExportedDraft:
    """What was written.

    Attributes:
        path: Absolute path of the folder.
        num_tensors: Tensors in it, all reopened and compared.
        num_bytes: Size of model.safetensors.
        serve_command: How a server loads it.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    serve_command: str


def export_checkpoint(checkpoint_path: StoragePath, output_path: Path, target: ExportFormat) -> ExportedDraft:
    """Write a checkpoint's draft in a server's format.

    Args:
        checkpoint_path: A committed checkpoint, or what names one such as `best`; on an object store too.
        output_path: Absent, or an empty folder.
        target: Which server's format.

    Raises:
        CheckpointError: The checkpoint's draft is not whole or does not fit its config.
        ExportError: The checkpoint is uncommitted or holds NaN, the output is not free, or SGLang would compute
            something else than was trained (with every reason).
    """
    checkpoint = _find_checkpoint(checkpoint_path)
    output = output_path.absolute()
    _check_free(output)
    with local_copy(checkpoint, (CONFIG_FILE, WEIGHTS_FILE)) as folder:
        config = check_speculators_folder(folder)
        tensors = load_file(folder / WEIGHTS_FILE)
        exported_config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ExportError(f"{checkpoint}: NaN or Inf in {', '.join(sorted(broken))}. Export an older checkpoint.")
    if target == "sglang":
        exported_config, tensors = build_sglang_config(config, checkpoint), rename_for_sglang(tensors)
    _write_compared(output, exported_config, tensors, target)
    num_bytes = (output / WEIGHTS_FILE).stat().st_size
    return ExportedDraft(output, len(tensors), num_bytes, _serve_command(config, output, target))


def _find_checkpoint(path: StoragePath) -> StoragePath:
    """Return the folder itself, `best` followed once, so that a run that moves on cannot change it meanwhile."""
    checkpoint = follow_best(path)
    named = str(path) if checkpoint == path.absolute() else f"{path} -> {checkpoint}"
    if not checkpoint.is_dir():
        raise ExportError(
            f"{named}: no such checkpoint folder. Name one such as ./checkpoints/0 or ./checkpoints/best."
        )
    if not (checkpoint / COMMITTED).is_file():
        raise ExportError(
            f"{named}: has no {COMMITTED} file, so it is half-written or no checkpoint. "
            "Wait until it is saved, or export an older one."
        )
    return checkpoint


def _check_free(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ExportError(f"{output}: is not a folder. Give --output-path a new or an empty folder.")
    if output.is_dir() and any(output.iterdir()):
        raise ExportError(f"{output}: is not empty. Give --output-path a new or an empty folder.")


def rename_for_sglang(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a one-layer draft's tensors by SGLang's names, without the embedding, which it takes from the verifier."""
    return {
        name.replace("layers.0.", "midlayer.", 1): tensor
        for name, tensor in tensors.items()
        if name != "embed_tokens.weight"
    }


def build_sglang_config(config: SpeculatorsConfig, checkpoint: StoragePath) -> dict[str, Any]:
    """Return config.json for SGLang.

    RoPE is written as transformers 5 and 4 read it. `target_hidden_size` is left out: null would be taken as a size.

    Raises:
        ExportError: SGLang would refuse the draft, or load it and compute something else.
    """
    layer, aux_layer_ids = config.transformer_layer_config, _sglang_aux_layer_ids(config)
    problems = _find_sglang_problems(config)
    if isinstance(aux_layer_ids, str):
        problems.append(aux_layer_ids)
    if problems:
        raise ExportError(
            f"{checkpoint}: SGLang cannot serve this draft as it was trained:\n  "
            + "\n  ".join(problems)
            + "\nExport it with --format speculators for vLLM, or train with SGLang's settings."
        )
    rope = layer.rope_parameters.model_dump()
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    eagle_config: dict[str, Any] = {"use_aux_hidden_state": True}
    if aux_layer_ids is not None:
        eagle_config["eagle_aux_hidden_state_layer_ids"] = aux_layer_ids
    return {
        **layer.model_dump(exclude={"layer_types", "sliding_window", "use_sliding_window"}),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab_size,
        "dtype": config.dtype or "bfloat16",
        "torch_dtype": config.dtype or "bfloat16",
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "eagle_config": eagle_config,
    }


def _find_sglang_problems(config: SpeculatorsConfig) -> list[str]:
    layer, ids = config.transformer_layer_config, config.eagle_aux_hidden_state_layer_ids
    reasons = {
        f"num_hidden_layers {layer.num_hidden_layers}: it has one layer": layer.num_hidden_layers != 1,
        "norm_before_residual true: its residual is the raw hidden state (--no-norm-before-residual)": (
            config.norm_before_residual
        ),
        "norm_before_fc true: it has no norm before fc": config.norm_before_fc,
        "fc_norm true: it has no norms before fc": config.fc_norm,
        "norm_output true: it hands on the hidden state before the norm": config.norm_output,
        "embed_requires_grad true: it takes the verifier's embedding": config.embed_requires_grad,
        f"model_type {layer.model_type}: it has no q/k norms": layer.model_type != "llama",
        f"sliding_window {layer.sliding_window}: it reads none from config.json": (
            "sliding_attention" in (layer.layer_types or ())
        ),
        f"hidden_act {layer.hidden_act}: it has silu only": layer.hidden_act != "silu",
        f"auxiliary layers {list(ids)}: its fc reads {SGLANG_NUM_AUX_LAYERS} states": len(ids) != SGLANG_NUM_AUX_LAYERS,
    }
    return [reason for reason, applies in reasons.items() if applies]


def _sglang_aux_layer_ids(config: SpeculatorsConfig) -> list[int] | str | None:
    """Return the ids to list, None to list none, or the reason why neither gives the layers trained on.

    A listed id names the layer whose *output* is taken: SGLang adds one before it captures what enters a layer.
    """
    ids = config.eagle_aux_hidden_state_layer_ids
    if 0 in ids:
        return f"auxiliary layers {list(ids)}: it cannot take id 0, the embedding"
    verifier = config.speculators_config.verifier
    ambiguous = [name for name in verifier.architectures if name.startswith(SGLANG_AMBIGUOUS_VERIFIERS)]
    if not ambiguous:
        return [k - 1 for k in ids]
    try:
        if ids == read_verifier_config(verifier.name_or_path).default_aux_layer_ids():
            return None
        return f"auxiliary layers {list(ids)}: its releases read listed ids of {ambiguous[0]} in different ways"
    except VerifierError as error:
        return f"auxiliary layers {list(ids)} of {ambiguous[0]}: cannot tell if they are its default ({error})"


def _write_compared(output: Path, config: dict[str, Any], tensors: dict[str, Tensor], target: ExportFormat) -> None:
    """Write to a hidden sibling, reopen it, compare, and only then give it the output's name."""
    unfinished = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _compare_reopened(unfinished, config, tensors)
        if target == "speculators":
            check_speculators_folder(unfinished)
        # Fails, as it should, if somebody put files there meanwhile.
        unfinished.rename(output)
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({error}). Nothing was left there.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _compare_reopened(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ExportError unless the folder reads back as what was to be written."""
    reopened = load_file(folder / WEIGHTS_FILE)
    problems = sorted(reopened.keys() ^ tensors.keys())
    for name in reopened.keys() & tensors.keys():
        if reopened[name].dtype != tensors[name].dtype or not torch.equal(reopened[name], tensors[name]):
            problems.append(name)
    if json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) != config:
        problems.append(CONFIG_FILE)
    if problems:
        raise ExportError(
            f"{folder}: reads back differently from what was written: {', '.join(problems)}. Check the disk."
        )


def _serve_command(config: SpeculatorsConfig, output: Path, target: ExportFormat) -> str:
    if target == "speculators":
        return f"vllm serve {output}"
    num_tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    return (
        f"python -m sglang.launch_server --model-path {config.speculators_config.verifier.name_or_path} "
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {output} --speculative-num-steps {num_tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_tokens + 1}"
    )
