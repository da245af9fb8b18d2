"""The unroll against a dense oracle: every index computed in every step, one mask of T x (P*T), every logit held."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.config import DraftConfig, LayerConfig
from eagle3_ray.model.draft import DraftInputs, Eagle3Draft, look_up
from eagle3_ray.model.layer import LayerPass, RotaryTable, rotate
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.step import cast_states

HIDDEN, VOCAB, DRAFT_VOCAB, STEPS, AUX = 16, 40, 24, 3, 3
LENGTHS, PADDING = (7, 1, 9, 4), 5
ROPE = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}


def make_config(
    num_layers: int = 1, layer_type: str = "llama", sliding_window: int | None = None, **options: bool
) -> DraftConfig:
    window = {"sliding_window": sliding_window, "layer_types": ["sliding_attention"] * num_layers}
    if layer_type == "qwen3":
        window["use_sliding_window"] = True
    layer = {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer_type](
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={**ROPE, "original_max_position_embeddings": 256},
        **({} if sliding_window is None else window),
    )
    flags = {"norm_before_residual": True, "norm_before_fc": False, "fc_norm": False, "norm_output": False} | options
    return DraftConfig(
        LayerConfig.from_transformers(layer),
        DRAFT_VOCAB,
        (2, 4, 5),
        STEPS,
        **flags,
        verifier_name_or_path="",
        verifier_architectures=(),
    )


def make_draft(config: DraftConfig) -> Eagle3Draft:
    torch.manual_seed(0)
    draft = Eagle3Draft(config).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return draft


def make_bin() -> PackedBin:
    generator = torch.Generator().manual_seed(5)
    num_tokens = sum(LENGTHS)
    size = num_tokens + PADDING
    documents = [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    positions = list(itertools.chain.from_iterable(range(1, length + 1) for length in LENGTHS))
    return PackedBin(
        number=0,
        row=0,
        num_tokens=num_tokens,
        input_ids=torch.randint(VOCAB, (size,), generator=generator),
        aux_states=torch.randn(size, AUX * HIDDEN, generator=generator, dtype=torch.float64),
        last_state=torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64),
        loss_mask=torch.rand(size, generator=generator) < 0.5,
        document_ids=torch.tensor([*documents, *[-1] * PADDING]),
        position_ids=torch.tensor([*positions, *[0] * PADDING]),
    )


def dense_states(draft: Eagle3Draft, packed: PackedBin) -> list[Tensor]:
    """Normed hidden state [T, H] of every index in every step, by one big masked softmax a layer."""
    num_tokens = packed.num_tokens
    document = packed.document_ids[:num_tokens]
    index = torch.arange(num_tokens)
    distance = index[:, None] - index[None, :]
    causal = (distance >= 0) & (document[:, None] == document[None, :])
    window = draft.config.layer.sliding_window or num_tokens + STEPS
    hidden = draft.combine_aux_states(packed.aux_states[:num_tokens])
    keys: list[list[Tensor]] = [[] for _ in draft.decoder_layers]
    values: list[list[Tensor]] = [[] for _ in draft.decoder_layers]
    states: list[Tensor] = []
    for step in range(STEPS):
        if step and draft.config.norm_output:
            hidden = states[-1]
        embeds = draft.embed_tokens(packed.input_ids[(index + step).clamp(max=num_tokens - 1)])
        rotation = draft.rotary(packed.position_ids[:num_tokens] + step, hidden.dtype)
        in_window = distance + step < window  # a query of this step stands `step` positions further on
        mask = torch.cat([causal & in_window, *[torch.eye(num_tokens, dtype=torch.bool)] * step], dim=1)
        for number, layer in enumerate(draft.decoder_layers):
            x, residual = layer.prepare(hidden)
            if number == 0:
                x = torch.cat((layer.input_layernorm(embeds), x), dim=-1)
            attention = layer.self_attn
            keys[number].append(rotate(attention.k_norm(attention.k_proj(x).unflatten(-1, (2, 8))), rotation))
            values[number].append(attention.v_proj(x).unflatten(-1, (2, 8)))
            queries = rotate(attention.q_norm(attention.q_proj(x).unflatten(-1, (4, 8))), rotation)
            all_keys = torch.cat(keys[number]).repeat_interleave(2, 1)
            all_values = torch.cat(values[number]).repeat_interleave(2, 1)
            scores = torch.einsum("rhd,khd->hrk", queries, all_keys) / 8**0.5
            probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            hidden = layer.finish(torch.einsum("hrk,khd->rhd", probs, all_values), residual)
        states.append(draft.norm(hidden))
    return states


def dense_loss(draft: Eagle3Draft, packed: PackedBin, head: TargetHead, weights: Tensor) -> Tensor:
    """The loss, index by index and step by step."""
    target = (head.project(packed.last_state) @ head.weight.T).log_softmax(-1)
    terms = []
    for step, states in enumerate(dense_states(draft, packed)):
        logp = draft.lm_head(states).log_softmax(-1)
        for i in range(packed.num_tokens - step):
            if packed.loss_mask[i + step] and packed.document_ids[i] == packed.document_ids[i + step]:
                terms.append(weights[step] * (target[i + step].exp() * (target[i + step] - logp[i])).sum())
    return torch.stack(terms).sum()


def inputs_of(packed: PackedBin, draft: Eagle3Draft) -> DraftInputs:
    layer = draft.config.layer
    ready = make_ready(packed, STEPS, layer.num_hidden_layers, torch.device("cpu"), layer.sliding_window)
    return cast_states(ready.inputs, torch.float64)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": False},
    {"norm_before_fc": True, "norm_output": True},
    {"fc_norm": True, "norm_output": True},
    {"layer_type": "qwen3"},
    {"sliding_window": 3},
    {"layer_type": "qwen3", "sliding_window": 5, "norm_before_residual": False},
]


TRAINED = [{"embed_requires_grad": True}, {"embed_requires_grad": True, "freeze_lm_head": True, "norm_output": True}]


@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps", "recomputes"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("options", [*OPTIONS, *TRAINED], ids=lambda options: "+".join(options) or "default")
def test_loss_and_every_gradient_equal_the_dense_oracle(
    num_layers: int, options: dict[str, Any], recomputes: bool
) -> None:
    draft, packed = make_draft(make_config(num_layers, **options)), make_bin()
    draft.recomputes_layers = recomputes
    generator = torch.Generator().manual_seed(9)
    head = TargetHead(
        torch.randn(DRAFT_VOCAB, HIDDEN, generator=generator, dtype=torch.float64),
        torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64),
        1e-5,
    )
    weights = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    assert ("embed_tokens.weight" in trained) == options.get("embed_requires_grad", False)
    found = draft(inputs_of(packed, draft), head, weights).loss
    expected = dense_loss(draft, packed, head, weights)
    # RoPE angles are float32 on both sides; everything else is float64.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found_grads = torch.autograd.grad(found, list(trained.values()))
    expected_grads = torch.autograd.grad(expected, list(trained.values()))
    for name, found_grad, expected_grad in zip(trained, found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-8, atol=1e-10, msg=name)


def test_gradients_of_a_frequent_token_are_added_up_in_more_than_bf16() -> None:
    embedding = torch.zeros(3, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([1] * 1000 + [2])
    look_up(embedding, ids).backward(torch.full((len(ids), HIDDEN), 0.01, dtype=torch.bfloat16))
    assert embedding.grad is not None
    expected = torch.tensor([0.0, 10.0, 0.01], dtype=torch.bfloat16)
    torch.testing.assert_close(embedding.grad[:, 0], expected, rtol=1e-2, atol=0)  # bf16 has 8 bits


@pytest.mark.parametrize("options", [{}, *TRAINED], ids=lambda options: "+".join(options) or "default")
def test_an_empty_bin_gives_every_parameter_a_zero_gradient(options: dict[str, Any]) -> None:
    """Ranks without samples must take part in every reduction."""
    draft, packed = make_draft(make_config(2, **options)), make_bin()
    empty = PackedBin(
        -1, 0, 0, packed.input_ids * 0, packed.aux_states * 0, packed.last_state * 0,
        packed.loss_mask & False, packed.document_ids * 0 - 1, packed.position_ids * 0,
    )  # fmt: skip
    head = TargetHead(draft.lm_head.weight.detach().clone(), None, 1e-5)
    loss, sums = draft(inputs_of(empty, draft), head, torch.ones(STEPS))
    loss.backward()
    assert loss.item() == 0 and not sums.any()
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 123.0}, ROPE | {"original_max_position_embeddings": 64}]
)
def test_rotary_angles_equal_transformers(rope: dict[str, float]) -> None:
    llama = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters=rope)
    positions = torch.tensor([0, 1, 17, 300])
    expected = LlamaRotaryEmbedding(llama)(torch.zeros(1, dtype=torch.float32), positions[None])
    for found, wanted in zip(
        RotaryTable(LayerConfig.from_transformers(llama))(positions, torch.float32), expected, strict=True
    ):
        assert torch.equal(found[:, 0], wanted[0])


def test_rotation_keeps_relative_positions_alone() -> None:
    table = RotaryTable(make_config().layer)
    q, k = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(2)).unbind(0)

    def score(i: int, j: int) -> Tensor:
        cos_i, cos_j = table(torch.tensor([i]), torch.float32), table(torch.tensor([j]), torch.float32)
        return (rotate(q, cos_i) * rotate(k, cos_j)).sum(-1)

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)  # float32 angles


@pytest.mark.parametrize(("layer_type", "window"), [("llama", None), ("qwen3", None), ("qwen3", 3)])
def test_a_layer_behind_the_first_is_that_of_transformers(layer_type: str, window: int | None) -> None:
    config = make_config(2, layer_type=layer_type, sliding_window=window)
    layer, length = make_draft(config).decoder_layers[1], 9
    written = dict(config.layer.written)
    own = {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer_type](**written, attn_implementation="eager")
    theirs = {"llama": LlamaDecoderLayer, "qwen3": Qwen3DecoderLayer}[layer_type](own, 1).double()
    theirs.load_state_dict(layer.state_dict())
    packed = replace(
        make_bin(),
        num_tokens=length,
        loss_mask=torch.ones(sum(LENGTHS) + PADDING, dtype=torch.bool),
        document_ids=torch.zeros(sum(LENGTHS) + PADDING, dtype=torch.int64),
    )
    ready = make_ready(packed, 1, 2, torch.device("cpu"), window)
    hidden = torch.randn(length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = RotaryTable(config.layer)(torch.arange(1, length + 1), torch.float64)
    found = LayerPass(layer, ready.inputs.layout, is_last=True).first_step(
        hidden, rotation, ready.inputs.attend_rows[0]
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    is_visible = (distance >= 0) & (distance < (window or length))
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(~is_visible, -torch.inf)
    angles = [part.squeeze(1)[None] for part in rotation]
    expected = theirs(hidden[None], attention_mask=mask[None, None], position_embeddings=angles)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)  # their norms and softmax are float32
