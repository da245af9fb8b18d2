"""The draft's vocabulary: the choice against a sort in the test, the files against everything that may not fit."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ray.data import vocab as vocab_module
from eagle3_ray.data.vocab import (
    choose_vocab,
    full_vocab,
    read_mapping,
    read_token_freq,
    write_mapping,
    write_token_freq,
)
from eagle3_ray.errors import DataError, VocabMappingError
from eagle3_ray.storage import write_atomically

torch.set_num_threads(1)

COUNTS = np.array([0, 9, 1, 7, 0, 7], dtype=np.int64)


def _error_of(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(VocabMappingError) as info:
        call(*arguments)
    again = pickle.loads(pickle.dumps(info.value))
    assert isinstance(again, DataError) and again.exit_code == 3 and str(again) == str(info.value)
    return str(info.value)


# ------------------------------------------------------------------------------------- the choice


def test_mapping_of_the_docstring() -> None:
    mapping = choose_vocab(COUNTS, 3)
    assert mapping.kept_ids.tolist() == [1, 3, 5]
    assert mapping.draft_to_verifier_offset.tolist() == [1, 2, 3]
    assert mapping.in_draft_vocab.tolist() == [False, True, False, True, False, True]
    assert mapping.draft_to_verifier_offset.dtype == torch.int64 and mapping.in_draft_vocab.dtype == torch.bool


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_most_frequent_ids_are_kept_ties_to_the_smaller_then_the_smallest_unused(
    counts: list[int], data: st.DataObject
) -> None:
    draft_vocab_size = data.draw(st.integers(1, len(counts)))
    mapping = choose_vocab(np.array(counts, dtype=np.int64), draft_vocab_size)
    expected = sorted(sorted(range(len(counts)), key=lambda token: (-counts[token], token))[:draft_vocab_size])
    assert mapping.kept_ids.tolist() == expected
    assert torch.nonzero(mapping.in_draft_vocab).flatten().tolist() == expected
    assert [i + offset for i, offset in enumerate(mapping.draft_to_verifier_offset.tolist())] == expected


def test_a_full_vocabulary_is_the_one_chosen_of_all_ids_by_any_counts() -> None:
    full, chosen = full_vocab(6), choose_vocab(COUNTS, 6)
    assert full.kept_ids.tolist() == chosen.kept_ids.tolist() == list(range(6)) and full.digest() == chosen.digest()
    assert full.is_full and chosen.is_full and not choose_vocab(COUNTS, 5).is_full


def test_recorded_mapping_is_reproduced(parity: Path) -> None:
    mapping = choose_vocab(read_token_freq(str(parity / "token_freq.pt"), 320), 96)
    assert np.array_equal(mapping.draft_to_verifier_offset.numpy(), np.load(parity / "d2t.npy"))
    assert np.array_equal(mapping.in_draft_vocab.numpy(), np.load(parity / "t2d.npy"))


@pytest.mark.parametrize("draft_vocab_size", [7, 0, -1])
def test_vocabulary_that_the_verifier_does_not_hold_is_refused(draft_vocab_size: int) -> None:
    text = _error_of(choose_vocab, COUNTS, draft_vocab_size)
    assert text.startswith(f"a draft vocabulary of {draft_vocab_size} ids was asked for, the verifier has 6.")
    assert text.endswith("Set --draft-vocab-size to 1..6.")


def test_digest_tells_mappings_apart() -> None:
    digests = {choose_vocab(COUNTS, size).digest() for size in (2, 3, 4)}
    digests.add(choose_vocab(np.append(COUNTS, 0), 3).digest())
    assert len(digests) == 4
    assert choose_vocab(COUNTS, 3).digest() in digests


# ------------------------------------------------------------------------------------- token frequencies


def test_token_frequencies_are_read_as_written(tmp_path: Path) -> None:
    path = str(tmp_path / "sub" / "token_freq.pt")
    write_token_freq(path, COUNTS)
    assert torch.load(path, weights_only=True) == {1: 9, 2: 1, 3: 7, 5: 7}
    assert np.array_equal(read_token_freq(path, 6), COUNTS)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["token_freq.pt"]


def test_a_counter_is_as_good_as_a_dict(tmp_path: Path) -> None:
    torch.save(Counter({1: 9, 5: 7}), tmp_path / "token_freq.pt")
    assert read_token_freq(str(tmp_path / "token_freq.pt"), 6).tolist() == [0, 9, 0, 0, 0, 7]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"3": 1}, "holds a dict with other entries, expected a dict {token id: count >= 0}, all int."),
        ({3: -1}, "holds a dict with other entries"),
        ({3: 1.5}, "holds a dict with other entries"),
        (torch.ones(6), "holds a Tensor, expected a dict"),
        ({3: 1, 6: 2, 400: 1}, "counts 2 ids outside the verifier's vocabulary 0..5, such as 400."),
        ({-1: 1}, "counts 1 ids outside the verifier's vocabulary 0..5, such as -1."),
        ({}, "counts no token at all"),
        ({3: 0}, "counts no token at all"),
    ],
)
def test_frequencies_that_do_not_fit_are_refused(tmp_path: Path, content: object, expected: str) -> None:
    path = tmp_path / "token_freq.pt"
    torch.save(content, path)
    text = _error_of(read_token_freq, str(path), 6)
    assert text.startswith(f"{path}: ") and expected in text


def test_missing_and_damaged_frequencies_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "token_freq.pt"
    assert "no such token-frequency file. Make it with `eagle3-ray generate`" in _error_of(
        read_token_freq, str(path), 6
    )
    for damaged in (b"", b"text"):
        path.write_bytes(damaged)
        assert "cannot be read as a token-frequency file" in _error_of(read_token_freq, str(path), 6)


# ------------------------------------------------------------------------------------- the two files


def _write(tmp_path: Path, d2t: object, t2d: object) -> tuple[str, str]:
    paths = str(tmp_path / "d2t.npy"), str(tmp_path / "t2d.npy")
    for path, array in zip(paths, (d2t, t2d), strict=True):
        if isinstance(array, bytes):
            Path(path).write_bytes(array)
        elif array is not None:
            np.save(path, np.asarray(array))
    return paths


MASK = np.array([False, True, False, True, False, True])


def test_mapping_is_read_as_written(tmp_path: Path) -> None:
    mapping = choose_vocab(COUNTS, 3)
    paths = str(tmp_path / "sub" / "d2t.npy"), str(tmp_path / "sub" / "t2d.npy")
    write_mapping(mapping, *paths)
    assert np.load(paths[0]).dtype == np.int64 and np.load(paths[1]).dtype == np.bool_
    again = read_mapping(*paths, vocab_size=6, draft_vocab_size=None)
    assert torch.equal(again.kept_ids, mapping.kept_ids) and torch.equal(again.in_draft_vocab, mapping.in_draft_vocab)
    assert again.digest() == mapping.digest()
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["d2t.npy", "t2d.npy"]


def test_recorded_mapping_is_read(parity: Path) -> None:
    assert len(read_mapping(str(parity / "d2t.npy"), str(parity / "t2d.npy"), 320, 96).kept_ids) == 96


@pytest.mark.parametrize(
    ("d2t", "t2d", "expected"),
    [
        ([1, 2, 3], MASK[:5], "t2d.npy is for a verifier of 5 tokens, this one has 6"),
        ([1, 2, 3], np.append(MASK, False), "t2d.npy is for a verifier of 7 tokens, this one has 6"),
        ([1, 2], MASK, "d2t.npy keeps 2 ids, {t2d} keeps 3; both must keep the same"),
        ([1, 2, 2], MASK, "d2t.npy maps draft id 2 to verifier id 4, by {t2d} it is 5 (1 of 3 ids differ)"),
        ([1, 3, 5], MASK, "d2t.npy holds verifier ids, expected offsets (verifier id = draft id + offset)"),
        ([1.0, 2.0, 3.0], MASK, "d2t.npy is float64 [3], expected int64 [draft vocabulary]"),
        ([1, 2, 3], [-1, 0, -1, 1, -1, 2], "t2d.npy is int64 [6], expected bool [verifier vocabulary]"),
        (np.zeros(0, np.int64), np.zeros(6, bool), "d2t.npy keeps no id"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, d2t: object, t2d: object, expected: str) -> None:
    paths = _write(tmp_path, d2t, t2d)
    text = _error_of(read_mapping, *paths, 6, None)
    assert text.startswith("the vocabulary mapping cannot be used:\n  - ")
    assert expected.format(t2d=paths[1]) in text
    assert text.endswith("Make both again with `eagle3-ray vocab-mapping`.")


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    paths = _write(tmp_path, [1, 2], MASK)
    text = _error_of(read_mapping, *paths, 7, 5)
    assert "is for a verifier of 6 tokens, this one has 7" in text
    assert "keeps 2 ids, --draft-vocab-size asks for 5" in text
    assert "both must keep the same" in text


@pytest.mark.parametrize("absent", [0, 1])
def test_one_file_alone_is_no_mapping(tmp_path: Path, absent: int) -> None:
    paths = _write(tmp_path, None if absent == 0 else [1, 2, 3], None if absent == 1 else MASK)
    text = _error_of(read_mapping, *paths, 6, None)
    assert text.startswith(f"{paths[absent]}: no such file; a mapping is d2t.npy and t2d.npy together.")


@pytest.mark.parametrize("damaged", [b"", b"nonsense", np.array([{}], dtype=object)])
def test_damaged_arrays_are_refused_and_pickles_never_loaded(tmp_path: Path, damaged: object) -> None:
    paths = _write(tmp_path, damaged, MASK)
    assert _error_of(read_mapping, *paths, 6, None).startswith(f"{paths[0]}: is not a readable .npy file (")


def test_failed_write_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = str(tmp_path / "d2t.npy"), str(tmp_path / "t2d.npy")
    write_mapping(choose_vocab(COUNTS, 3), *paths)
    before = [Path(path).read_bytes() for path in paths]
    written = []

    def write_until_the_disk_is_full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr(vocab_module, "write_atomically", write_until_the_disk_is_full)
    text = _error_of(write_mapping, choose_vocab(COUNTS, 4), *paths)
    assert text == f"{paths[0]}, {paths[1]}: cannot be written (No space left on device). Choose a folder that can be."
    assert [Path(path).read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d2t.npy", "t2d.npy"]
