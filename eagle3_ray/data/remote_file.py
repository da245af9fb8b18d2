"""Reading a `.pt` file that lies on an object store: all of it, or only what an index needs.

torch.save writes an uncompressed zip: a small pickle that names dtypes, shapes and entries, and the bytes of each
tensor as an entry of its own. So the pickle alone tells where each tensor lies, and a few small requests
fetch the token ids, the mask and some rows of a state out of a file of many megabytes.
"""

import errno
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from eagle3_ray.errors import StorageError
from eagle3_ray.storage import ObjectPath, telling

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 64 * 1024
SMALL_TENSOR_BYTES = 1024 * 1024  # fetched whole, as are vectors of any length: ids and masks
MSDOS_FOLDER = 0x10  # in an entry's external attributes


class CompressedFile(ValueError):
    """A zip whose entries are compressed: their bytes are not those of a tensor, and may unpack to any size."""


def check_stored(file: str | IO[bytes]) -> None:
    """Look at a zip's directory alone: is every entry a file stored as it is, as torch.save does?

    torch.load does not ask when it maps a file, and would take compressed bytes for values. An entry that calls itself
    a folder it takes for a file and reads nothing of: the values would be whatever the memory held before.

    Raises:
        CompressedFile: One is compressed.
        BadZipFile: One is a folder.
        Exception: What zipfile raises on a damaged file.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CompressedFile(entry.filename)
        if entry.is_dir() or entry.external_attr & MSDOS_FOLDER:
            raise zipfile.BadZipFile(f"{entry.filename} is a folder")


def load_remote_file(path: ObjectPath) -> Any:
    """Fetch a file in one request and load it; nothing is unpickled but tensors and plain containers.

    Raises:
        FileNotFoundError: There is no such object.
        StorageError: The store cannot be read.
        Exception: What torch.load raises on a damaged file.
    """
    with path.open_input() as file, telling(path):
        content = file.read_buffer()
    import pyarrow as pa

    check_stored(pa.BufferReader(content))
    return torch.load(pa.BufferReader(content), map_location="cpu", weights_only=True)


def load_remote_rows(
    path: ObjectPath, choose: Callable[[object], Tensor | None], rows_of: Callable[[int], Sequence[int]]
) -> Any:
    """Load a file without most of its bytes: of one big tensor some rows are fetched, of the others none.

    Args:
        path: the file.
        choose: from the content, the tensor whose rows are fetched.
        rows_of: which of them, from their number.

    Returns:
        What torch.load returns, on the CPU. What was not fetched is undefined, and its memory never touched.

    Raises:
        As `load_remote_file`.
    """
    with path.open_input() as file:
        reader = BlockReader(file, path)
        try:
            check_stored(cast(IO[bytes], reader))
            reader.seek(0)
            # The meta device: tensors without bytes, each knowing where its bytes lie in the file.
            content = torch.load(cast(IO[bytes], reader), map_location="meta", weights_only=True)
        finally:
            reader.raise_failure()
        chosen = choose(content)

        def fetch(tensor: Tensor) -> Tensor:
            if tensor.dim() <= 1 or _span(tensor) * tensor.element_size() <= SMALL_TENSOR_BYTES:
                return _fetch_tensor(reader, tensor)
            return _fetch_rows(reader, tensor, rows_of(len(tensor)) if tensor is chosen else ())

        return _map_tensors(content, fetch)


class BlockReader(io.RawIOBase):
    """A remote file as torch.load reads one, in blocks that are kept: the format's many tiny reads become few."""

    def __init__(self, file: "pyarrow.NativeFile", path: ObjectPath) -> None:
        self._file, self._path = file, path
        self._size, self._position = int(file.size()), 0
        self._blocks: dict[int, bytes] = {}
        self._failure: StorageError | None = None

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the new position.

        Raises:
            OSError: It would lie before the beginning.
        """
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or what the file's end leaves of it: torch takes a short read for a damaged file."""
        view, num_filled = memoryview(buffer).cast("B"), 0
        while num_filled < len(view) and self._position < self._size:
            number, start = divmod(self._position, BLOCK_BYTES)
            if number not in self._blocks:
                self._blocks[number] = self.read_at(number * BLOCK_BYTES, BLOCK_BYTES)
            piece = self._blocks[number][start : start + len(view) - num_filled]
            view[num_filled : num_filled + len(piece)] = piece
            self._position, num_filled = self._position + len(piece), num_filled + len(piece)
        return num_filled

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Fetch some bytes; fewer at the end of the file.

        Raises:
            EOFError: They begin after it.
            StorageError: The store cannot be read.
        """
        if offset > self._size:
            raise EOFError(f"byte {offset} of a file of {self._size}")
        try:
            with telling(self._path):
                content: bytes = self._file.read_at(min(num_bytes, self._size - offset), offset)
        except StorageError as error:
            self._failure = error
            raise
        return content

    def raise_failure(self) -> None:
        """Raise the store's error if there was one: torch.load may have hidden it behind one of its own."""
        if self._failure is not None:
            raise self._failure


def _map_tensors(value: Any, fetch: Callable[[Tensor], Tensor], depth: int = 2) -> Any:
    """Return the same content with every tensor in it replaced, as deep as those of a sample lie."""
    if isinstance(value, Tensor):
        return fetch(value)
    # A content without end, which refers to itself, can be saved too.
    if isinstance(value, dict) and depth > 0:
        return {key: _map_tensors(part, fetch, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple) and depth > 0:
        return [_map_tensors(part, fetch, depth - 1) for part in value]
    return value


def _storage_offset_bytes(tensor: Tensor) -> int:
    """Return where the storage of a meta tensor lies in its file."""
    # Left there by torch for loaders that read storages themselves.
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None
    return offset


def _span(tensor: Tensor) -> int:
    """Return how many elements of its storage lie from a tensor's first to its last: views share large storages."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _fetch_tensor(reader: BlockReader, tensor: Tensor, storage_offset_bytes: int | None = None) -> Tensor:
    """Fetch all of a tensor in one request, from a storage that begins there (a row of a tensor cannot tell)."""
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    start = _storage_offset_bytes(tensor) if storage_offset_bytes is None else storage_offset_bytes
    start += int(tensor.storage_offset()) * tensor.element_size()
    content = reader.read_at(start, _span(tensor) * tensor.element_size())
    return torch.frombuffer(bytearray(content), dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _fetch_rows(reader: BlockReader, tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Fetch some rows of a matrix, a request each; rows of anything else are left undefined."""
    fetched = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.dim() == 2:
        for row in rows:
            fetched[row] = _fetch_tensor(reader, tensor[row], _storage_offset_bytes(tensor))
    return fetched
