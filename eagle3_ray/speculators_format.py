"""The Speculators folder that vLLM loads, as a check: config.json, tensor names, shapes, dtypes, d2t and t2d.

A draft that can say all of the verifier's tokens may be without d2t and t2d.

The check knows the format from its definition, not from the code that writes it. It refuses config keys it
does not know, because an unknown key may change what a server computes.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ray.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MAPPING = ("d2t", "t2d")
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    """A part of config.json: exact types, no unknown key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProposalSection(_Section):
    """How a server proposes tokens; `speculative_tokens` is P."""

    proposal_type: Literal["greedy"]
    speculative_tokens: PositiveInt
    verifier_accept_k: Literal[1]
    accept_tolerance: float


class VerifierSection(_Section):
    """The verifier: a hub id or an absolute path, and its class names."""

    name_or_path: str = Field(min_length=1)
    architectures: tuple[str, ...]


class SpeculatorsSection(_Section):
    """What makes the folder a speculator."""

    algorithm: Literal["eagle3"]
    default_proposal_method: Literal["greedy"]
    proposal_methods: tuple[ProposalSection, ...] = Field(min_length=1)
    verifier: VerifierSection


class RopeSection(_Section):
    """RoPE of the layers; scaling kinds add keys of their own."""

    model_config = ConfigDict(extra="allow")

    rope_type: str
    rope_theta: float = Field(gt=0)


class LayerSection(_Section):
    """The decoder layers' configuration; transformers adds keys that matter to no server."""

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["llama", "qwen3"]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    hidden_act: str
    max_position_embeddings: PositiveInt
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: RopeSection
    vocab_size: PositiveInt
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class SpeculatorsConfig(_Section):
    """config.json of a draft; the last four keys may be absent."""

    architectures: tuple[Literal["Eagle3DraftModel"]]
    speculators_model_type: Literal["eagle3"]
    speculators_version: str
    draft_vocab_size: PositiveInt
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    embed_requires_grad: bool
    eagle_aux_hidden_state_layer_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    tie_word_embeddings: Literal[False]
    transformer_layer_config: LayerSection
    speculators_config: SpeculatorsSection
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    target_hidden_size: None = None
    auto_map: dict[str, Any] | None = None
    transformers_version: str | None = None


def check_speculators_folder(path: Path) -> SpeculatorsConfig:
    """Check that a folder holds exactly what a server needs of a draft, and return its configuration.

    Other files and folders beside config.json and model.safetensors are not looked at.

    Raises:
        CheckpointError: Names everything that is missing, unknown, of another shape or dtype, or does not fit.
    """
    try:
        config = SpeculatorsConfig.model_validate_json((path / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise _not_servable(path, [f"{CONFIG_FILE}: cannot be read ({error.strerror})"]) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']}" for detail in error.errors()]
        raise _not_servable(path, [f"{CONFIG_FILE}: {problem}" for problem in problems]) from error
    try:
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}
            problems = _find_config_problems(config) + _find_tensor_problems(config, found)
            if not problems and "d2t" in found:
                problems = _find_mapping_problems(file.get_tensor("d2t"), file.get_tensor("t2d"))
    except (SafetensorError, OSError) as error:
        raise _not_servable(path, [f"{WEIGHTS_FILE}: cannot be read ({error})"]) from error
    if problems:
        raise _not_servable(path, problems)
    return config


def expected_shapes(config: SpeculatorsConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape for a configuration; d2t and t2d too where they may be absent."""
    layer = config.transformer_layer_config
    hidden, num_aux = layer.hidden_size, len(config.eagle_aux_hidden_state_layer_ids)
    vocab, draft_vocab = layer.vocab_size, config.draft_vocab_size
    query, key = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "d2t": (draft_vocab,),
        "t2d": (vocab,),
        "embed_tokens.weight": (vocab, hidden),
        "fc.weight": (hidden, num_aux * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
        "layers.0.hidden_norm.weight": (hidden,),
    }
    for number in range(layer.num_hidden_layers):
        # Layer 0 reads the embedding and the hidden state side by side.
        width = 2 * hidden if number == 0 else hidden
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (layer.intermediate_size, hidden),
            "mlp.up_proj": (layer.intermediate_size, hidden),
            "mlp.down_proj": (hidden, layer.intermediate_size),
        }
        if layer.model_type == "qwen3":
            of_layer |= {"self_attn.q_norm": (layer.head_dim,), "self_attn.k_norm": (layer.head_dim,)}
        shapes |= {f"layers.{number}.{name}.weight": shape for name, shape in of_layer.items()}
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (num_aux * hidden,)
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(num_aux)}
    return shapes


def _find_config_problems(config: SpeculatorsConfig) -> list[str]:
    layer, ids = config.transformer_layer_config, config.eagle_aux_hidden_state_layer_ids
    problems = []
    if len(set(ids)) < len(ids):
        problems.append(f"eagle_aux_hidden_state_layer_ids {list(ids)} repeats an id, which engines collect once")
    if config.norm_before_fc and config.fc_norm:
        problems.append("norm_before_fc and fc_norm exclude each other")
    if config.draft_vocab_size > layer.vocab_size:
        problems.append(f"draft_vocab_size {config.draft_vocab_size} exceeds vocab_size {layer.vocab_size}")
    if layer.layer_types is not None and len(layer.layer_types) != layer.num_hidden_layers:
        problems.append(f"layer_types names {len(layer.layer_types)} layers of {layer.num_hidden_layers}")
    if "sliding_attention" in (layer.layer_types or ()):
        if layer.sliding_window is None:
            problems.append("layer_types has sliding_attention, but there is no sliding_window")
        if layer.model_type == "qwen3" and not layer.use_sliding_window:
            problems.append("layer_types has sliding_attention, but use_sliding_window is not true")
    if layer.num_attention_heads % layer.num_key_value_heads:
        problems.append(f"{layer.num_attention_heads} heads do not share {layer.num_key_value_heads} key-value heads")
    return [f"{CONFIG_FILE}: {problem}" for problem in problems]


def _find_tensor_problems(config: SpeculatorsConfig, found: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """Compare names, shapes and safetensors dtypes with what the configuration asks for."""
    shapes = expected_shapes(config)
    if config.draft_vocab_size == config.transformer_layer_config.vocab_size and not found.keys() & MAPPING:
        shapes = {name: shape for name, shape in shapes.items() if name not in MAPPING}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - found.keys())]
    problems += [f"{name} is not part of this draft" for name in sorted(found.keys() - shapes.keys())]
    both = sorted(shapes.keys() & found.keys())
    for name in both:
        if found[name][0] != shapes[name]:
            problems.append(f"{name} has shape {list(found[name][0])}, expected {list(shapes[name])}")
    dtypes = {"d2t": "I64", "t2d": "BOOL"}
    # Without a dtype in the config, the weights must agree among themselves.
    of_weights = SAFETENSORS_DTYPES[config.dtype] if config.dtype else found.get("fc.weight", ((), "BF16"))[1]
    for name in both:
        if found[name][1] != dtypes.get(name, of_weights):
            problems.append(f"{name} has dtype {found[name][1]}, expected {dtypes.get(name, of_weights)}")
    return [f"{WEIGHTS_FILE}: {problem}" for problem in problems]


def _find_mapping_problems(d2t: Tensor, t2d: Tensor) -> list[str]:
    """Check that d2t [V] (offsets) and t2d [W] (mask) name the same verifier ids."""
    kept_ids = d2t + torch.arange(len(d2t))
    if not torch.equal(kept_ids, torch.nonzero(t2d).flatten()):
        return [
            f"{WEIGHTS_FILE}: d2t and t2d do not fit: i + d2t[i] must run through the {int(t2d.sum())} ids that t2d "
            f"keeps of {len(t2d)}, ascending; it gives {len(kept_ids)} ids from {kept_ids.min()} to {kept_ids.max()}"
        ]
    return []


def _not_servable(path: Path, problems: list[str]) -> CheckpointError:
    listed = "\n  ".join(problems)
    return CheckpointError(f"{path}: not a draft that a server can load:\n  {listed}\nUse another checkpoint.")
