"""Paths that may lie on an object store: `s3://bucket/key` and `gs://bucket/key`, beside those of this machine.

`ObjectPath` has the part of pathlib's interface that the program uses, so most code need not know where a file
lies. What differs: folders exist only in names, there are no links and no renaming, and an object that is written
appears whole or not at all.

Credentials, region and server come from the environment, as each store's own tools read them (`STORES`). Requests
are tried again by the client; what still fails becomes one `StorageError` that says what to set.

Source: pyarrow.fs (Arrow's S3FileSystem and GcsFileSystem).
"""

import contextlib
import datetime
import errno
import functools
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from eagle3_ray.errors import StorageError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs

STORES = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the node or pod; AWS_REGION; and "
    "AWS_ENDPOINT_URL for a server other than Amazon's. Every node needs them.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a service account's file, or give the node or pod a service account. "
    "Every node needs it.",
}
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, MAX_ATTEMPTS = 3, 20, 5
GCS_RETRY_TIME_S = 20
READ_AHEAD_BYTES = 8 * 1024 * 1024
MAX_ERROR_LENGTH = 300  # Google's client repeats itself


@dataclass(frozen=True)
class ObjectPath:
    """An object, or a prefix that many share.

    Attributes:
        uri: `s3://bucket/key` or `gs://bucket/key`, without a slash at its end.
    """

    uri: str

    @property
    def scheme(self) -> str:
        """`s3` or `gs`."""
        return self.uri.partition("://")[0]

    @property
    def key(self) -> str:
        """`bucket/key`, as Arrow's file systems name it."""
        return self.uri.partition("://")[2]

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.uri.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's ending, dot included."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> "ObjectPath":
        """All before the last slash."""
        return ObjectPath(self.uri.rpartition("/")[0])

    @property
    def filesystem(self) -> "pyarrow.fs.FileSystem":
        """The store's client, one a process."""
        return _open_filesystem(self.scheme)

    def __str__(self) -> str:
        return self.uri

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: Any) -> Any:
        """Let settings hold it, and write it as its URI; text is read by `to_path`."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self.uri}/{name}")

    def absolute(self) -> "ObjectPath":
        """Return the path itself; every URI is absolute."""
        return self

    def resolve(self) -> "ObjectPath":
        """Return the path itself; there are no links."""
        return self

    def is_file(self) -> bool:
        """Tell whether it is an object."""
        return self._kind() == "File"

    def is_dir(self) -> bool:
        """Tell whether it is a prefix of objects."""
        return self._kind() == "Directory"

    def exists(self) -> bool:
        """Tell whether there is an object of this name or below it."""
        return self._kind() != "NotFound"

    def _kind(self) -> str:
        with telling(self):
            kind: str = self.filesystem.get_file_info(self.key).type.name
        return kind

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield what is directly below the prefix, sorted; nothing if there is no such prefix."""
        # All below it is listed: Google's store tells only of prefixes that somebody made a marker for.
        for name in sorted({stored.name.partition("/")[0] for stored in list_objects(self)}):
            yield self / name

    def read_bytes(self) -> bytes:
        """Return the object.

        Raises:
            FileNotFoundError: There is none.
            StorageError: The store cannot be read.
        """
        with telling(self), self.filesystem.open_input_stream(self.key) as stream:
            content: bytes = stream.read()
        return content

    def read_text(self, encoding: str) -> str:
        """Return the object as text. Errors as in `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> int:
        """Store the object, whole or not at all, and return its size.

        Raises:
            StorageError: The store cannot be written.
        """
        # Whole in memory first, and in a thread, where no signal interrupts it: a stream that is closed half-way stores
        # what it has, be it nothing.
        with telling(self, may_be_absent=False), ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()  # a pool that a signal interrupts while it starts its thread does not wait for it
            pool.submit(self._store, content).result()
        return len(content)

    def _store(self, content: bytes) -> None:
        with self.filesystem.open_output_stream(self.key) as stream:
            stream.write(content)

    def open_input(self) -> "pyarrow.NativeFile":
        """Open the object for reads at any place; each read is a request.

        Raises:
            FileNotFoundError: There is none.
            StorageError: The store cannot be read.
        """
        with telling(self):
            return self.filesystem.open_input_file(self.key)

    @contextlib.contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[IO[bytes]]:
        """Open the object for reading from front to back. Errors as in `read_bytes`, from each read."""
        assert mode == "rb"
        with io.BufferedReader(_ToldReads(self.open_input(), self), READ_AHEAD_BYTES) as file:
            yield file

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object.

        Raises:
            FileNotFoundError: There is none, and that matters.
            StorageError: The store cannot be written.
        """
        with telling(self):
            try:
                self.filesystem.delete_file(self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a prefix is there once an object is."""


class _ToldReads(io.RawIOBase):
    """An opened object whose reads raise `StorageError`."""

    def __init__(self, file: "pyarrow.NativeFile", path: ObjectPath) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the new position."""
        position: int = self._file.seek(offset, whence)
        return position

    def readinto(self, buffer: Any) -> int:
        """Read on; 0 at the end."""
        with telling(self._path):
            content: bytes = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the object too."""
        self._file.close()
        super().close()


StoragePath = Path | ObjectPath


class StoredObject(NamedTuple):
    """An object below a prefix: its name from there on, size in bytes and time of change in nanoseconds."""

    name: str
    num_bytes: int
    mtime_ns: int


def is_remote(path: str) -> bool:
    """Tell whether a path is a URL rather than a place on this machine."""
    return "://" in path


def to_path(text: str) -> StoragePath:
    """Return a path on this machine, `~` expanded, or on an object store.

    Raises:
        ValueError: A URL without a bucket, or of another kind.
    """
    if not is_remote(text):
        return Path(os.path.expanduser(text))
    scheme, key = urlsplit(text).scheme, text.partition("://")[2]
    if scheme not in STORES:
        raise ValueError(f"is a URL of a kind that is not known; expected {' or '.join(f'{s}://' for s in STORES)}")
    if not key.strip("/") or "//" in key.rstrip("/") or key.startswith("/"):
        raise ValueError(f"expected {scheme}://bucket/key")
    return ObjectPath(f"{scheme}://{key.rstrip('/')}")


def list_objects(path: ObjectPath) -> list[StoredObject]:
    """Return all objects below a prefix, sorted by name; none if there is no such prefix.

    Left out are names that would lead elsewhere as paths of this machine: with empty parts, `.` or `..`.

    Raises:
        StorageError: The store cannot be read, or the path is a bucket that is not there.
    """
    from pyarrow.fs import FileSelector, FileType

    selector = FileSelector(path.key, recursive=True, allow_not_found="/" in path.key)
    with telling(path, may_be_absent=False):
        infos = path.filesystem.get_file_info(selector)
    prefix = path.key + "/"
    stored = [
        StoredObject(info.path.removeprefix(prefix), info.size, info.mtime_ns)
        for info in infos
        if info.type == FileType.File
    ]
    return sorted(entry for entry in stored if not {"", ".", ".."} & set(entry.name.split("/")))


def write_atomically(path: StoragePath, content: str | bytes) -> None:
    """Write a file that is either absent, old, or whole, and stored when this returns; text as UTF-8.

    Raises:
        OSError: The disk cannot be written.
        StorageError: The object store cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if isinstance(path, ObjectPath):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_tree(path: StoragePath) -> None:
    """Remove a folder, or every object below a prefix."""
    if isinstance(path, Path):
        shutil.rmtree(path)
        return
    # Google's client removes the objects, then misses a marker of the prefix, which need not be there.
    with telling(path), contextlib.suppress(FileNotFoundError):
        path.filesystem.delete_dir(path.key)


def copy_objects(source: ObjectPath, names: Iterable[str], folder: Path) -> None:
    """Copy some objects below a prefix to a folder of this machine, which is made.

    Raises:
        FileNotFoundError: One is not there.
        StorageError: The store cannot be read.
    """
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as stored, place.open("wb") as local:
            shutil.copyfileobj(stored, local, READ_AHEAD_BYTES)


def upload_folder(folder: Path, path: ObjectPath) -> None:
    """Store every file below a folder of this machine, under its name from there on.

    Raises:
        StorageError: The store cannot be written.
    """
    with telling(path, may_be_absent=False):
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            key = (path / file.relative_to(folder).as_posix()).key
            with file.open("rb") as local, path.filesystem.open_output_stream(key) as stored:
                shutil.copyfileobj(local, stored, READ_AHEAD_BYTES)


@contextlib.contextmanager
def local_copy(path: StoragePath, names: Iterable[str]) -> Iterator[Path]:
    """Have some files of a folder on this machine: a folder of it as it is, of an object store a copy for a while.

    Raises:
        FileNotFoundError: One is not on the object store.
        StorageError: The store cannot be read.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="eagle3-copy-") as name:
        copy_objects(path, names, Path(name))
        yield Path(name)


@contextlib.contextmanager
def telling(path: StoragePath, may_be_absent: bool = True) -> Iterator[None]:
    """Turn what a store's client raises into one error that names the path and what to set.

    Args:
        path: what is read or written; on this machine, nothing is turned.
        may_be_absent: let a FileNotFoundError through; else it means that the bucket is not there.

    Raises:
        StorageError: The store refuses, cannot be reached, or has no such bucket.
    """
    if isinstance(path, Path):
        yield
        return
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:  # the latter for a file of credentials that cannot be read
        if may_be_absent and isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # a disk of this machine, which the store's content goes to
        found = " ".join(str(error).split())[:MAX_ERROR_LENGTH]
        raise StorageError(f"{path}: the object store cannot be used ({found}). {STORES[path.scheme]}") from error


@functools.cache
def _open_filesystem(scheme: str) -> Any:
    """Return the client of a kind of store, as the environment configures it."""
    import pyarrow.fs

    if scheme == "gs":
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")  # as Google's own clients name it
        limit = datetime.timedelta(seconds=GCS_RETRY_TIME_S)
        if not emulator:
            return pyarrow.fs.GcsFileSystem(retry_time_limit=limit)
        return pyarrow.fs.GcsFileSystem(anonymous=True, retry_time_limit=limit, **_endpoint(emulator))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return pyarrow.fs.S3FileSystem(
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        **(_endpoint(endpoint) if endpoint else {}),
    )


def _endpoint(url: str) -> dict[str, str]:
    """Split `http://host:port` as Arrow wants it."""
    scheme, _, host = url.rpartition("://")
    return {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")}
