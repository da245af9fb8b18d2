"""What a draft takes from its verifier: the configuration and three tensors, read without loading the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import Tensor

from eagle3_ray.errors import VerifierError
from eagle3_ray.model.tensor_file import read_tensor, read_tensor_names
from eagle3_ray.model.verifier_name import absolute_name, to_folder
from eagle3_ray.storage import ObjectPath, StoragePath

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NEEDED_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip
# What these change between the last hidden state and the logits is not modelled here: training against
# the wrong target shows no error, so they are refused.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping", "output_logit_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
# Families whose final norm multiplies by 1 + w (some scale the embedding too), by how their model_type begins.
OTHER_NORMS = (
    "gemma", "vaultgemma", "recurrent_gemma", "t5gemma", "qwen3_next", "qwen3_5", "qwen4_exp", "minimax_m3", "step3p",
    "muse_glimmer",
)  # fmt: skip


@dataclass(frozen=True)
class VerifierInfo:
    """The verifier's text configuration, as far as a draft inherits it.

    Attributes:
        name_or_path: Hub id, URL, or the absolute path of a local folder (servers start elsewhere).
        architectures: Class names of its config.json, for the draft's own config.
        text_config: The (text part of the) config.json as a mapping.
    """

    name_or_path: str
    architectures: tuple[str, ...]
    text_config: Mapping[str, Any]

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.text_config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        """W."""
        return int(self.text_config["vocab_size"])

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.text_config["num_hidden_layers"])

    @property
    def rms_norm_eps(self) -> float:
        """Epsilon of the final norm, which the draft's norms share."""
        return float(self.text_config["rms_norm_eps"])

    def default_aux_layer_ids(self) -> tuple[int, ...]:
        """Return serving's own choice, `[2, n//2, n-3]`.

        Raises:
            VerifierError: The verifier is too small for three distinct layers.
        """
        num_layers = self.num_layers
        ids = (2, num_layers // 2, num_layers - 3)
        if list(ids) != sorted(set(ids)) or min(ids) < 0:
            raise VerifierError(
                f"{self.name_or_path}: has {num_layers} layers; the default auxiliary layers {list(ids)} are distinct "
                "only from 7 layers on. Name them with --aux-layer-ids."
            )
        return ids

    def check_aux_layer_ids(self, ids: tuple[int, ...]) -> None:
        """Check auxiliary layer ids in serving numbering (id k is what enters layer k).

        Raises:
            VerifierError: The ids do not rise (engines collect each once, in that order), or lie outside 0..num_layers.
        """
        if list(ids) != sorted(set(ids)):
            raise VerifierError(
                f"auxiliary layers {list(ids)}: must rise, none twice; engines collect each once, in rising order."
            )
        outside = [i for i in ids if not 0 <= i <= self.num_layers]
        if outside or not ids:
            raise VerifierError(
                f"auxiliary layers {list(ids)}: {outside or 'none given'}; "
                f"ids of {self.name_or_path} go from 0 to {self.num_layers}."
            )


@dataclass(frozen=True)
class VerifierTensors:
    """The three tensors read from the verifier's safetensors, in the file's dtype, on the CPU.

    Attributes:
        embed_tokens: [W, H] token embedding.
        lm_head: [W, H]; the embedding itself when the verifier ties them.
        final_norm: [H] weight of the norm before lm_head.
    """

    embed_tokens: Tensor
    lm_head: Tensor
    final_norm: Tensor


def read_verifier_config(name_or_path: str) -> VerifierInfo:
    """Read config.json of a folder, local or on an object store, or of a hub repository.

    Raises:
        StorageError: The object store cannot be read.
        VerifierError: No config can be read, a needed field is absent, or the verifier changes its logits in a
            way the target distribution here does not follow (soft-capping, scaling, Gemma's norm).
    """
    path = _resolve_file(name_or_path, "config.json")
    if path is None:
        raise VerifierError(f"{name_or_path}: no config.json. Name a transformers folder or a hub id.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifierError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise VerifierError(f"{path}: holds a {type(config).__name__}, expected the object of a transformers config.")
    try:
        text_config = _fill_in_defaults(config.get("text_config", config))
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise VerifierError(f"{path}: not a config that transformers accepts ({error}).") from error
    if "tie_word_embeddings" in config:
        text_config["tie_word_embeddings"] = config["tie_word_embeddings"]
    problems = [f"no {key}" for key in NEEDED_FIELDS if key not in text_config]
    model_type = str(text_config.get("model_type", ""))
    if model_type.startswith(OTHER_NORMS):
        problems.append(f"model_type {model_type}: its family's norms (1 + w) and embeddings are not supported")
    for key in LOGIT_TRANSFORMS:
        if text_config.get(key) not in (None, 1, 1.0):
            problems.append(f"{key}={text_config[key]} changes the logits and is not supported")
    if problems:
        raise VerifierError(f"{path}: {'; '.join(problems)}.")
    return VerifierInfo(
        name_or_path=absolute_name(name_or_path),
        architectures=tuple(config.get("architectures") or ()),
        text_config=text_config,
    )


def _fill_in_defaults(text_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as transformers completes it: files leave out what equals their class's default."""
    from transformers import CONFIG_MAPPING  # here: workers read tensors alone, and it takes seconds to import

    model_type = str(text_config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return dict(text_config)
    completed: dict[str, Any] = CONFIG_MAPPING[model_type](**text_config).to_dict()
    return completed


def load_verifier_tensors(info: VerifierInfo) -> VerifierTensors:
    """Read embedding, head and final norm, and nothing else, from single-file or sharded safetensors.

    Raises:
        VerifierError: A tensor is absent (never replaced by ones), ambiguous, or of another shape than the config says.
    """
    file_of_tensor = _read_tensor_names(info.name_or_path)
    embed_name, norm_name, head_name = _find_tensor_names(info, file_of_tensor)
    tensors = {name: _read_tensor(info, file_of_tensor[name], name) for name in {embed_name, norm_name, head_name}}
    loaded = VerifierTensors(tensors[embed_name], tensors[head_name], tensors[norm_name])
    matrix, vector = (info.vocab_size, info.hidden_size), (info.hidden_size,)
    expected = {embed_name: matrix, head_name: matrix, norm_name: vector}
    wrong = [
        f"{n} is {list(tensors[n].shape)}, the config says {list(s)}"
        for n, s in expected.items()
        if tensors[n].shape != s
    ]
    if wrong:
        raise VerifierError(f"{info.name_or_path}: {'; '.join(wrong)}.")
    return loaded


def load_final_norm(info: VerifierInfo) -> Tensor:
    """Read the final norm alone, [H]; fails as `load_verifier_tensors` does if any of the three is absent."""
    file_of_tensor = _read_tensor_names(info.name_or_path)
    _, norm_name, _ = _find_tensor_names(info, file_of_tensor)
    return _read_tensor(info, file_of_tensor[norm_name], norm_name)


def _find_tensor_names(info: VerifierInfo, names: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the names of embedding, final norm and head; multimodal folders put a prefix before each."""
    embeds = [n for n in names if n.endswith("embed_tokens.weight") and "visual" not in n and "vision" not in n]
    if len(embeds) != 1:
        raise VerifierError(f"{info.name_or_path}: expected one embed_tokens.weight, found {embeds or 'none'}.")
    embed_name = embeds[0]
    norm_name = embed_name.removesuffix("embed_tokens.weight") + "norm.weight"
    problems = [] if norm_name in names else [f"no final norm ({norm_name})"]
    if info.text_config.get("tie_word_embeddings", False):
        head_name = embed_name
    else:
        heads = [n for n in names if n == "lm_head.weight" or n.endswith(".lm_head.weight")]
        head_name = heads[0] if len(heads) == 1 else ""
        if not head_name:
            problems.append(
                f"no lm_head.weight (found {heads or 'none'}), and the config does not tie it to the embedding"
            )
    if problems:
        raise VerifierError(
            f"{info.name_or_path}: {'; '.join(problems)}. The folder must hold the verifier's full weights."
        )
    return embed_name, norm_name, head_name


def _read_tensor_names(name_or_path: str) -> dict[str, str]:
    """Map each tensor's name to the file that holds it."""
    index_path = _resolve_file(name_or_path, INDEX_FILE)
    if index_path is not None:
        try:
            return dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise VerifierError(f"{index_path}: no usable weight_map ({error!r}).") from error
    path = _resolve_file(name_or_path, SINGLE_FILE)
    if path is None:
        raise VerifierError(
            f"{name_or_path}: neither {SINGLE_FILE} nor {INDEX_FILE}. Store the verifier as safetensors."
        )
    try:
        return dict.fromkeys(read_tensor_names(path), SINGLE_FILE)
    except (SafetensorError, OSError) as error:
        raise VerifierError(f"{path}: not a readable safetensors file ({error}).") from error


def _read_tensor(info: VerifierInfo, file_name: str, tensor_name: str) -> Tensor:
    path = _resolve_file(info.name_or_path, file_name)
    if path is None:
        raise VerifierError(f"{info.name_or_path}: {file_name}, which should hold {tensor_name}, is missing.")
    try:
        tensor = read_tensor(path, tensor_name)
    except (SafetensorError, OSError) as error:
        raise VerifierError(f"{path}: cannot read {tensor_name} ({error}).") from error
    if not torch.is_floating_point(tensor) or tensor.element_size() < 2:
        raise VerifierError(
            f"{path}: {tensor_name} is {tensor.dtype}; quantised heads and embeddings are not supported."
        )
    return tensor


def _resolve_file(name_or_path: str, file_name: str) -> StoragePath | None:
    """Return the path of one file of the verifier, downloaded from the hub if need be; None if it has none."""
    folder = to_folder(name_or_path)
    if isinstance(folder, ObjectPath):
        return folder / file_name if (folder / file_name).is_file() else None
    if folder.is_dir():
        return folder / file_name if (folder / file_name).is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, file_name))
    except LocalEntryNotFoundError as error:
        # Without the hub, a file that the repository never had looks like one that was never fetched.
        if file_name == INDEX_FILE and isinstance(try_to_load_from_cache(name_or_path, SINGLE_FILE), str):
            return None
        raise VerifierError(
            f"{name_or_path}: not a folder here, and the hub cannot be reached for {file_name}."
        ) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError) as error:
        raise VerifierError(
            f"{name_or_path}: neither a folder here nor a hub repository that can be read ({error})."
        ) from error
