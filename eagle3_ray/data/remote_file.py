"""Reading a `.pt` file that lies on an object store: all of it, or only what an index needs.

torch.save writes an uncompressed zip: a small pickle that names dtypes, shapes and entries, and the bytes of each
tensor as an entry of its own. So the pickle alone tells where each tensor lies, and a few small requests
fetch the token ids, the mask and some rows of a state out of a file of many megabytes.
"""

import io
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from eagle3_ray.storage import ObjectPath, telling

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 64 * 1024
SMALL_TENSOR_BYTES = 1024 * 1024  # fetched whole: ids and masks


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
        # The meta device: tensors without bytes, each knowing where its bytes lie in the file.
        content = torch.load(cast(IO[bytes], reader), map_location="meta", weights_only=True)
        chosen = choose(content)

        def fetch(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().nbytes() <= SMALL_TENSOR_BYTES:
                return _fetch_tensor(reader, tensor)
            return _fetch_rows(reader, tensor, rows_of(len(tensor)) if tensor is chosen else ())

        return _map_tensors(content, fetch)


class BlockReader(io.RawIOBase):
    """A remote file as torch.load reads one, in blocks that are kept: the format's many tiny reads become few."""

    def __init__(self, file: "pyarrow.NativeFile", path: ObjectPath) -> None:
        self._file, self._path = file, path
        self._size, self._position = int(file.size()), 0
        self._blocks: dict[int, bytes] = {}

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
        """Move, and return the new position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer up to the end of the block, or of the file."""
        number, start = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._size:
            return 0
        if number not in self._blocks:
            self._blocks[number] = self.read_at(number * BLOCK_BYTES, BLOCK_BYTES)
        piece = self._blocks[number][start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Fetch some bytes; fewer at the end of the file."""
        with telling(self._path):
            content: bytes = self._file.read_at(min(num_bytes, self._size - offset), offset)
        return content


def _map_tensors(value: Any, fetch: Callable[[Tensor], Tensor]) -> Any:
    """Return the same content with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return fetch(value)
    if isinstance(value, dict):
        return {key: _map_tensors(part, fetch) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_map_tensors(part, fetch) for part in value]
    return value


def _storage_offset_bytes(tensor: Tensor) -> int:
    """Return where the storage of a meta tensor lies in its file."""
    # Left there by torch for loaders that read storages themselves.
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None
    return offset


def _fetch_tensor(reader: BlockReader, tensor: Tensor) -> Tensor:
    """Fetch a tensor's whole storage in one request."""
    content = reader.read_at(_storage_offset_bytes(tensor), tensor.untyped_storage().nbytes())
    flat = torch.frombuffer(bytearray(content), dtype=tensor.dtype) if content else torch.empty(0, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _fetch_rows(reader: BlockReader, tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Fetch some rows of a matrix, a request each; rows of anything else are left undefined."""
    fetched = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.dim() == 2:
        for row in rows:
            start = int(tensor[row].storage_offset()) * tensor.element_size()
            content = reader.read_at(_storage_offset_bytes(tensor) + start, tensor.shape[1] * tensor.element_size())
            fetched[row] = torch.frombuffer(bytearray(content), dtype=tensor.dtype)
    return fetched
