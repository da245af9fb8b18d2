"""Samples on a real S3 server: the same verdict as on disk, for a small part of the bytes."""

from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pytest
import torch

from eagle3_ray.data import remote_file
from eagle3_ray.data.samples import Sample, SampleSpec, describe_problems, inspect_sample, inspect_tokens, read_sample
from eagle3_ray.errors import SampleFormatError, StorageError
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


def test_torch_reads_through_blocks_whatever_the_files_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 1021)
    for num_tokens in range(1, 400):  # the zip's directory, at the end, begins at every place of a block
        state = torch.arange(num_tokens)
        torch.save({"state": state}, tmp_path / "a.pt")
        with pa.OSFile(str(tmp_path / "a.pt")) as file:
            reader = remote_file.BlockReader(file, ObjectPath("s3://bucket/a.pt"))
            loaded = torch.load(cast(IO[bytes], reader), map_location="cpu", weights_only=True)
        assert torch.equal(loaded["state"], state)


def save_as(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """The same sample in another guise."""
    states, length = content["hidden_states"], len(content["input_ids"])
    if kind == "rows of a big batch":
        for name in ("input_ids", "loss_mask"):
            batch = torch.full((256, 2000), -1, dtype=content[name].dtype)
            batch[3, :length] = content[name]
            content[name] = batch[3, :length]
    elif kind == "columns of one tensor":
        content["hidden_states"] = list(torch.cat(states, dim=1).split(BIG_HIDDEN_SIZE, dim=1))
    elif kind == "transposed":
        content["hidden_states"] = [state.T.contiguous().T for state in states]
    return content


@pytest.mark.parametrize("kind", ["rows of a big batch", "columns of one tensor", "transposed"])
def test_tensors_that_are_views_are_read_as_on_disk(s3_bucket: ObjectPath, tmp_path: Path, kind: str) -> None:
    content = torch.load(write_sample(tmp_path / "plain.pt", 300, 1, hidden_size=BIG_HIDDEN_SIZE), weights_only=True)
    torch.save(save_as(kind, content), tmp_path / "view.pt")
    local, remote = str(tmp_path / "view.pt"), upload(tmp_path / "view.pt", s3_bucket / tmp_path.name)
    expected, found = inspect_sample(local, big_spec(1)), inspect_sample(remote, big_spec(1))
    assert isinstance(expected, Sample) and isinstance(found, Sample)
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.loss_mask, expected.loss_mask)


def test_ids_of_a_sample_longer_than_any_bin_are_read(s3_bucket: ObjectPath, tmp_path: Path) -> None:
    local = write_sample(tmp_path / "long.pt", 150_000, 1)
    remote = upload(local, s3_bucket / tmp_path.name)
    expected, found = (inspect_tokens(path, 1, make_spec().vocab_size) for path in (str(local), remote))
    assert isinstance(expected, tuple) and isinstance(found, tuple)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


class FailingFile:
    """An opened object of a store that answers no more after its first block."""

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def size(self) -> int:
        return 100_000

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        if offset:
            raise OSError("When reading: SlowDown")
        return b"PK\3\4" + bytes(num_bytes - 4)


def test_a_store_that_fails_meanwhile_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectPath, "open_input", lambda self: FailingFile())
    with pytest.raises(StorageError, match=r"s3://bucket/a\.pt: .*SlowDown"):
        inspect_sample("s3://bucket/a.pt", make_spec())


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
