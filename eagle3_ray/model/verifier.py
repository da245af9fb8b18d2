"""What a draft takes from its verifier: the configuration and three tensors, read without loading the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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
PICKLED_FILE = "pytorch_model.bin"  # of a draft; a verifier's is not read
NEEDED_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip
# What these change between the last hidden state and the logits is not modelled here: training against
# the wrong target shows no error, so they are refused, unless their value changes nothing.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
LOGIT_CAPS = ("final_logit_softcapping", "output_logit_soft_cap")
# Families by their text config's model_type whose final norm multiplies by 1 + w, and whose logits may be capped:
# cap * tanh(logits / cap). They scale the embedding by sqrt(H) too, outside its weight: servers hand a draft the
# weight, and so does training; the draft's input_layernorm would undo a scale.
ONE_PLUS_WEIGHT = ("gemma", "gemma2", "gemma3_text")
# Others whose norms or embeddings differ in ways that are not modelled, by how their model_type begins.
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

    @property
    def logit_cap(self) -> float | None:
        """The bound c that logits are pressed under, c * tanh(logits / c); None if they are not."""
        cap = self.text_config.get("final_logit_softcapping")
        return None if cap is None else float(cap)

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
    """The three tensors of the verifier's safetensors, in the file's dtype, on the CPU.

    Attributes:
        embed_tokens: [W, H] token embedding.
        lm_head: [W, H]; the embedding itself when the verifier ties them.
        final_norm: [H] what the norm before lm_head multiplies by; float32 where the file holds that minus 1.
    """

    embed_tokens: Tensor
    lm_head: Tensor
    final_norm: Tensor


def read_verifier_config(name_or_path: str) -> VerifierInfo:
    """Read config.json of a folder, local or on an object store, or of a hub repository.

    Raises:
        StorageError: The object store cannot be read.
        VerifierError: No config can be read, a needed field is absent, or the verifier changes its logits in a
            way the target distribution here does not follow.
    """
    path = resolve_file(name_or_path, "config.json")
    if path is None:
        raise VerifierError(f"{name_or_path}: no config.json. Name a transformers folder or a hub id.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifierError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(config, dict):
        raise VerifierError(f"{path}: holds a {type(config).__name__}, expected the object of a transformers config.")
    try:
        text_config = _read_text_config(config)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise VerifierError(f"{path}: not a config that transformers accepts ({error}).") from error
    problems = [f"no {key}" for key in NEEDED_FIELDS if key not in text_config]
    problems += _find_unmodelled(text_config)
    if problems:
        raise VerifierError(f"{path}: {'; '.join(problems)}.")
    return VerifierInfo(
        name_or_path=absolute_name(name_or_path),
        architectures=tuple(config.get("architectures") or ()),
        text_config=text_config,
    )


def _read_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's own part of a config, which multimodal ones nest, or once did not.

    Its `tie_word_embeddings` is None where the class ties by default and the file does not say: then a head that is
    stored counts, and without one the embedding.
    """
    completed = _fill_in_defaults(config)
    if "text_config" not in completed:
        text_config = completed
    elif completed["text_config"] is config.get("text_config"):  # of an outer class unknown to transformers
        text_config = _fill_in_defaults(config["text_config"])
    else:
        text_config = dict(completed["text_config"])
    if "tie_word_embeddings" in completed:
        ties = completed["tie_word_embeddings"]
        text_config["tie_word_embeddings"] = None if ties and "tie_word_embeddings" not in config else ties
    return text_config


def _fill_in_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as transformers completes it: files leave out what equals their class's default."""
    from transformers import CONFIG_MAPPING  # here: workers read tensors alone, and it takes seconds to import

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return dict(config)
    completed: dict[str, Any] = CONFIG_MAPPING[model_type](**config).to_dict()
    return completed


def _find_unmodelled(text_config: Mapping[str, Any]) -> list[str]:
    """Return what changes the logits in a way the target distribution here does not follow."""
    model_type = str(text_config.get("model_type", ""))
    is_modelled = model_type in ONE_PLUS_WEIGHT
    problems = []
    if model_type.startswith(OTHER_NORMS) and not is_modelled:
        problems.append(f"model_type {model_type}: its family's norms (1 + w) and embeddings are not supported")
    changes = [key for key in LOGIT_SCALES if text_config.get(key) not in (None, 1, 1.0)]
    changes += [key for key in LOGIT_CAPS if text_config.get(key) is not None and not is_modelled]
    return problems + [f"{key}={text_config[key]} changes the logits and is not supported" for key in changes]


def load_verifier_tensors(info: VerifierInfo) -> VerifierTensors:
    """Read embedding, head and final norm, and nothing else, from single-file or sharded safetensors.

    Raises:
        VerifierError: A tensor is absent (never replaced by ones), ambiguous, or of another shape than the config says.
    """
    file_of_tensor = _read_tensor_names(info.name_or_path)
    embed_name, norm_name, head_name = _find_tensor_names(info, file_of_tensor)
    tensors = {name: _read_tensor(info, file_of_tensor[name], name) for name in {embed_name, norm_name, head_name}}
    loaded = VerifierTensors(tensors[embed_name], tensors[head_name], _norm_factor(info, tensors[norm_name]))
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
    """Read what the final norm multiplies by, [H]; fails as `load_verifier_tensors` if any of the three is absent."""
    file_of_tensor = _read_tensor_names(info.name_or_path)
    _, norm_name, _ = _find_tensor_names(info, file_of_tensor)
    return _norm_factor(info, _read_tensor(info, file_of_tensor[norm_name], norm_name))


def has_tied_head(info: VerifierInfo) -> bool:
    """Whether the embedding serves as head; fails as `load_final_norm` does."""
    embed_name, _, head_name = _find_tensor_names(info, _read_tensor_names(info.name_or_path))
    return embed_name == head_name


def _norm_factor(info: VerifierInfo, stored: Tensor) -> Tensor:
    """Return what the final norm multiplies by, of the weight [H] that is stored."""
    # In float32, as the family computes it: 1 + w would round in bf16.
    return 1.0 + stored.float() if info.text_config.get("model_type") in ONE_PLUS_WEIGHT else stored


def _find_tensor_names(info: VerifierInfo, names: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the names of embedding, final norm and head; multimodal folders put a prefix before each."""
    embeds = [n for n in names if n.endswith("embed_tokens.weight") and "visual" not in n and "vision" not in n]
    if len(embeds) != 1:
        raise VerifierError(f"{info.name_or_path}: expected one embed_tokens.weight, found {embeds or 'none'}.")
    embed_name = embeds[0]
    norm_name = embed_name.removesuffix("embed_tokens.weight") + "norm.weight"
    problems = [] if norm_name in names else [f"no final norm ({norm_name})"]
    ties = info.text_config.get("tie_word_embeddings", False)
    heads = [n for n in names if n == "lm_head.weight" or n.endswith(".lm_head.weight")]
    if ties or (ties is None and not heads):
        head_name = embed_name
    else:
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
    file_of_tensor = read_shard_index(name_or_path)
    if file_of_tensor is not None:
        return file_of_tensor
    path = resolve_file(name_or_path, SINGLE_FILE)
    if path is None:
        raise VerifierError(
            f"{name_or_path}: neither {SINGLE_FILE} nor {INDEX_FILE}. Store the verifier as safetensors."
        )
    try:
        return dict.fromkeys(read_tensor_names(path), SINGLE_FILE)
    except (SafetensorError, OSError) as error:
        raise VerifierError(f"{path}: not a readable safetensors file ({error}).") from error


def read_shard_index(name_or_path: str) -> dict[str, str] | None:
    """Return the file of each tensor by the index of a sharded verifier; None if it has no index.

    Raises:
        VerifierError: The index cannot be used, or names a file outside the verifier's folder.
    """
    path = resolve_file(name_or_path, INDEX_FILE)
    if path is None:
        return None
    try:
        file_of_tensor = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise VerifierError(f"{path}: no usable weight_map ({error!r}).") from error
    for tensor_name, file_name in file_of_tensor.items():
        if not _is_inside(file_name):
            raise VerifierError(
                f"{path}: says that {tensor_name} is in {file_name!r}; expected the name of a file in that folder. "
                "Do not use a verifier whose index reaches elsewhere."
            )
    return file_of_tensor


def _is_inside(file_name: Any) -> bool:
    """Whether a name from a file that was downloaded stays in its folder."""
    if not isinstance(file_name, str) or not file_name or "\\" in file_name:
        return False
    path = PurePosixPath(file_name)
    return not path.is_absolute() and ".." not in path.parts


def _read_tensor(info: VerifierInfo, file_name: str, tensor_name: str) -> Tensor:
    path = resolve_file(info.name_or_path, file_name)
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


def resolve_file(name_or_path: str, file_name: str) -> StoragePath | None:
    """Return the path of one file of a verifier or a draft, downloaded from the hub if need be; None if it has none.

    Raises:
        StorageError: The object store cannot be read.
        VerifierError: No folder here, and no hub repository that can be read.
    """
    folder = to_folder(name_or_path)
    if isinstance(folder, ObjectPath):
        return folder / file_name if (folder / file_name).is_file() else None
    if folder.is_dir():
        return folder / file_name if (folder / file_name).is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, file_name))
    except LocalEntryNotFoundError as error:
        # Without the hub, a file that the repository never had looks like one that was never fetched.
        others = {INDEX_FILE, SINGLE_FILE, PICKLED_FILE} - {file_name}
        is_weights = len(others) == 2
        if is_weights and any(isinstance(try_to_load_from_cache(name_or_path, other), str) for other in others):
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
