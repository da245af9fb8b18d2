"""Samples on a real S3 server: the same verdict as on disk, for a small part of the bytes."""

from pathlib import Path

import pytest
import torch

from eagle3_ray.data import remote_file
from eagle3_ray.data.samples import Sample, SampleSpec, describe_problems, inspect_sample, inspect_tokens, read_sample
from eagle3_ray.errors import SampleFormatError
from eagle3_ray.storage import ObjectPath
from tests.makers import BAD_FILES, make_norm_weight, make_spec, write_bad_file, write_sample

BIG_HIDDEN_SIZE = 2048


def big_spec(version: int) -> SampleSpec:
    return make_spec(version, hidden_size=BIG_HIDDEN_SIZE, final_norm_weight=make_norm_weight(BIG_HIDDEN_SIZE))


def upload(path: Path, folder: ObjectPath) -> str:
    remote = folder / path.name
    remote.write_bytes(path.read_bytes())
    return str(remote)


@pytest.mark.parametrize("version", [0, 1])
def test_a_remote_sample_is_the_local_one(s3_bucket: ObjectPath, tmp_path: Path, version: int) -> None:
    local = write_sample(tmp_path / "a.pt", 37, version)
    spec = make_spec(version)
    expected, found = read_sample(str(local), spec), read_sample(upload(local, s3_bucket / tmp_path.name), spec)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.loss_mask, expected.loss_mask)
    for state, wanted in zip(
        (*found.aux_states, found.last_state), (*expected.aux_states, expected.last_state), strict=True
    ):
        assert state.dtype == wanted.dtype and torch.equal(state, wanted)


@pytest.mark.parametrize("version", [0, 1])
def test_an_index_fetches_a_small_part_of_a_file(
    s3_bucket: ObjectPath, tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_sample(tmp_path / "a.pt", 900, version, hidden_size=BIG_HIDDEN_SIZE)
    remote = upload(local, s3_bucket / tmp_path.name)
    num_bytes: list[int] = []
    read_at = remote_file.BlockReader.read_at

    def counted(reader: remote_file.BlockReader, offset: int, length: int) -> bytes:
        content = read_at(reader, offset, length)
        num_bytes.append(len(content))
        return content

    monkeypatch.setattr(remote_file.BlockReader, "read_at", counted)
    spec = big_spec(version)
    expected, found = inspect_sample(str(local), spec), inspect_sample(remote, spec)
    assert isinstance(expected, Sample) and isinstance(found, Sample)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.loss_mask, expected.loss_mask)
    assert [state.shape for state in found.aux_states] == [state.shape for state in expected.aux_states]
    assert sum(num_bytes) < 0.05 * local.stat().st_size and len(num_bytes) < 30
    num_bytes.clear()
    tokens = inspect_tokens(remote, version, spec.vocab_size)
    assert isinstance(tokens, tuple) and torch.equal(tokens[0], expected.input_ids)
    assert len(num_bytes) < 8


def test_a_normed_state_is_found_out_from_the_rows_fetched(s3_bucket: ObjectPath, tmp_path: Path) -> None:
    v0 = torch.load(write_sample(tmp_path / "v0.pt", 900, 0, hidden_size=BIG_HIDDEN_SIZE), weights_only=True)
    hidden = v0["hidden_state"].split(BIG_HIDDEN_SIZE, dim=1)
    content = {
        "input_ids": v0["input_ids"],
        "loss_mask": v0["loss_mask"],
        "hidden_states": [*(state.contiguous() for state in hidden), v0["target"]],
    }
    torch.save(content, tmp_path / "normed.pt")
    spec = big_spec(1)
    local, remote = (
        inspect_sample(path, spec)
        for path in (str(tmp_path / "normed.pt"), upload(tmp_path / "normed.pt", s3_bucket / tmp_path.name))
    )
    assert isinstance(remote, list) and remote == local
    assert [problem.kind for problem in remote] == ["a last state that is normed"]


@pytest.mark.parametrize("bad_kind", BAD_FILES)
def test_bad_files_are_told_as_on_disk(s3_bucket: ObjectPath, tmp_path: Path, bad_kind: str) -> None:
    local = write_bad_file(tmp_path / "bad.pt", bad_kind)
    remote = upload(local, s3_bucket / tmp_path.name)
    expected, found = inspect_sample(str(local), make_spec()), inspect_sample(remote, make_spec())
    assert isinstance(expected, list) and isinstance(found, list)
    assert describe_problems(found) == describe_problems(expected)
    with pytest.raises(SampleFormatError):
        read_sample(remote, make_spec())


def test_a_file_that_is_gone_is_told(s3_bucket: ObjectPath) -> None:
    with pytest.raises(SampleFormatError, match=r"none\.pt: cannot be opened \(no such object\)"):
        read_sample(str(s3_bucket / "none.pt"), make_spec())
