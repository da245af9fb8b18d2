"""Open one `.pt` file and recognise what it holds by its whole key set.

    v1  input_ids [S]  loss_mask [S]  hidden_states: list of A+1 tensors [S, H], the last one before the final norm
    v0  input_ids [S]  loss_mask [S]  hidden_state [S, A*H]   target [S, H], the last state after the final norm

Other producers use the same names for other things (SpecForge's `hidden_state` is the last state), so one key
never decides. `samples` checks the tensors.
"""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle3_ray.data.remote_file import CompressedFile, check_stored, load_remote_file, load_remote_rows
from eagle3_ray.storage import ObjectPath, is_remote, to_path

KEYS = {
    0: frozenset({"input_ids", "loss_mask", "hidden_state", "target"}),
    1: frozenset({"input_ids", "loss_mask", "hidden_states"}),
}
SPECFORGE_KEYS = frozenset({"input_ids", "loss_mask", "hidden_state", "aux_hidden_state"})

TOKEN_FREQUENCIES = "token frequencies, not a sample"  # the one kind of problem that an index passes over quietly
MAX_KEYS_NAMED, MAX_KEY_LENGTH = 12, 40
REGENERATE = "Regenerate the file or move it away."

# What torch.load raises on damaged sample files (tests/faults); struct.error is a mere Exception.
DAMAGED_FILE_ERRORS = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, MemoryError,
    ArithmeticError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Why a file is no usable sample.

    Attributes:
        kind: the same words for all files with this problem, to count by.
        detail: what was expected and what was found in this file.
        advice: what to do.
    """

    kind: str
    detail: str
    advice: str = REGENERATE


def read_sample_file(
    path: str, data_format_version: int, rows_of: Callable[[int], Sequence[int]] | None = None
) -> dict[str, object] | Problem:
    """Return the content of a file whose keys are those of the format asked for, else why it is not.

    The tensors of a local file are mapped, not read: their bytes are fetched when they are used.

    Args:
        path: a file, local or on an object store.
        data_format_version: 0 or 1.
        rows_of: from an object store fetch only these rows of the last state, of so many, besides ids and mask; the
            states are undefined elsewhere. None fetches the whole file.

    Raises:
        StorageError: The object store cannot be read.
    """
    try:
        content = _load(path, data_format_version, rows_of)
    except DAMAGED_FILE_ERRORS as error:
        return _problem_of_unreadable_file(path, error)
    if isinstance(content, Mapping) and frozenset(content) == KEYS[data_format_version]:
        return _take_plain_tensors(path, content)
    return _problem_of_other_content(content, data_format_version)


def _load(path: str, version: int, rows_of: Callable[[int], Sequence[int]] | None) -> Any:
    place = to_path(path)
    if not isinstance(place, ObjectPath):
        check_stored(str(place))
        return torch.load(place, map_location="cpu", mmap=True, weights_only=True)
    if rows_of is None:
        return load_remote_file(place)
    return load_remote_rows(place, lambda content: _last_state_of(content, version), rows_of)


def _last_state_of(content: object, version: int) -> Tensor | None:
    """Return the tensor that would be the last state, of a content not yet checked."""
    if not isinstance(content, Mapping):
        return None
    state = content.get("target") if version == 0 else content.get("hidden_states")
    if isinstance(state, list | tuple):
        state = state[-1] if state else None
    return state if isinstance(state, Tensor) else None


def _take_plain_tensors(path: str, content: Mapping[str, object]) -> dict[str, object] | Problem:
    """Return the content with its tensors as mere values, without gradients; a problem if one is more than that."""
    taken: dict[str, object] = {}
    for name, value in content.items():
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            problem = _problem_of_odd_tensor(path, name, part) if isinstance(part, Tensor) else None
            if problem is not None:
                return problem
        plain = [part.detach() if isinstance(part, Tensor) else part for part in parts]
        taken[name] = plain if parts is value else plain[0]
    return taken


def _problem_of_odd_tensor(path: str, name: str, tensor: Tensor) -> Problem | None:
    """Refuse what torch.load also builds: tensors without bytes of their own, or of a terabyte out of a few."""
    is_dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_neg())
    if not is_dense or tensor.device.type != "cpu":
        return Problem("another shape or dtype", f"{name} is not a plain tensor of values that lie in the file.")
    num_claimed = tensor.numel() * tensor.element_size()
    # A view may show a value many times, as an expanded mask does; not more often than the file is long.
    if num_claimed > tensor.untyped_storage().nbytes() and num_claimed > (num_bytes := _read_head(path)[0]):
        shape = f"{tensor.dtype} {list(tensor.shape)}"
        return Problem("another shape or dtype", f"{name} is {shape}, which a file of {num_bytes:,} bytes cannot hold.")
    return None


def _read_head(path: str) -> tuple[int, bytes]:
    """Return a file's size and its first four bytes."""
    place = to_path(path)
    if isinstance(place, ObjectPath):
        with place.open_input() as stored:
            return stored.size(), stored.read(4)
    with place.open("rb") as file:
        return os.path.getsize(place), file.read(4)


def _problem_of_unreadable_file(path: str, error: Exception) -> Problem:
    try:
        num_bytes, head = _read_head(path)
    except OSError as os_error:
        found = "no such object" if is_remote(path) else os_error.strerror
        return Problem(
            "cannot be opened",
            f"cannot be opened ({found}), expected a sample.",
            "On a cluster every node must see the data at the same path and may read it.",
        )
    if num_bytes == 0:
        return Problem("empty", "is empty (0 bytes), expected a sample.")
    if not head.startswith(b"PK"):
        return Problem(
            "not a torch file",
            f"is not a file that torch.save writes (it begins with {head!r}), expected its zip form.",
            "Save it again with torch.save of a current torch, or move it away.",
        )
    if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
        return Problem(
            "holds Python objects",
            "holds Python objects other than tensors, which are never loaded; expected a dict of tensors.",
            "Save plain tensors, or move the file away.",
        )
    if isinstance(error, CompressedFile):
        return Problem(
            "compressed",
            f"is a zip whose entries are compressed ({error}), expected them stored as torch.save does.",
            "Save it again with torch.save, or move it away.",
        )
    return Problem(
        "cut short or damaged",
        f"is cut short or damaged ({num_bytes:,} bytes; {type(error).__name__}), expected a sample.",
        "Wait if it is still being written, else regenerate the file or move it away.",
    )


def _problem_of_other_content(content: object, version: int) -> Problem:
    """Say what a readable file is, if not a sample of this version."""
    wanted = f"expected a v{version} sample {_braced(KEYS[version])}."
    if not isinstance(content, Mapping):
        return Problem("not a sample", f"holds a {type(content).__name__}, {wanted}")
    if content and all(isinstance(key, int) and isinstance(value, int) for key, value in content.items()):
        return Problem(TOKEN_FREQUENCIES, f"is a token-frequency file (dict of int to int), {wanted}", "Move it away.")
    keys = frozenset(content)
    found = f"{_braced(keys)}, {wanted}"
    if keys == KEYS[1 - version]:
        advice = f"Pass --data-format-version {1 - version}, or regenerate the file."
        return Problem(f"a v{1 - version} sample", f"is a v{1 - version} sample {found}", advice)
    if keys == SPECFORGE_KEYS:
        return Problem("a SpecForge sample", f"is a SpecForge sample, whose hidden_state is the last state, {found}")
    missing = KEYS[version] - keys
    lacks = f"lacks {', '.join(sorted(missing))}: " if missing else ""
    return Problem("not a sample", f"{lacks}has the keys {found}")


def _braced(keys: frozenset[object]) -> str:
    """Return the first few keys, as any terminal can show them."""
    names = sorted(str(key)[:MAX_KEY_LENGTH].encode(errors="backslashreplace").decode() for key in keys)
    more = [f"... {len(names) - MAX_KEYS_NAMED} more"] if len(names) > MAX_KEYS_NAMED else []
    return "{" + ", ".join(names[:MAX_KEYS_NAMED] + more) + "}"
