"""`vocab-mapping` and the mapping of a training run, against the recorded files."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from eagle3_ray.config import TrainSettings
from eagle3_ray.errors import DataError, UsageError, VocabMappingError
from eagle3_ray.jobs.cluster import ray_session
from eagle3_ray.jobs.vocab_mapping import resolve_mapping, run
from eagle3_ray.verbs import VocabMappingSettings
from tests.makers import write_bad_file, write_samples

torch.set_num_threads(1)


def _settings(tmp_path: Path, **changes: Any) -> VocabMappingSettings:
    fields: dict[str, Any] = {
        "token_freq_path": tmp_path / "no_token_freq.pt",
        "draft_vocab_size": 96,
        "target_vocab_size": 320,
        "output_path": tmp_path / "out",
    }
    return VocabMappingSettings(**(fields | changes))


def _train_settings(tmp_path: Path, **changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "verifier_name_or_path": "verifier",
        "data_path": tmp_path / "data",
        "d2t_path": tmp_path / "d2t.npy",
        "t2d_path": tmp_path / "t2d.npy",
    }
    return TrainSettings(**(fields | changes))


def _assert_recorded(output_path: Path, parity: Path) -> None:
    for name in ("d2t.npy", "t2d.npy"):
        found, recorded = np.load(output_path / name), np.load(parity / name)
        assert found.dtype == recorded.dtype and np.array_equal(found, recorded), name


# --------------------------------------------------- without Ray; these run before the module's Ray starts


def test_a_full_vocabulary_needs_neither_counts_nor_files(tmp_path: Path) -> None:
    mapping = resolve_mapping(_train_settings(tmp_path, draft_vocab_size="full"), 320)
    assert mapping.kept_ids.tolist() == list(range(320)) and mapping.in_draft_vocab.all()
    assert list(tmp_path.iterdir()) == []


def test_mapping_files_beside_a_full_vocabulary_must_keep_every_id(tmp_path: Path, parity: Path) -> None:
    settings = _train_settings(tmp_path, draft_vocab_size="full")
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(parity / name, tmp_path)
    with pytest.raises(VocabMappingError) as caught:
        resolve_mapping(settings, 320)
    assert str(caught.value) == (
        f"{tmp_path}/d2t.npy and {tmp_path}/t2d.npy keep 96 of the verifier's 320 ids, --draft-vocab-size full asks "
        "for all. Move the files away, name others with --d2t-path and --t2d-path, or leave --draft-vocab-size out."
    )
    np.save(tmp_path / "d2t.npy", np.zeros(320, dtype=np.int64))
    np.save(tmp_path / "t2d.npy", np.ones(320, dtype=np.bool_))
    assert resolve_mapping(settings, 320).kept_ids.tolist() == list(range(320))
    (tmp_path / "t2d.npy").unlink()
    with pytest.raises(VocabMappingError, match=r"t2d\.npy: no such file"):
        resolve_mapping(settings, 320)


def test_frequency_file_gives_the_recorded_mapping_without_a_ray(
    tmp_path: Path, parity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_settings(tmp_path, token_freq_path=parity / "token_freq.pt"))
    _assert_recorded(tmp_path / "out", parity)
    assert not ray.is_initialized()
    counts = torch.load(parity / "token_freq.pt", weights_only=True)
    kept = set(np.flatnonzero(np.load(parity / "t2d.npy")).tolist())
    covered = sum(count for token, count in counts.items() if token in kept) / sum(counts.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "kept          96 of 320 ids",
        f"coverage      {covered:.2%} of {sum(counts.values())} supervised tokens",
    ]
    assert lines[2:] == [
        f"counted from  {parity / 'token_freq.pt'}",
        f"wrote         {tmp_path / 'out' / 'd2t.npy'}, {tmp_path / 'out' / 't2d.npy'}",
    ]


def test_frequency_file_goes_before_the_samples(tmp_path: Path, parity: Path) -> None:
    run(_settings(tmp_path, token_freq_path=parity / "token_freq.pt", data_path=tmp_path / "nowhere"))
    _assert_recorded(tmp_path / "out", parity)


def test_vocabulary_size_is_read_from_the_verifier(tmp_path: Path, parity: Path) -> None:
    changes: dict[str, Any] = {"token_freq_path": parity / "token_freq.pt", "target_vocab_size": None}
    run(_settings(tmp_path, target_model_path=str(parity / "verifier"), **changes))
    _assert_recorded(tmp_path / "out", parity)
    config = json.loads((parity / "verifier" / "config.json").read_text())
    multimodal = tmp_path / "multimodal"
    multimodal.mkdir()
    (multimodal / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": config}))
    run(_settings(tmp_path, target_model_path=str(multimodal), output_path=tmp_path / "out_2", **changes))
    _assert_recorded(tmp_path / "out_2", parity)


def test_ids_never_seen_that_fill_up_are_told(tmp_path: Path, parity: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(_settings(tmp_path, token_freq_path=parity / "token_freq.pt", draft_vocab_size=300))
    num_seen = len(torch.load(parity / "token_freq.pt", weights_only=True))
    out = capsys.readouterr().out
    assert f"kept          300 of 320 ids ({300 - num_seen} of them never seen, to fill up)" in out
    assert "coverage      100.00% of" in out


def test_more_draft_ids_than_the_verifier_has_is_a_usage_error(tmp_path: Path, parity: Path) -> None:
    settings = _settings(
        tmp_path, draft_vocab_size=32000, target_vocab_size=None, target_model_path=str(parity / "verifier")
    )
    with pytest.raises(UsageError, match=r"--draft-vocab-size 32000 is more than the verifier's 320 tokens\. Pass 320"):
        run(settings)


def test_nothing_to_count_is_a_usage_error_that_names_both_flags(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as info:
        run(_settings(tmp_path))
    assert str(info.value) == (
        f"{tmp_path / 'no_token_freq.pt'}: no such token-frequency file, and no samples to count from. "
        "Pass --token-freq-path or --data-path."
    )
    assert info.value.exit_code == 2


def test_refused_run_leaves_the_earlier_files(tmp_path: Path, parity: Path) -> None:
    run(_settings(tmp_path, token_freq_path=parity / "token_freq.pt"))
    write_bad_file(tmp_path / "token_freq.pt", "empty")
    with pytest.raises(VocabMappingError, match="cannot be read as a token-frequency file"):
        run(_settings(tmp_path, token_freq_path=tmp_path / "token_freq.pt"))
    with pytest.raises(VocabMappingError, match="outside the verifier's vocabulary"):
        run(_settings(tmp_path, token_freq_path=parity / "token_freq.pt", target_vocab_size=300))
    _assert_recorded(tmp_path / "out", parity)


@pytest.mark.slow
def test_one_cpu_and_four_count_to_the_same_files(
    tmp_path: Path, parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shutil.copytree(parity / "v1", tmp_path / "data")
    shutil.copy(parity / "token_freq.pt", tmp_path / "data")
    outputs = []
    for num_cpus in (1, 4):
        out = tmp_path / f"out_{num_cpus}"
        with ray_session(num_cpus):
            assert ray.cluster_resources()["CPU"] == num_cpus
            run(_settings(tmp_path, data_path=tmp_path / "data", output_path=out))
        assert not ray.is_initialized()
        outputs.append([(out / name).read_bytes() for name in ("d2t.npy", "t2d.npy")])
        _assert_recorded(out, parity)
    assert outputs[0] == outputs[1]


# --------------------------------------------------- with Ray


def test_v0_samples_count_to_the_recorded_mapping(
    tmp_path: Path, parity: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_settings(tmp_path, data_path=parity / "v0", data_format_version=0))
    _assert_recorded(tmp_path / "out", parity)
    assert f"counted from  {parity / 'v0'}" in capsys.readouterr().out


def test_samples_without_supervision_choose_no_vocabulary(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path / "data", [4, 4])
    with pytest.raises(VocabMappingError, match="no token is supervised, expected some to choose a vocabulary by"):
        run(_settings(tmp_path, data_path=tmp_path / "data"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_frequencies", [False, True])
def test_training_computes_the_mapping_in_a_task_when_there_is_none(
    tmp_path: Path, parity: Path, ray_cluster: None, with_frequencies: bool
) -> None:
    shutil.copytree(parity / "v1", tmp_path / "data")
    changes: dict[str, Any] = {"draft_vocab_size": 96}
    if with_frequencies:
        changes |= {"token_freq_path": parity / "token_freq.pt"}
    mapping = resolve_mapping(_train_settings(tmp_path, **changes), 320)
    assert np.array_equal(mapping.draft_to_verifier_offset.numpy(), np.load(parity / "d2t.npy"))
    assert np.array_equal(mapping.in_draft_vocab.numpy(), np.load(parity / "t2d.npy"))
    assert not (tmp_path / "d2t.npy").exists()


def test_small_verifier_keeps_its_whole_vocabulary_by_default(tmp_path: Path, parity: Path, ray_cluster: None) -> None:
    shutil.copytree(parity / "v1", tmp_path / "data")
    mapping = resolve_mapping(_train_settings(tmp_path), 320)
    assert mapping.kept_ids.tolist() == list(range(320))


def test_training_uses_the_files_that_are_there(tmp_path: Path, parity: Path, ray_cluster: None) -> None:
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(parity / name, tmp_path)
    assert len(resolve_mapping(_train_settings(tmp_path), 320).kept_ids) == 96  # there are no samples to count
    with pytest.raises(VocabMappingError, match="keeps 96 ids, --draft-vocab-size asks for 95"):
        resolve_mapping(_train_settings(tmp_path, draft_vocab_size=95), 320)
    with pytest.raises(VocabMappingError, match="is for a verifier of 320 tokens, this one has 321"):
        resolve_mapping(_train_settings(tmp_path), 321)
    (tmp_path / "t2d.npy").unlink()
    with pytest.raises(VocabMappingError, match=r"t2d\.npy: no such file; a mapping is d2t\.npy and t2d\.npy together"):
        resolve_mapping(_train_settings(tmp_path), 320)


def test_error_of_the_task_reaches_the_driver_as_it_was_raised(tmp_path: Path, ray_cluster: None) -> None:
    write_samples(tmp_path / "data", [20])
    write_bad_file(tmp_path / "data" / "bad.pt", "cut_short")
    with pytest.raises(DataError) as info:
        resolve_mapping(_train_settings(tmp_path), 320)
    assert type(info.value) is DataError
    assert "bad.pt: is cut short or damaged" in str(info.value)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
