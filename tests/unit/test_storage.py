"""Paths on an object store, against a real S3 server; pathlib on the same tree is the oracle."""

import errno
import os
import pickle
import signal
import sys
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from eagle3_ray.errors import StorageError
from eagle3_ray.stopping import Stopped, stop_signals
from eagle3_ray.storage import (
    ObjectPath,
    _open_filesystem,
    copy_objects,
    list_objects,
    local_copy,
    remove_tree,
    telling,
    to_path,
    upload_folder,
    write_atomically,
)
from tests.conftest import free_port, store_server

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


def test_a_folder_is_uploaded_with_all_below_it(trees: tuple[ObjectPath, Path], tmp_path: Path) -> None:
    (tmp_path / "0" / "state").mkdir(parents=True)
    (tmp_path / "0" / "config.json").write_bytes(b"{}")
    (tmp_path / "0" / "state" / "__0_0.distcp").write_bytes(bytes(range(256)) * 40_000)  # more than one part
    upload_folder(tmp_path / "0", trees[0] / "uploaded")
    stored = list_objects(trees[0] / "uploaded")
    assert [entry.name for entry in stored] == ["config.json", "state/__0_0.distcp"]
    for entry in stored:
        assert (trees[0] / "uploaded" / entry.name).read_bytes() == (tmp_path / "0" / entry.name).read_bytes()
    remove_tree(trees[0] / "uploaded")
    with pytest.raises(StorageError, match="s3://nowhere/run"):
        upload_folder(tmp_path / "0", ObjectPath("s3://nowhere/run"))


def test_a_full_disk_is_not_the_stores_fault(trees: tuple[ObjectPath, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.yaml").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        copy_objects(trees[0] / "run", ["run.yaml"], tmp_path / "full")
    assert not isinstance(caught.value, StorageError)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as Arrow raises it where it copies by itself
    with pytest.raises(OSError, match="No space left on device") as caught, telling(trees[0]):
        raise full
    assert caught.value is full


def test_names_that_would_lead_out_of_a_folder_are_passed_over(s3_bucket: ObjectPath, tmp_path: Path) -> None:
    import boto3

    (s3_bucket / tmp_path.name / "a.txt").write_bytes(b"")
    for name in ("a/../../up.txt", "a//b.txt", "./c.txt"):
        boto3.client("s3").put_object(Bucket="bucket", Key=f"{tmp_path.name}/{name}", Body=b"")
    assert [entry.name for entry in list_objects(s3_bucket / tmp_path.name)] == ["a.txt"]


@pytest.mark.parametrize("is_early", [True, False], ids=["before its stream is open", "once it is"])
def test_a_signal_while_an_object_is_written_leaves_it_whole(
    is_early: bool, s3_bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = s3_bucket.filesystem

    class Signalling:
        """The store's client; a signal comes while a stream is opened."""

        def open_output_stream(self, key: str) -> Any:
            if is_early:
                os.kill(os.getpid(), signal.SIGTERM)
            stream = filesystem.open_output_stream(key)
            if not is_early:
                os.kill(os.getpid(), signal.SIGTERM)
            return stream

    with monkeypatch.context() as patched, pytest.raises(Stopped), stop_signals():
        patched.setattr("eagle3_ray.storage._open_filesystem", lambda scheme: Signalling())
        (s3_bucket / "written").write_bytes(b"whole")
    assert (s3_bucket / "written").read_bytes() == b"whole"
    (s3_bucket / "written").unlink()


@pytest.mark.parametrize("content", [None, "{}"], ids=["absent", "no key"])
def test_a_file_of_credentials_that_cannot_be_used_is_told(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    _open_filesystem.cache_clear()
    try:
        with pytest.raises(StorageError, match=r"gs://bucket/x: .*Set GOOGLE_APPLICATION_CREDENTIALS"):
            ObjectPath("gs://bucket/x").read_bytes()
    finally:
        _open_filesystem.cache_clear()


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


def test_credentials_that_are_refused_are_told_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    environment = {
        "INITIAL_NO_AUTH_ACTION_COUNT": "0",  # the server checks every request's key
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with store_server(command, port, environment, tmp_path):
        with pytest.raises(StorageError, match=r"s3://bucket/x: .*ACCESS_DENIED.*Set AWS_ACCESS_KEY_ID"):
            ObjectPath("s3://bucket/x").read_bytes()
        with pytest.raises(StorageError, match=r"s3://bucket/x: .*INVALID_ACCESS_KEY_ID.*Set AWS_ACCESS_KEY_ID"):
            ObjectPath("s3://bucket/x").write_bytes(b"")


def test_a_store_that_is_busy_is_asked_again(s3_bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    (s3_bucket / "busy").write_bytes(b"content")
    behind = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    statuses: list[int] = []

    class BusyAtFirst(BaseHTTPRequestHandler):
        """Says "slow down" twice, then hands every request on to the real server."""

        def do_GET(self) -> None:
            if len(statuses) < 2:
                statuses.append(503)
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = HTTPConnection(behind)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            statuses.append(answer.status)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), BusyAtFirst) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        _open_filesystem.cache_clear()
        try:
            assert (s3_bucket / "busy").read_bytes() == b"content"
        finally:
            _open_filesystem.cache_clear()
            proxy.shutdown()
    assert statuses[:2] == [503, 503] and set(statuses[2:]) <= {200, 206} and statuses[2:]


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    _open_filesystem.cache_clear()
    try:
        with pytest.raises(StorageError, match=r"Could not connect to server.*Set AWS_ACCESS_KEY_ID"):
            ObjectPath("s3://bucket/x").read_bytes()
    finally:
        _open_filesystem.cache_clear()
