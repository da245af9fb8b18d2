"""A published draft whose weights a new run begins with: read, compared with the run's own shape, and taken over.

    Speculators                              EAGLE-3, SGLang
    layers.0.self_attn.q_proj.weight ...     midlayer.self_attn.q_proj.weight ...
    transformer_layer_config                 the config itself
    id k: the state that enters layer k      id k-1, in eagle_config: the layer whose output that is

Neither has to list its layers: then they are the default. Norm switches that a config does not name are off.

Source: speculators' Eagle3SpeculatorConfig and eagle3_converter.py; EAGLE's model/cnets.py; `export.py` for SGLang.
"""

import contextlib
import io
import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from eagle3_ray.errors import CheckpointError, PretrainedDraftError, VerifierError
from eagle3_ray.model.config import LAYER_TYPES, DraftConfig, LayerConfig, layer_class
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.tensor_file import read_tensor, read_tensor_names
from eagle3_ray.model.verifier import PICKLED_FILE, SINGLE_FILE, VerifierInfo, read_shard_index, resolve_file
from eagle3_ray.storage import StoragePath

EAGLE_ARCHITECTURE = "LlamaForCausalLMEagle3"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# What torch raises for a damaged file, by where the damage is.
DAMAGED_PICKLE_ERRORS = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class PretrainedDraft:
    """A draft of the run's shape, but for its vocabulary.

    Attributes:
        name_or_path: What names it.
        kept_ids: [V] int64, the verifier id of each of its own ids, all different.
        weights: By the names of `Eagle3Draft`, in the file's dtype, all finite; without an embedding that was not
            trained.
    """

    name_or_path: str
    kept_ids: Tensor
    weights: Mapping[str, Tensor]


def read_pretrained(name_or_path: str, run: DraftConfig, verifier: VerifierInfo) -> PretrainedDraft:
    """Read a draft that a run begins with: a folder, local or on an object store, or a hub repository.

    Args:
        name_or_path: What names it.
        run: Shape of the run's draft; its vocabulary may be another.
        verifier: Of the run.

    Raises:
        PretrainedDraftError: It cannot be read, is of another kind or shape, or a tensor is missing, unknown or not
            finite; names every such problem.
        StorageError: The object store cannot be read.
    """
    with _told(name_or_path):
        config = _read_config(name_or_path)
        own = _read_shape(name_or_path, config, verifier)
        conflicts = find_conflicts(own, run)
        if conflicts:
            raise _refused(
                name_or_path,
                "is a draft of another shape than the run's",
                conflicts,
                f"What names no flag follows {verifier.name_or_path}: choose a draft that was trained for it.",
            )
        tensors = _read_tensors(name_or_path, with_embedding=own.embed_requires_grad)
    offsets, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    problems = _find_tensor_problems(tensors, own)
    kept_ids = torch.arange(own.draft_vocab_size)
    if offsets is not None and offsets.shape == kept_ids.shape:
        kept_ids = kept_ids + offsets
    elif offsets is not None or own.draft_vocab_size != verifier.vocab_size:
        found = "is missing" if offsets is None else f"has shape {list(offsets.shape)}"
        problems.append(f"d2t {found}, expected [{own.draft_vocab_size}]")
    problems += _find_mapping_problems(kept_ids, mask, verifier.vocab_size)
    if problems:
        raise _refused(name_or_path, "cannot be begun with", problems, "Fetch it again, or choose another draft.")
    return PretrainedDraft(name_or_path, kept_ids, tensors)


def take_over(
    weights: dict[str, Tensor], pretrained: PretrainedDraft, kept_ids: Tensor, *, with_head: bool = True
) -> None:
    """Put a draft's weights in the place of initial ones; of the head, the rows of ids that both can say.

    Args:
        weights: Every tensor of a new draft, float32; changed in place.
        pretrained: Of the same shape.
        kept_ids: [V] int64, the verifier id of each of the new draft's ids.
        with_head: Else it stays the verifier's.
    """
    for name, tensor in pretrained.weights.items():
        if name != HEAD:
            weights[name].copy_(tensor)
    if not with_head:
        return
    row_of_id = torch.full((len(weights[EMBEDDING]),), -1)
    row_of_id[pretrained.kept_ids] = torch.arange(len(pretrained.kept_ids))
    row = row_of_id[kept_ids]
    weights[HEAD][row >= 0] = pretrained.weights[HEAD][row[row >= 0]].float()


def find_conflicts(draft: DraftConfig, run: DraftConfig) -> list[str]:
    """Return all in which a draft computes something else than the run's would, and the flag that mends it, if any."""
    own, other = draft.layer, run.layer
    ids = " ".join(map(str, draft.aux_layer_ids))
    own_type, other_type = own.written["model_type"], other.written["model_type"]
    pairs: dict[str, tuple[object, object, str]] = {
        "verifier's vocabulary": (own.vocab_size, other.vocab_size, ""),
        "hidden size": (own.hidden_size, other.hidden_size, ""),
        "intermediate size": (own.intermediate_size, other.intermediate_size, ""),
        "decoder layers": (own.num_hidden_layers, other.num_hidden_layers, f"--num-layers {own.num_hidden_layers}"),
        "layer type": (own_type, other_type, f"--layer-type {own_type}"),
        "sliding window": (
            own.sliding_window,
            other.sliding_window,
            f"--sliding-window {str(own.sliding_window).lower()}",
        ),
        "heads": (own.num_attention_heads, other.num_attention_heads, ""),
        "key-value heads": (own.num_key_value_heads, other.num_key_value_heads, ""),
        "head_dim": (own.head_dim, other.head_dim, ""),
        "activation": (own.written["hidden_act"], other.written["hidden_act"], ""),
        "epsilon of the norms": (own.rms_norm_eps, other.rms_norm_eps, ""),
        "auxiliary layers": (
            list(draft.aux_layer_ids),
            list(run.aux_layer_ids),
            f"--aux-layer-ids {ids}, with samples of these layers",
        ),
    }
    switches = {
        "norm_before_residual": (draft.norm_before_residual, run.norm_before_residual),
        "norm_before_fc": (draft.norm_before_fc, run.norm_before_fc),
        "fc_norm": (draft.fc_norm, run.fc_norm),
        "norm_output": (draft.norm_output, run.norm_output),
    }
    if draft.embed_requires_grad:
        pairs["trained embedding"] = (True, run.embed_requires_grad, "--train-embedding")
    for name, (wanted, found) in switches.items():
        pairs[name] = (wanted, found, f"--{'' if wanted else 'no-'}{name.replace('_', '-')}")
    if (own.rope_frequencies, own.rope_scale) != (other.rope_frequencies, other.rope_scale):
        ropes = [json.dumps(layer.written["rope_parameters"], sort_keys=True) for layer in (own, other)]
        pairs["RoPE"] = (ropes[0], f"{ropes[1]} with heads of {other.head_dim}", "")
    return [
        f"{name}: {wanted} of the draft, {found} of the run{f': pass {flag}' if flag else ''}"
        for name, (wanted, found, flag) in pairs.items()
        if wanted != found
    ]


def _read_config(name_or_path: str) -> dict[str, Any]:
    path = resolve_file(name_or_path, "config.json")
    if path is None:
        raise _unusable(name_or_path, "no config.json. Name the folder of a draft, or a hub id")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(path, f"not a readable JSON file ({error})") from error
    if not isinstance(config, dict):
        raise _unusable(path, f"holds a {type(config).__name__}, expected the object of a draft's config")
    return config


def _read_shape(name_or_path: str, config: Mapping[str, Any], verifier: VerifierInfo) -> DraftConfig:
    """Return a draft's shape by its config, of either format."""
    try:
        if "speculators_model_type" in config:
            kind, layer = config["speculators_model_type"], config["transformer_layer_config"]
            layer_type = layer.get("model_type", "qwen3")
            is_known = kind == "eagle3" and layer_type in LAYER_TYPES
            kind = f"{kind} draft with {layer_type} layers"
            ids = config.get("eagle_aux_hidden_state_layer_ids")
        else:
            kind, layer, layer_type = f"model of {config.get('architectures')}", config, "llama"
            is_known = EAGLE_ARCHITECTURE in (config.get("architectures") or ())
            listed = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            ids = listed and [number + 1 for number in listed]
        if not is_known:
            raise _unusable(
                name_or_path,
                f"is a {kind}, expected an EAGLE-3 draft: speculators_model_type eagle3 with layers of "
                f"{' or '.join(LAYER_TYPES)}, or architectures [{EAGLE_ARCHITECTURE}]",
            )
        switches = {name: bool(config.get(name, False)) for name in SWITCHES}
        return DraftConfig(
            layer=LayerConfig.from_transformers(layer_class(layer_type)(**layer)),
            draft_vocab_size=int(config.get("draft_vocab_size") or layer["vocab_size"]),
            aux_layer_ids=tuple(ids) if ids else verifier.default_aux_layer_ids(),
            speculative_tokens=1,
            **switches,
            embed_requires_grad=bool(config.get("embed_requires_grad", False)),
            verifier_name_or_path=verifier.name_or_path,
            verifier_architectures=verifier.architectures,
        )
    except CheckpointError as error:
        raise _unusable(name_or_path, str(error).removesuffix(".")) from error
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unusable(name_or_path, f"config.json is not one that can be read ({error})") from error


def _read_tensors(name_or_path: str, *, with_embedding: bool) -> dict[str, Tensor]:
    """Return all of a draft's tensors, its embedding if that is wanted, by the names of `Eagle3Draft`."""
    file_of_tensor = read_shard_index(name_or_path)
    single = None if file_of_tensor is not None else resolve_file(name_or_path, SINGLE_FILE)
    try:
        if single is not None:
            file_of_tensor = dict.fromkeys(read_tensor_names(single), SINGLE_FILE)
        if file_of_tensor is None:
            pickled = _read_pickled(name_or_path)
            return {name: tensor for name, tensor in pickled.items() if with_embedding or name != EMBEDDING}
        paths = {name: resolve_file(name_or_path, name) for name in set(file_of_tensor.values())}
        tensors = {}
        for name, file_name in file_of_tensor.items():
            path = paths[file_name]
            if path is None:
                raise _unusable(name_or_path, f"{file_name}, which should hold {name}, is missing")
            if with_embedding or own_name(name) != EMBEDDING:
                tensors[own_name(name)] = read_tensor(path, name)
    except (SafetensorError, OSError) as error:
        raise _unusable(name_or_path, f"not readable as safetensors ({error})") from error
    return tensors


def own_name(name: str) -> str:
    """Return what `Eagle3Draft` calls a tensor of either format."""
    name = name.removeprefix("model.")
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


def _read_pickled(name_or_path: str) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, which is never unpickled into anything else."""
    path = resolve_file(name_or_path, PICKLED_FILE)
    if path is None:
        raise _unusable(name_or_path, f"neither {SINGLE_FILE} nor {PICKLED_FILE} is there")
    try:
        source = path if isinstance(path, Path) else io.BytesIO(path.read_bytes())
        content = torch.load(source, map_location="cpu", weights_only=True)
    except DAMAGED_PICKLE_ERRORS as error:
        raise _unusable(path, f"not a file of tensors alone ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise _unusable(path, "holds something else than tensors by their names")
    return {own_name(str(name)): tensor for name, tensor in content.items()}


def _find_tensor_problems(tensors: Mapping[str, Tensor], config: DraftConfig) -> list[str]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Eagle3Draft(config).state_dict().items()}
    if not config.embed_requires_grad:
        del shapes[EMBEDDING]
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != shapes[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
        elif not torch.is_floating_point(tensor) or tensor.element_size() < 2:
            problems.append(f"{name} is {tensor.dtype}; quantised drafts are not supported")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has NaN or Inf")
    return problems


def _find_mapping_problems(kept_ids: Tensor, mask: Tensor | None, vocab_size: int) -> list[str]:
    is_inside = bool(((kept_ids >= 0) & (kept_ids < vocab_size)).all())
    if not is_inside or len(kept_ids.unique()) < len(kept_ids):
        return [f"d2t does not name {len(kept_ids)} different ids of 0..{vocab_size - 1}, as i + d2t[i]"]
    if mask is not None and not torch.equal(mask.nonzero().flatten(), kept_ids.sort().values):
        return ["d2t and t2d keep different ids"]
    return []


@contextlib.contextmanager
def _told(name_or_path: str) -> Iterator[None]:
    """Have what the verifier's readers refuse be told of the draft."""
    try:
        yield
    except VerifierError as error:
        raise PretrainedDraftError(f"--from-pretrained {name_or_path}: cannot be read: {error}") from error


def _unusable(place: str | StoragePath, problem: str) -> PretrainedDraftError:
    return PretrainedDraftError(f"--from-pretrained {place}: {problem}.")


def _refused(name_or_path: str, what: str, problems: list[str], advice: str) -> PretrainedDraftError:
    listed = "\n  ".join(problems)
    return PretrainedDraftError(f"--from-pretrained {name_or_path}: {what}:\n  {listed}\n  {advice}")
