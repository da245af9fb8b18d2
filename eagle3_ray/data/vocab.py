"""Token counts -> which verifier ids the draft keeps, and the two files that say so.

verifier id       0  1  2  3  4  5        V = 3 of W = 6 kept: the most frequent, ties to the smaller id
count             0  9  1  7  0  7
in_draft_vocab    F  T  F  T  F  T        t2d.npy: a mask, not a map
draft id             0     1     2
offset               1     2     3        d2t.npy: verifier id = draft id + offset
"""

import contextlib
import hashlib
import io
import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle3_ray.data.sample_file import DAMAGED_FILE_ERRORS
from eagle3_ray.errors import VocabMappingError
from eagle3_ray.storage import ObjectPath, to_path, write_atomically

DEFAULT_DRAFT_VOCAB_SIZE = 32000
MAKE_AGAIN = "Make both again with `eagle3-ray vocab-mapping`."


@dataclass(frozen=True)
class VocabMapping:
    """The draft's vocabulary of V ids inside the verifier's of W.

    Attributes:
        draft_to_verifier_offset: [V] int64; verifier id of draft id i is i + offset[i], ascending in i.
        in_draft_vocab: [W] bool, True for a kept verifier id; V of them.
    """

    draft_to_verifier_offset: Tensor
    in_draft_vocab: Tensor

    @property
    def kept_ids(self) -> Tensor:
        """The verifier id of each draft id, [V] int64, ascending."""
        return torch.arange(len(self.draft_to_verifier_offset)) + self.draft_to_verifier_offset

    @property
    def is_full(self) -> bool:
        """Whether all of the verifier's ids are kept; a server needs no mapping then."""
        return len(self.draft_to_verifier_offset) == len(self.in_draft_vocab)

    def digest(self) -> str:
        """Return a hex SHA-256 of the kept ids and W."""
        digest = hashlib.sha256(f"{len(self.in_draft_vocab)}".encode())
        digest.update(self.kept_ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def full_vocab(vocab_size: int) -> VocabMapping:
    """Keep all ids of a verifier of W."""
    return keep_ids(torch.arange(vocab_size), vocab_size)


def choose_vocab(counts: NDArray[np.int64], draft_vocab_size: int) -> VocabMapping:
    """Keep the most frequent ids; ties go to the smaller id, and unused ids fill up from the smallest.

    Args:
        counts: [W] int64, times each verifier id is supervised.
        draft_vocab_size: V.

    Raises:
        VocabMappingError: V is more than W.
    """
    if not 0 < draft_vocab_size <= len(counts):
        raise VocabMappingError(
            f"a draft vocabulary of {draft_vocab_size} ids was asked for, the verifier has {len(counts)}. "
            f"Set --draft-vocab-size to 1..{len(counts)}."
        )
    by_count = np.argsort(-counts, kind="stable")
    kept = np.sort(by_count[:draft_vocab_size]).astype(np.int64)
    return keep_ids(torch.from_numpy(kept), len(counts))


def keep_ids(kept_ids: Tensor, vocab_size: int) -> VocabMapping:
    """Return the vocabulary of these ids [V] int64, ascending, out of W."""
    in_draft_vocab = torch.zeros(vocab_size, dtype=torch.bool)
    in_draft_vocab[kept_ids] = True
    return VocabMapping(kept_ids - torch.arange(len(kept_ids)), in_draft_vocab)


def read_token_freq(path: str, vocab_size: int) -> NDArray[np.int64]:
    """Read `token_freq.pt`, a dict {token id: count over supervised tokens}.

    Args:
        path: the file.
        vocab_size: W.

    Returns:
        [W] int64 counts.

    Raises:
        VocabMappingError: The file is missing, damaged, no such dict, counts nothing, or does not fit the verifier.
    """
    advice = "Make it with `eagle3-ray generate`, or leave it out and count from the samples (--data-path)."
    try:
        content = torch.load(io.BytesIO(to_path(path).read_bytes()), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise VocabMappingError(f"{path}: no such token-frequency file. {advice}") from error
    except DAMAGED_FILE_ERRORS as error:
        raise VocabMappingError(
            f"{path}: cannot be read as a token-frequency file ({type(error).__name__}), expected a dict "
            f"{{token id: count}} written by torch.save. {advice}"
        ) from error
    is_counts = isinstance(content, dict) and all(
        type(key) is int and type(value) is int and value >= 0 for key, value in content.items()
    )
    if not is_counts:
        found = "a dict with other entries" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise VocabMappingError(f"{path}: holds {found}, expected a dict {{token id: count >= 0}}, all int. {advice}")
    outside = [key for key in content if not 0 <= key < vocab_size]
    if outside:
        raise VocabMappingError(
            f"{path}: counts {len(outside)} ids outside the verifier's vocabulary 0..{vocab_size - 1}, such as "
            f"{max(outside, key=abs)}. It belongs to another verifier: correct --target-vocab-size or "
            f"--target-model-path, or count again."
        )
    if sum(content.values()) == 0:
        raise VocabMappingError(f"{path}: counts no token at all, expected counts over supervised tokens. {advice}")
    counts = np.zeros(vocab_size, dtype=np.int64)
    counts[list(content)] = list(content.values())
    return counts


def write_token_freq(path: str, counts: NDArray[np.int64]) -> None:
    """Write counts [W] as the dict {token id: count > 0}, under a temporary name first.

    Raises:
        VocabMappingError: The file cannot be written.
    """
    ids = np.flatnonzero(counts)
    content = dict(zip(ids.tolist(), counts[ids].tolist(), strict=True))
    _write_files({path: lambda file: torch.save(content, file)})


def read_mapping(d2t_path: str, t2d_path: str, vocab_size: int, draft_vocab_size: int | None) -> VocabMapping:
    """Read `d2t.npy` and `t2d.npy` and check that they fit each other and the verifier.

    Args:
        d2t_path: int64 [V] offsets.
        t2d_path: bool [W] mask.
        vocab_size: W of the verifier.
        draft_vocab_size: V asked for, None for whatever the files say.

    Raises:
        VocabMappingError: A file is missing or damaged, or something does not fit; the message lists all of it.
    """
    offsets, mask = _read_array(d2t_path), _read_array(t2d_path)
    problems = []
    if offsets.dtype != np.int64 or offsets.ndim != 1:
        problems.append(f"{d2t_path} is {offsets.dtype} {list(offsets.shape)}, expected int64 [draft vocabulary]")
    if mask.dtype != np.bool_ or mask.ndim != 1:
        problems.append(f"{t2d_path} is {mask.dtype} {list(mask.shape)}, expected bool [verifier vocabulary]")
    if not problems:
        problems = _problems_of_mapping(offsets, mask, d2t_path, t2d_path, vocab_size, draft_vocab_size)
    if problems:
        raise VocabMappingError(
            "the vocabulary mapping cannot be used:\n  - " + "\n  - ".join(problems) + f"\n  {MAKE_AGAIN}"
        )
    return VocabMapping(torch.from_numpy(offsets), torch.from_numpy(mask))


def _problems_of_mapping(
    offsets: NDArray[np.int64],
    mask: NDArray[np.bool_],
    d2t_path: str,
    t2d_path: str,
    vocab_size: int,
    draft_vocab_size: int | None,
) -> list[str]:
    problems = []
    if len(mask) != vocab_size:
        problems.append(f"{t2d_path} is for a verifier of {len(mask)} tokens, this one has {vocab_size}")
    if draft_vocab_size is not None and len(offsets) != draft_vocab_size:
        problems.append(f"{d2t_path} keeps {len(offsets)} ids, --draft-vocab-size asks for {draft_vocab_size}")
    kept = np.flatnonzero(mask)
    if np.array_equal(offsets, kept) and not np.array_equal(offsets, kept - np.arange(len(kept))):
        problems.append(f"{d2t_path} holds verifier ids, expected offsets (verifier id = draft id + offset)")
    elif len(offsets) != len(kept):
        problems.append(f"{d2t_path} keeps {len(offsets)} ids, {t2d_path} keeps {len(kept)}; both must keep the same")
    else:
        other = np.flatnonzero(np.arange(len(offsets)) + offsets != kept)
        if len(other):
            i = int(other[0])
            problems.append(
                f"{d2t_path} maps draft id {i} to verifier id {i + int(offsets[i])}, by {t2d_path} it is {kept[i]} "
                f"({len(other)} of {len(kept)} ids differ)"
            )
    if len(offsets) == 0:
        problems.append(f"{d2t_path} keeps no id")
    return problems


def _read_array(path: str) -> NDArray[Any]:
    try:
        array = np.load(io.BytesIO(to_path(path).read_bytes()), allow_pickle=False)
    except FileNotFoundError as error:
        raise VocabMappingError(
            f"{path}: no such file; a mapping is d2t.npy and t2d.npy together. {MAKE_AGAIN}"
        ) from error
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise VocabMappingError(f"{path}: is not a readable .npy file ({error}). {MAKE_AGAIN}") from error
    if not isinstance(array, np.ndarray):
        raise VocabMappingError(f"{path}: is an archive of arrays, expected one .npy array. {MAKE_AGAIN}")
    return array


def write_mapping(mapping: VocabMapping, d2t_path: str, t2d_path: str) -> None:
    """Write both files; earlier ones stay as they are until both new ones are whole.

    Raises:
        VocabMappingError: A file cannot be written.
    """
    offsets, mask = mapping.draft_to_verifier_offset.numpy(), mapping.in_draft_vocab.numpy()
    _write_files({d2t_path: lambda file: np.save(file, offsets), t2d_path: lambda file: np.save(file, mask)})


def _write_files(writers: dict[str, Callable[[IO[bytes]], object]]) -> None:
    """Write each file under a temporary name beside its place; rename when all are on disk. Objects need no such."""
    contents = {}
    for name, write in writers.items():
        buffer = io.BytesIO()
        write(buffer)
        contents[to_path(name)] = buffer.getvalue()
    temporary = {}
    try:
        for path, content in contents.items():
            if isinstance(path, ObjectPath):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            write_atomically(temporary[path], content)
        for path, written in temporary.items():
            os.replace(written, path)
    except OSError as error:
        for written in temporary.values():
            with contextlib.suppress(OSError):  # not there, or as unwritable as what is reported
                written.unlink()
        raise VocabMappingError(
            f"{', '.join(writers)}: cannot be written ({error.strerror}). Choose a folder that can be."
        ) from error
    for path, content in contents.items():
        if isinstance(path, ObjectPath):
            path.write_bytes(content)
