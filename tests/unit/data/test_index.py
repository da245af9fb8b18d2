"""The index of a folder: what it lists, what it refuses, when it opens a file again."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ray.data import index as index_module
from eagle3_ray.data.bad_files import BadFile, BadFiles
from eagle3_ray.data.folder import list_sample_files
from eagle3_ray.data.index import SampleIndex, build_index, count_supervised_tokens, split_index
from eagle3_ray.data.index_cache import CACHE_DIR
from eagle3_ray.errors import DataError
from tests.makers import BAD_FILES, VOCAB_SIZE, make_content, make_spec, write_bad_file, write_sample, write_samples

torch.set_num_threads(1)


def _index_of(lengths: list[int]) -> SampleIndex:
    tokens = np.array(lengths, dtype=np.int64)
    return SampleIndex("/data", [f"{i:05}.pt" for i in range(len(lengths))], tokens, tokens // 2, 0)


# ------------------------------------------------------------------------------------- listing


def test_files_are_listed_at_any_depth_in_the_order_of_their_relative_paths(tmp_path: Path) -> None:
    for name in ("b.pt", "a/z.pt", "a/b/c.pt", "B.pt", "data_10.pt", "data_9.pt", "é.pt"):
        write_sample(tmp_path / name)
    for name in (".hidden.pt", ".cache/x.pt", "notes.txt", "a/.tmp.pt"):
        write_sample(tmp_path / name)
    assert list(list_sample_files(str(tmp_path))) == [
        "B.pt", "a/b/c.pt", "a/z.pt", "b.pt", "data_10.pt", "data_9.pt", "é.pt",
    ]  # fmt: skip


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_sample(tmp_path / "elsewhere" / "x.pt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "linked_again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    assert list(list_sample_files(str(tmp_path / "data"))) == ["linked/x.pt"]


@pytest.mark.parametrize("missing", [True, False])
def test_no_pt_files_or_no_folder_is_told_with_what_to_do(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "data"
    if not missing:
        write_sample(folder / ".hidden.pt")
    with pytest.raises(DataError) as info:
        list_sample_files(str(folder))
    found = (
        "No such file or directory; expected a folder of .pt samples" if missing else "no .pt files, expected samples"
    )
    assert f"{folder}" in str(info.value) and found in str(info.value)
    assert "Check --data-path, or make samples with `eagle3-ray generate`." in str(info.value)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def test_a_file_where_a_folder_is_expected_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Not a directory; expected a folder of \.pt samples"):
        list_sample_files(str(write_sample(tmp_path / "a.pt")))


# ------------------------------------------------------------------------------------- the index


def test_index_holds_lengths_and_supervised_positions_of_each_file(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5, 33])
    write_sample(tmp_path / "sub" / "all.pt", 8, num_prompt_tokens=0)
    index = build_index(str(tmp_path), make_spec())
    assert index.root == str(tmp_path) and index.num_not_samples == 0
    assert index.paths == ["data_0.pt", "data_1.pt", "data_2.pt", "sub/all.pt"]
    assert index.num_tokens.tolist() == [20, 5, 33, 8]
    assert index.num_supervised.tolist() == [16, 1, 29, 7]  # of `all.pt`, the first token trains no position
    assert index.num_tokens.dtype == index.num_supervised.dtype == np.int64


def test_token_frequencies_among_the_samples_are_counted_and_left_out(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    write_bad_file(tmp_path / "token_freq.pt", "token_freq")
    for _ in range(2):  # the second time from the cache
        index = build_index(str(tmp_path), make_spec())
        assert index.paths == ["data_0.pt", "data_1.pt"] and index.num_not_samples == 1


def test_folder_with_only_token_frequencies_is_refused(tmp_path: Path, ray_cluster: None) -> None:
    write_bad_file(tmp_path / "token_freq.pt", "token_freq")
    with pytest.raises(DataError, match=r"its \.pt files are token frequencies, expected v1 samples among them"):
        build_index(str(tmp_path), make_spec())


def test_all_bad_files_are_told_at_once_and_nothing_is_lost(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    kinds = sorted(set(BAD_FILES) - {"token_freq"})
    for kind in kinds:
        write_bad_file(tmp_path / f"bad_{kind}.pt", kind)
    write_bad_file(tmp_path / "bad_empty_2.pt", "empty")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    with pytest.raises(DataError) as info:
        build_index(str(tmp_path), make_spec())
    lines = str(info.value).splitlines()
    assert lines[0] == f"{tmp_path}: {len(kinds) + 1} of {len(kinds) + 3} .pt files are not usable v1 samples."
    assert (
        "        2  empty" in lines and "        1  a v0 sample" in lines and "        2  lengths that differ" in lines
    )
    assert "  bad_cut_short.pt: is cut short or damaged" in str(info.value)
    assert lines[-1] == f"  ... and {len(kinds) + 1 - 20} more."
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_report_of_bad_files_does_not_depend_on_the_order_of_tasks() -> None:
    parts = []
    for number in range(60):
        part = BadFiles()
        kind = "empty" if number % 3 else "a v0 sample"
        part.add_file(BadFile(f"{number:02}.pt", (kind,), f"is bad in way {number}."))
        parts.append(part)
    texts = []
    for order in (parts, parts[::-1], parts[30:] + parts[:30]):
        merged = BadFiles()
        for part in order:
            merged.add(part)
        with pytest.raises(DataError) as info:
            merged.raise_if_any("/data", 100, 1)
        texts.append(str(info.value))
    assert len(set(texts)) == 1
    assert texts[0].splitlines()[:4] == [
        "/data: 60 of 100 .pt files are not usable v1 samples.",
        "       40  empty",
        "       20  a v0 sample",
        "  00.pt: is bad in way 0.",
    ]
    assert "  19.pt: is bad in way 19." in texts[0] and "20.pt:" not in texts[0] and "... and 40 more." in texts[0]


# ------------------------------------------------------------------------------------- the cache


def _spoil_without_a_trace(path: Path) -> None:
    """Change the content, but neither size nor time: only a program that opens the file can see it."""
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_unchanged_files_are_not_opened_again(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    first = build_index(str(tmp_path), make_spec())
    _spoil_without_a_trace(tmp_path / "data_0.pt")
    again = build_index(str(tmp_path), make_spec())
    assert again.digest() == first.digest()


def test_changed_new_and_removed_files_are_noticed(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5, 9])
    build_index(str(tmp_path), make_spec())
    write_sample(tmp_path / "data_0.pt", 31)
    write_sample(tmp_path / "new.pt", 7)
    (tmp_path / "data_2.pt").unlink()
    index = build_index(str(tmp_path), make_spec())
    assert dict(zip(index.paths, index.num_tokens.tolist(), strict=True)) == {
        "data_0.pt": 31,
        "data_1.pt": 5,
        "new.pt": 7,
    }


def test_same_size_and_another_time_is_read_again(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20])
    build_index(str(tmp_path), make_spec())
    _spoil_without_a_trace(tmp_path / "data_0.pt")
    os.utime(tmp_path / "data_0.pt", ns=(0, 0))
    with pytest.raises(DataError, match=r"data_0\.pt: is not a file that torch\.save writes"):
        build_index(str(tmp_path), make_spec())


def test_another_spec_does_not_use_the_cache(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20])
    build_index(str(tmp_path), make_spec())
    with pytest.raises(DataError, match="expected 8"):
        build_index(str(tmp_path), make_spec(hidden_size=8, final_norm_weight=torch.ones(8)))
    with pytest.raises(DataError, match=r"vocabulary is 0\.\.9"):
        build_index(str(tmp_path), make_spec(vocab_size=10))


def test_a_mended_file_is_enough_after_a_refusal(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    write_bad_file(tmp_path / "bad.pt", "empty")
    with pytest.raises(DataError):
        build_index(str(tmp_path), make_spec())
    _spoil_without_a_trace(tmp_path / "data_0.pt")  # known to be good from the refused run
    write_sample(tmp_path / "bad.pt", 6)
    assert build_index(str(tmp_path), make_spec()).num_tokens.tolist() == [6, 20, 5]


def test_damaged_cache_is_built_again(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    first = build_index(str(tmp_path), make_spec())
    (cache,) = (tmp_path / CACHE_DIR).glob("*.parquet")
    whole = cache.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        cache.write_bytes(damaged)
        assert build_index(str(tmp_path), make_spec()).digest() == first.digest()
    assert [path.name for path in (tmp_path / CACHE_DIR).iterdir()] == [cache.name]  # no temporary file is left


def test_folder_that_cannot_hold_a_cache_has_none(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20, 5])
    (tmp_path / CACHE_DIR).write_text("a file where the cache folder would be")
    assert build_index(str(tmp_path), make_spec()).num_tokens.tolist() == [20, 5]
    assert (tmp_path / CACHE_DIR).read_text() == "a file where the cache folder would be"


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("tasks_per_cpu", [1, 100])
def test_counts_are_those_of_one_loop_however_the_files_are_dealt(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tasks_per_cpu: int
) -> None:
    lengths = [20, 5, 33, 4, 17, 50, 6]
    write_samples(tmp_path, lengths)
    write_bad_file(tmp_path / "token_freq.pt", "token_freq")
    expected = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for seed, length in enumerate(lengths):
        content = make_content(length, seed=seed)
        for token, supervised in zip(content["input_ids"].tolist(), content["loss_mask"].tolist(), strict=True):
            expected[token] += supervised
    monkeypatch.setattr(index_module, "TASKS_PER_CPU", tasks_per_cpu)  # on 4 CPUs: two files a task, or one
    counts = count_supervised_tokens(str(tmp_path), 1, VOCAB_SIZE)
    assert counts.dtype == np.int64 and np.array_equal(counts, expected)


@pytest.mark.parametrize("read_here_s", [0.0, 60.0])
def test_an_index_is_the_same_whoever_reads_the_files(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, read_here_s: float
) -> None:
    monkeypatch.setattr(index_module, "READ_HERE_S", read_here_s)
    lengths = [20, 5, 33, 4, 17, 50, 6]
    write_samples(tmp_path, lengths)
    assert build_index(str(tmp_path), make_spec()).num_tokens.tolist() == lengths
    write_bad_file(tmp_path / "bad.pt", "id_too_large")
    with pytest.raises(DataError, match=r"1 of 8 \.pt files are not usable v1 samples"):
        build_index(str(tmp_path), make_spec())


def test_counting_refuses_bad_files_with_the_same_report(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path, [20])
    write_bad_file(tmp_path / "bad.pt", "id_too_large")
    with pytest.raises(
        DataError, match=r"1 of 2 \.pt files are not usable v1 samples\.\n +1  ids outside the vocabulary"
    ):
        count_supervised_tokens(str(tmp_path), 1, VOCAB_SIZE)


# Written down so that a resumed run, on any machine and version, holds out the same files.
GOLDEN_VALIDATION = [29, 33, 41, 54, 56, 59, 69, 78, 79, 95]

# ------------------------------------------------------------------------------------- selecting and splitting


def test_select_keeps_order_and_changes_the_digest() -> None:
    index = _index_of([5, 6, 7, 8])
    part = index.select(np.array([True, False, True, False]))
    assert part.paths == ["00000.pt", "00002.pt"] and part.num_tokens.tolist() == [5, 7]
    assert part.num_supervised.tolist() == [2, 3]
    assert part.digest() != index.digest()
    assert SampleIndex("/elsewhere", index.paths, index.num_tokens, index.num_supervised, 0).digest() == index.digest()


def test_an_index_is_the_same_in_another_process() -> None:
    names = ["a/b.pt", "é.pt", os.fsdecode(b"\xff.pt")]
    index = SampleIndex("/data", names, np.array([5, 6, 7]), np.array([1, 2, 3]), 4)
    for _ in range(2):
        index = pickle.loads(pickle.dumps(index))
        assert list(index.paths) == names and (index.root, index.num_not_samples) == ("/data", 4)
        assert index.num_tokens.tolist() == [5, 6, 7] and index.num_supervised.tolist() == [1, 2, 3]
        assert index.select(np.array([True, False, True])).paths == [names[0], names[2]]
        assert index.digest() == SampleIndex("/data", names, index.num_tokens, index.num_supervised, 4).digest()


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_split_is_a_partition_with_something_on_both_sides(num_samples: int, train_frac: float, seed: int) -> None:
    index = _index_of(list(range(2, 2 + num_samples)))
    train, validation = split_index(index, train_frac, seed)
    assert sorted([*train.paths, *validation.paths]) == index.paths
    assert len(train.paths) >= 1
    assert len(validation.paths) >= (1 if num_samples >= 2 and train_frac < 1 else 0)
    assert abs(len(train.paths) - num_samples * train_frac) <= 1
    assert train.paths == sorted(train.paths)


def test_split_is_the_same_every_time_and_another_with_another_seed() -> None:
    index = _index_of(list(range(2, 102)))
    train, validation = split_index(index, 0.9, seed=0)
    assert (len(train.paths), len(validation.paths)) == (90, 10)
    assert split_index(index, 0.9, seed=0)[1].paths == validation.paths
    assert split_index(index, 0.9, seed=1)[1].paths != validation.paths
    assert [int(path[:5]) for path in validation.paths] == GOLDEN_VALIDATION
