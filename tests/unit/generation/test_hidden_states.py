"""States of padded batches against plain forward passes of transformers, one sample at a time."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from eagle3_ray.errors import ClusterError, VerifierError
from eagle3_ray.generation.hidden_states import CapturingVerifier, load_verifier, plan_batches
from eagle3_ray.model.verifier import read_verifier_config
from tests.unit.generation.world import VOCAB_SIZE, make_model, write_verifier

LAYERS = (5, 0, 2)  # order is kept as it is given
NAMES = [f"c.jsonl:{number}" for number in range(1, 9)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_samples(lengths: tuple[int, ...] = (3, 17, 1, 40, 17)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def reference_states(model: LlamaForCausalLM, input_ids: Tensor, layers: tuple[int, ...] = LAYERS) -> list[Tensor]:
    """States of one sample from plain forward passes; the last one with the final norm taken out of the model."""
    hidden_states = model.model(input_ids[None], output_hidden_states=True).hidden_states
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    last_state = model.model(input_ids[None]).last_hidden_state
    model.model.norm = norm
    return [*(hidden_states[layer][0] for layer in layers), last_state[0]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def capture(model: LlamaForCausalLM, layers: tuple[int, ...] = LAYERS) -> CapturingVerifier:
    return CapturingVerifier("tiny", model.model, layers, model.config.num_hidden_layers)


# fp32 is stored as bf16: half a unit in its last place, 2**-9, is the most that can differ, plus ties that rounding
# noise tips over. In bf16, other kernel shapes round other intermediate sums: a few units, added up over 7 layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-8), (torch.bfloat16, 2e-2)])
def test_states_in_a_padded_batch_are_those_of_plain_forward_passes_alone(dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(dtype=dtype)
    samples = make_samples()
    expected = [reference_states(model, sample) for sample in samples]
    found = capture(model).compute_states(NAMES, samples)
    for sample, states, reference in zip(samples, found, expected, strict=True):
        assert len(states) == len(LAYERS) + 1
        for state, other in zip(states, reference, strict=True):
            assert state.shape == (len(sample), 32) and state.dtype == torch.bfloat16
            assert relative_error(state, other) < tolerance


def test_padding_changes_no_state_of_an_fp32_verifier_beyond_fp32_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle3_ray.generation.hidden_states.STORED_DTYPE", torch.float32)
    verifier = capture(make_model())
    samples = make_samples()
    together = verifier.compute_states(NAMES, samples)
    for sample, states in zip(samples, together, strict=True):
        [alone] = verifier.compute_states(NAMES, [sample])
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(states, alone, strict=True))


def test_padding_changes_no_state_of_a_bf16_verifier_beyond_bf16_rounding() -> None:
    verifier = capture(make_model(dtype=torch.bfloat16))
    samples = make_samples()
    together = verifier.compute_states(NAMES, samples)
    for sample, states in zip(samples, together, strict=True):
        [alone] = verifier.compute_states(NAMES, [sample])
        # As above: sums of other shapes round differently, each by 2**-9, over 7 layers.
        assert all(relative_error(a, b) < 2e-2 for a, b in zip(states, alone, strict=True))


def test_layer_id_numbers_what_enters_that_layer() -> None:
    model = make_model()
    [sample] = make_samples((9,))
    entered: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: entered.__setitem__(number, args[0].detach()))
    model.model.norm.register_forward_pre_hook(lambda _, args: entered.__setitem__(7, args[0].detach()))
    verifier = capture(model, (0, 1, 6, 7))
    [states] = verifier.compute_states(NAMES, [sample])
    for layer_id, state in zip((0, 1, 6, 7, 7), states, strict=True):
        assert torch.equal(state, entered[layer_id][0].bfloat16())
    assert torch.equal(states[0], model.model.embed_tokens(sample).bfloat16())


@torch.no_grad()
def test_head_on_the_normed_last_state_gives_the_verifiers_logits() -> None:
    model = make_model(dtype=torch.bfloat16)
    [sample] = make_samples((30,))
    [states] = capture(model).compute_states(NAMES, [sample])
    assert torch.equal(model.lm_head(model.model.norm(states[-1])), model(sample[None]).logits[0])


def test_recorded_samples_come_out_again(parity: Path) -> None:
    info = read_verifier_config(str(parity / "verifier"))
    verifier = load_verifier(info, (2, 4, 5), "cpu", torch.bfloat16, trust_remote_code=False)
    recorded = [torch.load(parity / "v1" / f"data_{number}.pt", weights_only=True) for number in range(3)]
    found = verifier.compute_states(NAMES, [sample["input_ids"] for sample in recorded])
    for states, sample in zip(found, recorded, strict=True):
        # Recorded in bf16, one sample at a time: other batch shapes round some sums by a unit of 2**-9.
        assert [relative_error(a, b) < 1e-2 for a, b in zip(states, sample["hidden_states"], strict=True)] == [True] * 4


def test_each_state_has_a_storage_of_its_own() -> None:
    found = capture(make_model()).compute_states(NAMES, make_samples())
    for states in found:
        for state in states:
            assert state.is_contiguous()
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_batches_hold_every_sample_once_within_the_padded_bound_longest_first() -> None:
    num_tokens = np.random.default_rng(0).integers(1, 300, 500)
    num_tokens[17] = 5000  # longer than a batch: alone
    batches = plan_batches(num_tokens, 2048)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    padded = [len(batch) * num_tokens[batch].max() for batch in batches]
    assert [batch.tolist() for batch in batches if len(batch) * num_tokens[batch].max() > 2048] == [[17]]
    assert sum(padded) < 1.05 * num_tokens.sum()
    assert all(num_tokens[a].min() >= num_tokens[b].max() for a, b in itertools.pairwise(batches))


def test_nan_is_refused_with_its_sample_layer_and_token() -> None:
    model = make_model()
    samples = make_samples()
    only_in_last = next(i for i in samples[3].tolist() if all(i not in s.tolist() for s in samples[:3] + samples[4:]))
    model.model.embed_tokens.weight.data[only_in_last] = float("nan")
    token = samples[3].tolist().index(only_in_last)
    with pytest.raises(VerifierError, match=f"c.jsonl:4: tiny computes NaN or Inf in state 5 at token {token}."):
        capture(model).compute_states(NAMES, samples)


def test_batch_too_big_for_the_device_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = capture(make_model())

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(verifier, "_decoder", type("Full", (torch.nn.Linear,), {"forward": run_out})(1, 1))
    with pytest.raises(ClusterError, match=r"2 x 40 tokens does not fit into the memory of cpu. Lower --batch-tokens"):
        verifier.compute_states(NAMES, make_samples((40, 9)))


def test_verifier_without_layers_or_final_norm_is_refused() -> None:
    model = make_model()
    del model.model.norm
    with pytest.raises(VerifierError, match="tiny: no final norm in LlamaModel"):
        capture(model)
    model = make_model()
    with pytest.raises(VerifierError, match="its config says 9 layers"):
        CapturingVerifier("tiny", model.model, LAYERS, 9)


def test_norm_that_does_not_make_the_last_hidden_state_is_refused() -> None:
    model = make_model()

    def scale(module: torch.nn.Module, args: object, output: BaseModelOutputWithPast) -> None:
        assert output.last_hidden_state is not None
        output["last_hidden_state"] = output.last_hidden_state * 2

    model.model.register_forward_hook(scale)
    with pytest.raises(VerifierError, match="its final norm does not give last_hidden_state"):
        capture(model)


def test_layers_that_run_in_another_order_than_listed_are_refused() -> None:
    model = make_model()
    listed = model.model.layers
    model.model.layers = torch.nn.ModuleList([listed[1], listed[0], *listed[2:]])
    verifier_layers = torch.nn.ModuleList(list(listed))

    class Reordered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.norm, self.inner = verifier_layers, model.model.norm, model.model

        def forward(self, **inputs: object) -> object:
            return self.inner(**inputs)

    with pytest.raises(VerifierError, match=r"the states entering layers \[0, 1\] are not transformers' hidden_states"):
        CapturingVerifier("tiny", Reordered(), (0, 1, 2), 7)


def test_a_shard_index_that_reaches_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_verifier(tmp_path / "verifier")
    (tmp_path / "verifier" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weight_map = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "verifier" / "model.safetensors.index.json").write_text(json.dumps(index))
    info = read_verifier_config(str(tmp_path / "verifier"))
    with pytest.raises(VerifierError, match=r"is in '\.\./elsewhere.safetensors'; expected the name of a file in that"):
        load_verifier(info, LAYERS, "cpu", torch.float32, trust_remote_code=False)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    write_verifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"], weights["lm_head.weight"]  # the head is not needed
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifierError, match=r"1 tensors of the verifier .* files: model.layers.3.mlp.up_proj.weight\."):
        load_verifier(read_verifier_config(str(tmp_path)), LAYERS, "cpu", torch.float32, trust_remote_code=False)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    write_verifier(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VerifierError, match="transformers cannot load the verifier"):
        load_verifier(read_verifier_config(str(tmp_path)), LAYERS, "cpu", torch.float32, trust_remote_code=False)
