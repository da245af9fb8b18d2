"""One file: what is read, and what is refused in which words."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.data.samples import (
    NotASample,
    Sample,
    check_finite,
    inspect_sample,
    inspect_tokens,
    is_normed,
    read_sample,
)
from eagle3_ray.errors import DataError, SampleFormatError
from tests.makers import (
    BAD_FILES,
    HIDDEN_SIZE,
    make_content,
    make_norm_weight,
    make_spec,
    normed,
    saved_bytes,
    write_bad_file,
    write_sample,
)

torch.set_num_threads(1)


def _error_of(path: Path, **changes: Any) -> SampleFormatError:
    with pytest.raises(SampleFormatError) as info:
        read_sample(str(path), make_spec(**changes))
    return info.value


# ------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("version", [0, 1])
def test_both_formats_give_what_their_file_holds(tmp_path: Path, version: int) -> None:
    content = make_content(21, version)
    sample = read_sample(str(write_sample(tmp_path / "a.pt", 21, version)), make_spec(version))
    assert torch.equal(sample.input_ids, content["input_ids"])
    assert torch.equal(sample.loss_mask, content["loss_mask"].bool())
    expected_aux = torch.cat(content["hidden_states"][:3], dim=1) if version == 1 else content["hidden_state"]
    assert torch.equal(torch.cat(sample.aux_states, dim=1), expected_aux)
    assert torch.equal(sample.last_state, content["hidden_states"][3] if version == 1 else content["target"])
    assert sample.last_state.dtype == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are read from /proc")
def test_states_stay_on_disk(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "a.pt")
    sample = read_sample(str(path), make_spec())
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for state in (*sample.aux_states, sample.last_state):
        assert any(start <= state.data_ptr() < end for start, end in ranges)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_masks_of_any_whole_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    content = make_content()
    expected = content["loss_mask"].bool()
    torch.save(content | {"loss_mask": content["loss_mask"].to(dtype)}, tmp_path / "a.pt")
    assert torch.equal(read_sample(str(tmp_path / "a.pt"), make_spec()).loss_mask, expected)


@pytest.mark.parametrize("version", [0, 1])
def test_recorded_samples_of_both_formats_are_accepted(parity: Path, version: int) -> None:
    weight = load_file(parity / "verifier" / "model.safetensors")["model.norm.weight"].float()
    spec = make_spec(version, hidden_size=64, vocab_size=320, final_norm_weight=weight)
    for number in range(3):
        sample = read_sample(str(parity / f"v{version}" / f"data_{number}.pt"), spec)
        check_finite(sample)
        assert is_normed(sample.last_state, weight) == (version == 0)


# ------------------------------------------------------------------------------------- normed or not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_a_state_is_called_normed_exactly_after_the_norm(dtype: torch.dtype, outlier: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.rand(64, generator=generator) + 0.1).to(dtype).float()
    state = 2 * torch.randn(100, 64, generator=generator)
    state[:, 5] *= outlier  # verifiers have channels much larger than all others
    state = state.to(dtype)
    assert not is_normed(state, weight)
    assert is_normed(normed(state, weight), weight)


def test_normed_state_in_v1_is_refused(tmp_path: Path) -> None:
    error = _error_of(write_bad_file(tmp_path / "a.pt", "normed"))
    assert "a.pt: hidden_states[3] has already been through the verifier's final norm" in str(error)
    assert "at all 16 tokens looked at" in str(error)
    assert "a v1 sample holds it before that norm. Regenerate the file" in str(error)


def test_unnormed_state_in_v0_is_refused(tmp_path: Path) -> None:
    content = make_content(data_format_version=0)
    content["target"] = make_content()["hidden_states"][3]
    torch.save(content, tmp_path / "a.pt")
    error = _error_of(tmp_path / "a.pt", data_format_version=0)
    assert "a.pt: target has not been through this verifier's final norm" in str(error)
    assert "a v0 sample holds it after that norm. Use the verifier the file was made with" in str(error)


def test_one_token_does_not_convict_a_v1_sample(tmp_path: Path) -> None:
    content = make_content(num_tokens=1)
    content["hidden_states"][3] = normed(content["hidden_states"][3], make_norm_weight())
    torch.save(content, tmp_path / "a.pt")
    assert len(read_sample(str(tmp_path / "a.pt"), make_spec()).input_ids) == 1


@pytest.mark.parametrize("weight", [None, torch.zeros(HIDDEN_SIZE)])
def test_normedness_is_left_open_where_it_cannot_be_told(tmp_path: Path, weight: torch.Tensor | None) -> None:
    path = write_bad_file(tmp_path / "a.pt", "normed")
    read_sample(str(path), make_spec(final_norm_weight=weight))


# ------------------------------------------------------------------------------------- bad files

EXPECTED_TEXTS = {
    "empty": "is empty (0 bytes), expected a sample. Regenerate the file or move it away.",
    "cut_short": "is cut short or damaged (",
    "text": 'is not a file that torch.save writes (it begins with b"{\'in"), expected its zip form. Save it again',
    "legacy_torch": "is not a file that torch.save writes",
    "pickle": "is not a file that torch.save writes",
    "python_objects": "holds Python objects other than tensors, which are never loaded; expected a dict of tensors.",
    "list": "holds a list, expected a v1 sample {hidden_states, input_ids, loss_mask}.",
    "other_keys": "lacks hidden_states, loss_mask: has the keys {input_ids}, expected a v1 sample",
    "v0_sample": "is a v0 sample {hidden_state, input_ids, loss_mask, target}, expected a v1 sample "
    "{hidden_states, input_ids, loss_mask}. Pass --data-format-version 0, or regenerate the file.",
    "specforge": "is a SpecForge sample, whose hidden_state is the last state,",
    "stacked_states": "hidden_states is torch.bfloat16 [4, 20, 16], expected a list of 4 tensors [S, 16].",
    "too_few_layers": "hidden_states holds 3 tensors, expected 4: 3 auxiliary layers and the last hidden state. "
    "Give --aux-layer-ids as the file was made",
    "other_hidden_size": "hidden_states[3]: width 24, expected 16 (the verifier's hidden size is 16). "
    "Use the verifier the file was made with, or regenerate it.",
    "shorter_mask": "loss_mask has 19 tokens, input_ids has 20; all tensors of a sample must have one length. "
    "Regenerate the file or move it away.",
    "shorter_state": "hidden_states[2] has 19 tokens, input_ids has 20; all tensors of a sample must have one length.",
    "batched_ids": "input_ids is torch.int64 [1, 20], expected whole numbers [S] with S >= 1.",
    "float_ids": "input_ids is torch.float32 [20], expected whole numbers [S] with S >= 1.",
    "no_token": "input_ids is torch.int64 [0], expected whole numbers [S] with S >= 1.",
    "id_too_large": "input_ids go from 50 to 50, the verifier's vocabulary is 0..49.",
    "negative_id": "input_ids go from -1 to -1, the verifier's vocabulary is 0..49.",
    "mask_of_twos": "loss_mask goes from 2 to 2, expected 0 and 1.",
    "nan": "hidden_states[3] has NaN or Inf at token 0; all states must be finite.",
    "normed": "hidden_states[3] has already been through the verifier's final norm",
    "token_freq": "is a token-frequency file (dict of int to int), expected a v1 sample",
}


def test_every_kind_of_bad_file_has_its_text() -> None:
    assert set(EXPECTED_TEXTS) == set(BAD_FILES)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused_in_these_words_and_the_error_pickles(tmp_path: Path, kind: str) -> None:
    path = write_bad_file(tmp_path / "bad.pt", kind)
    error = _error_of(path)
    assert str(error).startswith(f"{path}: ")
    assert EXPECTED_TEXTS[kind] in str(error)
    assert type(error) is (NotASample if kind == "token_freq" else SampleFormatError)
    assert isinstance(error, DataError) and error.exit_code == 3
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)


def test_v1_sample_where_v0_was_asked_for_names_the_flag(tmp_path: Path) -> None:
    error = _error_of(write_sample(tmp_path / "a.pt"), data_format_version=0)
    assert "is a v1 sample" in str(error)
    assert "Pass --data-format-version 1, or regenerate the file." in str(error)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    content = make_content(hidden_size=24)
    content["loss_mask"] = content["loss_mask"][:-1]
    content["input_ids"][4] = 99
    torch.save(content, tmp_path / "a.pt")
    text = str(_error_of(tmp_path / "a.pt"))
    assert text.splitlines()[0] == f"{tmp_path / 'a.pt'}: 3 problems:"
    assert "  - loss_mask has 19 tokens, input_ids has 20" in text
    assert "to 99, the verifier's vocabulary is 0..49." in text
    assert "width 24, expected 16" in text
    assert text.count("Use the verifier the file was made with") == 1


def test_missing_file_says_what_a_cluster_needs(tmp_path: Path) -> None:
    text = str(_error_of(tmp_path / "gone.pt"))
    assert "gone.pt: cannot be opened (No such file or directory), expected a sample." in text
    assert "every node must see the data at the same path" in text


def test_wrong_width_of_v0_states_is_told_with_the_expected_one(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "a.pt", data_format_version=0, num_aux_layers=1)
    text = str(_error_of(path, data_format_version=0))
    assert "hidden_state: width 16, expected 48" in text


@pytest.mark.filterwarnings("ignore")
def test_randomly_damaged_files_end_in_a_sample_error_or_are_whole_samples(tmp_path: Path) -> None:
    whole = saved_bytes(make_content())
    rng = random.Random(0)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 50])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.pt").write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        num_refused += isinstance(inspect_sample(str(tmp_path / "a.pt"), make_spec()), list)
    assert num_refused > 50


# ------------------------------------------------------------------------------------- finite states


@pytest.mark.parametrize(("version", "name"), [(1, "auxiliary state 1"), (0, "auxiliary state 0")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, version: int, name: str, value: float
) -> None:
    content = make_content(40, version)
    state = content["hidden_states"][1] if version == 1 else content["hidden_state"]
    state[7, 3] = value
    state[30, 0] = float("nan")
    torch.save(content, tmp_path / "a.pt")
    sample = read_sample(str(tmp_path / "a.pt"), make_spec(version))
    with pytest.raises(SampleFormatError) as info:
        check_finite(sample)
    assert f"a.pt: {name} has NaN or Inf at 2 of 40 tokens, first at token 7; all states must be finite." in str(
        info.value
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_place_hides_a_value_that_is_not_finite(dtype: torch.dtype) -> None:
    # 3 x 43 values: full vectors and a tail, in whatever width the reduction works.
    largest = torch.finfo(dtype).max
    for place in range(3 * 43):
        for value in (float("nan"), float("inf"), float("-inf"), largest, -largest):
            state = torch.full((3, 43), largest, dtype=dtype)
            state.view(-1)[place] = value
            sample = Sample("a.pt", torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), (), state)
            if abs(value) == largest:
                check_finite(sample)
            else:
                with pytest.raises(SampleFormatError, match=f"the last hidden state .* first at token {place // 43};"):
                    check_finite(sample)


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("version", [0, 1])
def test_tokens_are_read_without_knowing_the_hidden_size(tmp_path: Path, version: int) -> None:
    content = make_content(data_format_version=version)
    tokens = inspect_tokens(str(write_sample(tmp_path / "a.pt", data_format_version=version)), version, 50)
    assert isinstance(tokens, tuple)
    assert torch.equal(tokens[0], content["input_ids"]) and torch.equal(tokens[1], content["loss_mask"].bool())


def test_token_problems_are_found_when_counting_too(tmp_path: Path) -> None:
    problems = inspect_tokens(str(write_bad_file(tmp_path / "a.pt", "id_too_large")), 1, 50)
    assert isinstance(problems, list) and problems[0].kind == "ids outside the vocabulary"
