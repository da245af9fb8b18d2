"""The one shift, against the recorded bin and against a loop over positions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.data.batch import PackedBin, allocate_bin, pack_samples
from eagle3_ray.data.samples import Sample, read_sample
from eagle3_ray.errors import DataError
from tests.makers import HIDDEN_SIZE, NUM_AUX_LAYERS, make_spec, write_sample

torch.set_num_threads(1)

TENSORS = ("input_ids", "aux_states", "last_state", "loss_mask", "document_ids", "position_ids")


def _samples(tmp_path: Path, lengths: list[int], version: int = 1, **changes: object) -> list[Sample]:
    spec = make_spec(version)
    return [
        read_sample(str(write_sample(tmp_path / f"{i}.pt", length, version, seed=i, **changes)), spec)
        for i, length in enumerate(lengths)
    ]


def _pack_by_hand(samples: list[Sample], total_seq_len: int) -> PackedBin:
    """Position by position, in the words of the definition: index i holds x[i+1], g[i], y[i+1], l[i+1]."""
    packed = allocate_bin(total_seq_len, make_spec())
    for name in TENSORS:
        getattr(packed, name)[:] = -1 if name == "document_ids" else 0
    t = 0
    for document, sample in enumerate(samples):
        for i in range(len(sample.input_ids) - 1):
            if t < total_seq_len:
                packed.input_ids[t] = sample.input_ids[i + 1]
                packed.aux_states[t] = torch.cat([state[i] for state in sample.aux_states])
                packed.last_state[t] = sample.last_state[i + 1]
                packed.loss_mask[t] = sample.loss_mask[i + 1]
                packed.document_ids[t] = document
                packed.position_ids[t] = i + 1
                t += 1
    packed.num_tokens = t
    return packed


def _assert_same(packed: PackedBin, expected: PackedBin) -> None:
    for name in TENSORS:
        found, wanted = getattr(packed, name), getattr(expected, name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    assert packed.num_tokens == expected.num_tokens


def test_recorded_bin_is_reproduced_exactly(parity: Path) -> None:
    spec = make_spec(hidden_size=64, vocab_size=320, final_norm_weight=None)
    samples = [read_sample(str(parity / "v1" / f"data_{number}.pt"), spec) for number in range(3)]
    packed = pack_samples(samples, 256, spec, number=4, row=9)
    recorded = {name: tensor[0] for name, tensor in load_file(parity / "packed_batch.safetensors").items()}
    assert torch.equal(packed.aux_states.float(), recorded.pop("hidden_states"))
    assert torch.equal(packed.last_state.float(), recorded.pop("verifier_last_hidden_states"))
    assert set(recorded) == {"input_ids", "loss_mask", "document_ids", "position_ids"}
    for name, tensor in recorded.items():
        assert torch.equal(getattr(packed, name), tensor), name
    assert (packed.number, packed.row, packed.num_tokens) == (4, 9, 69 + 100 + 45)
    assert packed.aux_states.dtype == torch.bfloat16


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    "lengths", [[20], [2, 2, 2], [17, 1, 9], [33], [32, 2], [50]], ids=lambda lengths: "-".join(map(str, lengths))
)
def test_bin_equals_the_definition_position_by_position(tmp_path: Path, version: int, lengths: list[int]) -> None:
    samples = _samples(tmp_path, lengths, version)
    _assert_same(pack_samples(samples, 32, make_spec(version)), _pack_by_hand(samples, 32))


def test_used_buffers_keep_nothing_of_what_was_in_them(tmp_path: Path) -> None:
    samples = _samples(tmp_path, [20, 9, 12])
    out = allocate_bin(32, make_spec())
    for chosen in ([0, 2], [1], [0], [], [1, 2]):
        some = [samples[number] for number in chosen]
        packed = pack_samples(some, 32, make_spec(), number=chosen[0] if chosen else -1, row=3, out=out)
        _assert_same(packed, _pack_by_hand(some, 32))
        for name in TENSORS:
            assert getattr(packed, name).data_ptr() == getattr(out, name).data_ptr(), name


def test_filler_has_no_position_and_no_supervision() -> None:
    packed = pack_samples([], 16, make_spec())
    assert (packed.number, packed.num_tokens) == (-1, 0)
    assert not packed.loss_mask.any() and bool((packed.document_ids == -1).all())
    assert packed.aux_states.shape == (16, NUM_AUX_LAYERS * HIDDEN_SIZE)


def test_sample_longer_than_the_bin_is_cut_at_its_end(tmp_path: Path) -> None:
    (sample,) = _samples(tmp_path, [60])
    packed = pack_samples([sample], 32, make_spec())
    assert packed.num_tokens == 32
    assert torch.equal(packed.input_ids, sample.input_ids[1:33])
    assert packed.position_ids.tolist() == list(range(1, 33))


def test_files_of_different_dtypes_are_held_without_loss(tmp_path: Path) -> None:
    (half,) = _samples(tmp_path / "half", [10])
    (full,) = _samples(tmp_path / "full", [10], dtype=torch.float32)
    out = allocate_bin(32, make_spec())
    packed = pack_samples([half, full], 32, make_spec(), out=out)
    assert packed.last_state.dtype == torch.float32
    assert torch.equal(packed.last_state[:9], half.last_state[1:].float())
    assert torch.equal(packed.last_state[9:18], full.last_state[1:])
    assert pack_samples([half], 32, make_spec(), out=packed).last_state.dtype == torch.bfloat16


def test_more_samples_than_fit_are_refused(tmp_path: Path) -> None:
    samples = _samples(tmp_path, [20, 20])
    with pytest.raises(
        DataError, match=r"bin 3: its samples have 38 positions, the plan gave them at most 32\. A file"
    ):
        pack_samples(samples, 32, make_spec(), number=3)
