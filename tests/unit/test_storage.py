"""Paths on an object store, against a real S3 server; pathlib on the same tree is the oracle."""

import os
import pickle
from pathlib import Path

import pytest

from eagle3_ray.errors import StorageError
from eagle3_ray.storage import (
    ObjectPath,
    _open_filesystem,
    copy_objects,
    list_objects,
    local_copy,
    remove_tree,
    to_path,
    write_atomically,
)

TREE = {"run/0/config.json": b"{}", "run/0/state/a.distcp": b"abc", "run/run.yaml": b"epochs: 3\n", "other.txt": b""}


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> ObjectPath:
    """A bucket of either kind of store."""
    found: ObjectPath = request.getfixturevalue(f"{request.param}_bucket")
    return found


@pytest.fixture
def trees(bucket: ObjectPath, tmp_path: Path) -> tuple[ObjectPath, Path]:
    """The same files on both sides."""
    remote = bucket / tmp_path.name
    for name, content in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (remote / name).write_bytes(content)
    return remote, tmp_path


@pytest.mark.parametrize("name", ["run", "run/0", "run/run.yaml", "run/none", "other.txt"])
def test_an_object_path_answers_as_pathlib_does(trees: tuple[ObjectPath, Path], name: str) -> None:
    remote, local = trees[0] / name, trees[1] / name
    assert (remote.is_file(), remote.is_dir(), remote.exists()) == (local.is_file(), local.is_dir(), local.exists())
    assert (remote.name, remote.suffix, remote.parent.name) == (local.name, local.suffix, local.parent.name)
    if local.is_file():
        assert remote.read_bytes() == local.read_bytes()
        assert remote.read_text(encoding="utf-8") == local.read_text(encoding="utf-8")
        with remote.open("rb") as opened, local.open("rb") as expected:
            assert list(opened) == list(expected)
    if local.is_dir():
        assert [path.name for path in remote.iterdir()] == sorted(path.name for path in local.iterdir())


def test_listing_gives_every_object_below_with_its_size(trees: tuple[ObjectPath, Path]) -> None:
    stored = list_objects(trees[0])
    assert {entry.name: entry.num_bytes for entry in stored} == {name: len(content) for name, content in TREE.items()}
    assert all(entry.mtime_ns > 0 for entry in stored)
    assert list_objects(trees[0] / "none") == []


def test_an_absent_object_is_an_absent_file(trees: tuple[ObjectPath, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        (trees[0] / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (trees[0] / "none").unlink()
    (trees[0] / "none").unlink(missing_ok=True)


def test_removing_takes_what_is_below_and_nothing_else(trees: tuple[ObjectPath, Path]) -> None:
    remove_tree(trees[0] / "run" / "0")
    (trees[0] / "other.txt").unlink()
    assert [entry.name for entry in list_objects(trees[0])] == ["run/run.yaml"]


def test_writing_replaces_the_object(trees: tuple[ObjectPath, Path]) -> None:
    for path in (trees[0] / "run" / "run.yaml", trees[1] / "run" / "run.yaml"):
        write_atomically(path, "epochs: 4\n")
        assert path.read_bytes() == b"epochs: 4\n"


def test_some_files_of_a_folder_are_copied_for_a_while(trees: tuple[ObjectPath, Path]) -> None:
    remote, local = trees[0] / "run", trees[1] / "run"
    with local_copy(local, ["run.yaml"]) as folder:
        assert folder == local
    with local_copy(remote, ["run.yaml", "0/config.json"]) as folder:
        copied = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert copied == {"run.yaml": b"epochs: 3\n", "0/config.json": b"{}"} and not folder.exists()
    with pytest.raises(FileNotFoundError):
        copy_objects(remote, ["none"], local / "copy")


def test_a_path_crosses_process_borders(trees: tuple[ObjectPath, Path]) -> None:
    copied = pickle.loads(pickle.dumps(trees[0] / "run/run.yaml"))
    assert copied == trees[0] / "run/run.yaml" and copied.read_bytes() == b"epochs: 3\n"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://bucket/a/b/", ObjectPath("s3://bucket/a/b")),
        ("gs://bucket", ObjectPath("gs://bucket")),
        ("~/a", Path(os.path.expanduser("~/a"))),
        ("a/b", Path("a/b")),
    ],
)
def test_text_becomes_a_path(url: str, path: object) -> None:
    assert to_path(url) == path


@pytest.mark.parametrize("url", ["https://host/a", "file:///a", "s3://", "s3:///a", "s3://bucket//a", "gs:///"])
def test_a_url_without_a_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        to_path(url)


@pytest.mark.parametrize(("scheme", "advice"), [("s3", "AWS_ENDPOINT_URL"), ("gs", "GOOGLE_APPLICATION_CREDENTIALS")])
def test_a_missing_bucket_is_told_with_what_to_set(
    s3_bucket: ObjectPath, gs_bucket: ObjectPath, scheme: str, advice: str
) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectPath(f"{scheme}://no-such-bucket/run/x").write_bytes(b"")
    text = str(caught.value)
    assert text.startswith(f"{scheme}://no-such-bucket/run/x: the object store cannot be used (")
    assert advice in text and caught.value.exit_code == 3
    with pytest.raises(StorageError, match=f"{scheme}://no-such-bucket: the object store cannot be used"):
        list_objects(ObjectPath(f"{scheme}://no-such-bucket"))


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_told_within_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    _open_filesystem.cache_clear()
    try:
        with pytest.raises(StorageError, match=r"Could not connect to server.*Set AWS_ACCESS_KEY_ID"):
            ObjectPath("s3://bucket/x").read_bytes()
    finally:
        _open_filesystem.cache_clear()
