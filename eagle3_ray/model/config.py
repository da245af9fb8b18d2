"""The draft's shape, inherited from the verifier, and its config.json in the Speculators format that vLLM reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eagle3_ray.errors import CheckpointError, VerifierError

if TYPE_CHECKING:
    from transformers import LlamaConfig, Qwen3Config

    from eagle3_ray.config import ModelSettings
    from eagle3_ray.model.verifier import VerifierInfo

# The release of the Speculators format these files follow.
SPECULATORS_VERSION = "0.9.0"
LAYER_TYPES = ("llama", "qwen3")
SLIDING = "sliding_attention"
# What transformers adds to every config, of no meaning for a decoder layer.
NOT_OF_THE_LAYER = (
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


@dataclass(frozen=True)
class LayerConfig:
    """A decoder layer as transformers' `LlamaConfig` or `Qwen3Config` describes it.

    transformers itself takes seconds to import, which every worker would spend.

    Attributes:
        vocab_size: W, of the verifier.
        hidden_size: H.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Decoder layers of the draft.
        num_attention_heads: Q.
        num_key_value_heads: G.
        head_dim: D.
        rms_norm_eps: Epsilon of all norms.
        initializer_range: Standard deviation of initial weights that the verifier does not give.
        rope_frequencies: [D/2] radians a position, float32 values.
        rope_scale: Factor of RoPE's cos and sin.
        has_qk_norms: Queries and keys are normed head by head, before RoPE (Qwen3).
        sliding_window: A query sees so many positions, its own included; None: all before it.
        written: All of it as config.json holds it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    initializer_range: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float
    has_qk_norms: bool
    sliding_window: int | None
    written: Mapping[str, Any]

    @classmethod
    def from_transformers(cls, config: "LlamaConfig | Qwen3Config") -> "LayerConfig":
        """Take over what transformers has completed and checked.

        Raises:
            CheckpointError: Some layers have a sliding window and some have none, or its size is not told.
        """
        assert config.head_dim is not None and config.num_key_value_heads is not None  # transformers fills them in
        frequencies, scale = _rope_of(config)
        written = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_THE_LAYER}
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            rope_frequencies=tuple(frequencies.tolist()),
            rope_scale=scale,
            has_qk_norms=written["model_type"] == "qwen3",
            sliding_window=_window_of(written),
            written=written,
        )


@dataclass(frozen=True)
class DraftConfig:
    """Everything that fixes the draft's tensors and what they compute.

    Attributes:
        layer: Sizes, RoPE and epsilon of the decoder layers; `layer.vocab_size` is the verifier's W and
            `layer.num_hidden_layers` the draft's own count.
        draft_vocab_size: V.
        aux_layer_ids: Serving numbering: id k is the state that enters layer k.
        speculative_tokens: Drafted tokens a server should propose; the TTT steps trained.
        embed_requires_grad: The embedding is trained, and no longer the verifier's.
        freeze_lm_head: The head is not trained; config.json does not tell.
    """

    layer: LayerConfig
    draft_vocab_size: int
    aux_layer_ids: tuple[int, ...]
    speculative_tokens: int
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    verifier_name_or_path: str
    verifier_architectures: tuple[str, ...]
    embed_requires_grad: bool = False
    freeze_lm_head: bool = False

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.layer.hidden_size

    @property
    def num_aux_layers(self) -> int:
        """A."""
        return len(self.aux_layer_ids)

    def to_speculators(self) -> dict[str, Any]:
        """Return config.json as Speculators 0.9 writes it (FACTS 6)."""
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": self.speculative_tokens,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": SPECULATORS_VERSION,
            "dtype": "bfloat16",
            "draft_vocab_size": self.draft_vocab_size,
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "embed_requires_grad": self.embed_requires_grad,
            "eagle_aux_hidden_state_layer_ids": list(self.aux_layer_ids),
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            "transformer_layer_config": dict(self.layer.written),
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {
                    "name_or_path": self.verifier_name_or_path,
                    "architectures": list(self.verifier_architectures),
                },
            },
        }


def build_draft_config(
    info: "VerifierInfo", settings: "ModelSettings", draft_vocab_size: int, aux_layer_ids: tuple[int, ...]
) -> DraftConfig:
    """Derive the draft's shape: head counts, widths, RoPE and epsilon come from the verifier.

    Raises:
        VerifierError: The verifier's RoPE is described in a way a Llama layer cannot follow.
    """
    text = info.text_config
    num_heads = int(text["num_attention_heads"])
    num_layers, window = settings.num_layers, settings.sliding_window
    own: dict[str, Any] = {} if window is None else {"sliding_window": window, "layer_types": [SLIDING] * num_layers}
    own |= {"mlp_bias": False} if settings.layer_type == "llama" else {"use_sliding_window": window is not None}
    layer = layer_class(settings.layer_type)(
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        intermediate_size=int(text["intermediate_size"]),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=int(text.get("head_dim") or info.hidden_size // num_heads),
        hidden_act="silu",
        max_position_embeddings=int(text.get("max_position_embeddings", 2048)),
        initializer_range=float(text.get("initializer_range", 0.02)),
        rms_norm_eps=info.rms_norm_eps,
        rope_parameters=_inherit_rope(info),
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=text.get("bos_token_id"),
        eos_token_id=text.get("eos_token_id"),
        **own,
    )
    return DraftConfig(
        layer=LayerConfig.from_transformers(layer),
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=aux_layer_ids,
        speculative_tokens=settings.ttt_steps,
        norm_before_residual=settings.norm_before_residual,
        norm_before_fc=settings.norm_before_fc,
        fc_norm=settings.fc_norm,
        norm_output=settings.norm_output,
        verifier_name_or_path=info.name_or_path,
        verifier_architectures=info.architectures,
        embed_requires_grad=settings.train_embedding,
        freeze_lm_head=settings.freeze_lm_head,
    )


def draft_config_from_speculators(config: Mapping[str, Any]) -> DraftConfig:
    """Read a Speculators config.json back.

    Raises:
        CheckpointError: A field is missing, or the draft is of a kind not trained here.
    """
    try:
        layer, speculators = config["transformer_layer_config"], config["speculators_config"]
        if config["speculators_model_type"] != "eagle3" or layer["model_type"] not in LAYER_TYPES:
            raise CheckpointError(
                f"config.json: {config['speculators_model_type']} draft with {layer['model_type']} layers; "
                f"expected eagle3 with {' or '.join(LAYER_TYPES)}."
            )
        return DraftConfig(
            layer=LayerConfig.from_transformers(layer_class(layer["model_type"])(**layer)),
            draft_vocab_size=config["draft_vocab_size"],
            aux_layer_ids=tuple(config["eagle_aux_hidden_state_layer_ids"]),
            speculative_tokens=speculators["proposal_methods"][0]["speculative_tokens"],
            norm_before_residual=config["norm_before_residual"],
            norm_before_fc=config["norm_before_fc"],
            fc_norm=config["fc_norm"],
            norm_output=config["norm_output"],
            verifier_name_or_path=speculators["verifier"]["name_or_path"],
            verifier_architectures=tuple(speculators["verifier"]["architectures"]),
            embed_requires_grad=config["embed_requires_grad"],
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: no {error}; not a Speculators EAGLE-3 draft.") from error


def layer_class(layer_type: str) -> "type[LlamaConfig | Qwen3Config]":
    """Return transformers' config of a type of layers."""
    from transformers import LlamaConfig, Qwen3Config

    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer_type]


def _window_of(written: Mapping[str, Any]) -> int | None:
    """Return the sliding window as serving engines find it: by the type of each layer."""
    layer_types = written.get("layer_types") or []
    if SLIDING not in layer_types:
        return None
    if set(layer_types) != {SLIDING}:
        raise CheckpointError("config.json: some layers have a sliding window and some have none; expected one kind.")
    if written.get("sliding_window") is None:  # or not in use, by which transformers drops it
        raise CheckpointError(
            "config.json: layer_types has sliding_attention without a sliding_window that is in use; expected its size "
            "and, of qwen3 layers, use_sliding_window true."
        )
    return int(written["sliding_window"])


def _rope_of(config: "LlamaConfig | Qwen3Config") -> tuple[Tensor, float]:
    """Return RoPE's frequencies [D/2] and its factor of cos and sin, as transformers computes them for each type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(config.rope_parameters or {})
    if rope["rope_type"] == "default":
        assert config.head_dim is not None  # transformers fills it in
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies, scale


def _inherit_rope(info: "VerifierInfo") -> dict[str, Any]:
    """Return RoPE in transformers 5's one form, from either of the two that config files use."""
    text = info.text_config
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "full_attention" in rope:  # by layer type: all layers of a draft share one, under a window too
        rope = dict(rope["full_attention"])
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise VerifierError(
            f"{info.name_or_path}: RoPE differs by layer type ({sorted(rope)}), which is not supported."
        )
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    if rope["rope_type"] == "mrope":  # of text alone, whose three positions are one
        rope["rope_type"] = "default"
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise VerifierError(f"{info.name_or_path}: config.json names no rope_theta; a draft must share the verifier's.")
    if text.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise VerifierError(f"{info.name_or_path}: partial rotary embeddings are not supported.")
    return {**rope, "rope_theta": float(theta)}
