"""The draft's shape, inherited from the verifier, and its config.json in the Speculators format that vLLM reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eagle3_ray.errors import CheckpointError, VerifierError

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from eagle3_ray.config import ModelSettings
    from eagle3_ray.model.verifier import VerifierInfo

# The release of the Speculators format these files follow.
SPECULATORS_VERSION = "0.9.0"
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
    """A decoder layer as transformers' `LlamaConfig` describes it.

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
    written: Mapping[str, Any]

    @classmethod
    def from_llama(cls, llama: "LlamaConfig") -> "LayerConfig":
        """Take over what `LlamaConfig` has completed and checked."""
        assert llama.head_dim is not None and llama.num_key_value_heads is not None  # LlamaConfig fills them in
        frequencies, scale = _rope_of(llama)
        return cls(
            vocab_size=llama.vocab_size,
            hidden_size=llama.hidden_size,
            intermediate_size=llama.intermediate_size,
            num_hidden_layers=llama.num_hidden_layers,
            num_attention_heads=llama.num_attention_heads,
            num_key_value_heads=llama.num_key_value_heads,
            head_dim=llama.head_dim,
            rms_norm_eps=llama.rms_norm_eps,
            initializer_range=llama.initializer_range,
            rope_frequencies=tuple(frequencies.tolist()),
            rope_scale=scale,
            written={name: value for name, value in llama.to_dict().items() if name not in NOT_OF_THE_LAYER},
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
            "embed_requires_grad": False,
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
    from transformers import LlamaConfig

    text = info.text_config
    num_heads = int(text["num_attention_heads"])
    llama = LlamaConfig(
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        intermediate_size=int(text["intermediate_size"]),
        num_hidden_layers=settings.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=int(text.get("head_dim") or info.hidden_size // num_heads),
        hidden_act="silu",
        max_position_embeddings=int(text.get("max_position_embeddings", 2048)),
        initializer_range=float(text.get("initializer_range", 0.02)),
        rms_norm_eps=info.rms_norm_eps,
        rope_parameters=_inherit_rope(info),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=text.get("bos_token_id"),
        eos_token_id=text.get("eos_token_id"),
    )
    return DraftConfig(
        layer=LayerConfig.from_llama(llama),
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=aux_layer_ids,
        speculative_tokens=settings.ttt_steps,
        norm_before_residual=settings.norm_before_residual,
        norm_before_fc=settings.norm_before_fc,
        fc_norm=settings.fc_norm,
        norm_output=settings.norm_output,
        verifier_name_or_path=info.name_or_path,
        verifier_architectures=info.architectures,
    )


def draft_config_from_speculators(config: Mapping[str, Any]) -> DraftConfig:
    """Read a Speculators config.json back.

    Raises:
        CheckpointError: A field is missing, or the draft is of a kind not trained here.
    """
    from transformers import LlamaConfig

    try:
        layer, speculators = config["transformer_layer_config"], config["speculators_config"]
        if config["speculators_model_type"] != "eagle3" or layer["model_type"] != "llama":
            raise CheckpointError(
                f"config.json: {config['speculators_model_type']} draft with {layer['model_type']} layers; "
                "expected eagle3 with llama."
            )
        return DraftConfig(
            layer=LayerConfig.from_llama(LlamaConfig(**layer)),
            draft_vocab_size=config["draft_vocab_size"],
            aux_layer_ids=tuple(config["eagle_aux_hidden_state_layer_ids"]),
            speculative_tokens=speculators["proposal_methods"][0]["speculative_tokens"],
            norm_before_residual=config["norm_before_residual"],
            norm_before_fc=config["norm_before_fc"],
            fc_norm=config["fc_norm"],
            norm_output=config["norm_output"],
            verifier_name_or_path=speculators["verifier"]["name_or_path"],
            verifier_architectures=tuple(speculators["verifier"]["architectures"]),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: no {error}; not a Speculators EAGLE-3 draft.") from error


def _rope_of(llama: "LlamaConfig") -> tuple[Tensor, float]:
    """Return RoPE's frequencies [D/2] and its factor of cos and sin, as transformers computes them for each type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(llama.rope_parameters or {})
    if rope["rope_type"] == "default":
        assert llama.head_dim is not None  # LlamaConfig fills it in
        exponent = torch.arange(0, llama.head_dim, 2, dtype=torch.float32) / llama.head_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](llama, torch.device("cpu"))
    return frequencies, scale


def _inherit_rope(info: "VerifierInfo") -> dict[str, Any]:
    """Return RoPE in transformers 5's one form, from either of the two that config files use."""
    text = info.text_config
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise VerifierError(
            f"{info.name_or_path}: RoPE differs by layer type ({sorted(rope)}), which is not supported."
        )
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise VerifierError(f"{info.name_or_path}: config.json names no rope_theta; a draft must share the verifier's.")
    if text.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise VerifierError(f"{info.name_or_path}: partial rotary embeddings are not supported.")
    return {**rope, "rope_theta": float(theta)}
