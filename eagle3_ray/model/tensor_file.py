"""Single tensors out of a safetensors file, on this machine or on an object store.

    8 bytes: N, little-endian    N bytes: JSON {name: {dtype, shape, data_offsets}}    the tensors' bytes

From an object store only the header and the bytes asked for are fetched.

Source: https://github.com/huggingface/safetensors (format).
"""

import json
import struct
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eagle3_ray.storage import ObjectPath, StoragePath, telling

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def read_tensor_names(path: StoragePath) -> list[str]:
    """Return the names of all tensors in a file.

    Raises:
        OSError: The file cannot be read.
        SafetensorError: It is no safetensors file.
        StorageError: The object store cannot be read.
    """
    if isinstance(path, ObjectPath):
        with path.open_input() as file:
            return list(_read_header(file, path)[0])
    with safe_open(path, framework="pt") as local:
        return list(local.keys())


def read_tensor(path: StoragePath, name: str) -> Tensor:
    """Return one tensor, in the file's dtype, on the CPU. Errors as in `read_tensor_names`."""
    if not isinstance(path, ObjectPath):
        with safe_open(path, framework="pt") as local:
            tensor: Tensor = local.get_tensor(name)
        return tensor
    with path.open_input() as file:
        entries, start = _read_header(file, path)
        if name not in entries:
            raise SafetensorError(f"File does not contain tensor {name}")
        begin, end = _offsets(entries[name], file.size() - start)
        with telling(path):
            content: bytes = file.read_at(end - begin, start + begin)
    # A file of this one tensor, for the library to check and read.
    header = json.dumps({name: {**entries[name], "data_offsets": [0, end - begin]}}).encode()
    return safetensors.torch.load(struct.pack("<Q", len(header)) + header + content)[name]


def _offsets(entry: Any, num_bytes: int) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end among so many; the library checks the rest of the entry."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    match offsets:
        case [int(begin), int(end)] if 0 <= begin <= end <= num_bytes:
            return begin, end
    raise SafetensorError(f"invalid offset: {offsets} of {num_bytes} bytes of tensors")


def _read_header(file: Any, path: ObjectPath) -> tuple[dict[str, Any], int]:
    """Return the entries by name, and where the tensors' bytes begin."""
    with telling(path):
        head: bytes = file.read_at(8, 0)
        num_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER_BYTES + 1
        if num_bytes > min(MAX_HEADER_BYTES, file.size()):
            raise SafetensorError(f"header of {num_bytes} bytes in a file of {file.size()}")
        text: bytes = file.read_at(num_bytes, 8)
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise SafetensorError(f"header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise SafetensorError("header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries, 8 + num_bytes
