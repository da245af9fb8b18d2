"""The folder of generated samples: written whole or not at all, never a mixture of two verifiers.

    data_config.json    what every sample here was made from; a run with another verifier, other layers or other
                        conversations is refused, so that running the same command again only fills gaps
    data_<n>.pt         v1 sample of line n+1
    token_freq.pt       counts over supervised tokens, written last

A file is written under a name with a leading dot and then renamed: readers never see half of one.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from eagle3_ray.data.samples import Sample, SampleSpec, inspect_sample
from eagle3_ray.errors import DataError
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.storage import ObjectPath, StoragePath, telling, to_path, write_atomically

CONFIG_NAME = "data_config.json"
TOKEN_FREQ_NAME = "token_freq.pt"
PRODUCER = "eagle3_ray generate"

NUM_WEIGHT_PROBES, PROBE_BYTES = 16, 65536
SMALL_FILE_SUFFIXES = (".json", ".jinja", ".model")
WEIGHT_FILE_SUFFIXES = (".safetensors", ".bin")

# May differ between a run and its resumption: they say where things lay, not what they are.
INFORMATIVE_FIELDS = frozenset({"producer_version", "verifier_name_or_path", "conversations_path"})


class DataConfig(BaseModel):
    """What the samples of a folder were made from, and what they hold (`data_config.json`).

    Attributes:
        producer: always `PRODUCER`; other generators write files of this name too.
        producer_version: version of eagle3_ray.
        data_format_version: 1: the last state is the one before the verifier's final norm.
        verifier_name_or_path: hub id, or absolute path.
        verifier_digest: changes when the verifier's weights, config, tokenizer or chat template do.
        verifier_dtype: in which the states were computed.
        aux_layer_ids: serving numbering: id k is the state that enters layer k.
        aux_layer_numbering: always "serving"; said because other generators store the layers' outputs.
        states_dtype: in which the states are stored.
        hidden_size: H.
        vocab_size: W, the verifier's.
        conversations_path: absolute path.
        conversations_sha256: digest of that file.
        max_seq_len: tokens the samples were cut at.
        skip_first_tokens: leading tokens of plain text that are not supervised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    producer: str = PRODUCER
    producer_version: str
    data_format_version: int = 1
    verifier_name_or_path: str
    verifier_digest: str
    verifier_dtype: str
    aux_layer_ids: tuple[int, ...]
    aux_layer_numbering: str = "serving"
    states_dtype: str = "bfloat16"
    hidden_size: int
    vocab_size: int
    conversations_path: str
    conversations_sha256: str
    max_seq_len: int
    skip_first_tokens: int

    @property
    def sample_spec(self) -> SampleSpec:
        """What the samples must look like; whether the last state is normed is not asked of our own files."""
        return SampleSpec(1, self.hidden_size, len(self.aux_layer_ids), self.vocab_size, None, 0.0)


def read_data_config(folder: StoragePath) -> DataConfig | None:
    """Read `data_config.json`; None if the folder or the file is not there.

    Raises:
        DataError: The file is there, but this program did not write it, or it is damaged.
    """
    path = folder / CONFIG_NAME
    try:
        return DataConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, item["loc"])) or "the JSON itself" for item in error.errors()}))
        raise DataError(
            f"{path}: not a file that {PRODUCER} wrote (wrong: {fields}). Samples of another generator cannot be "
            "added to; choose another --output-path."
        ) from error


def check_folder(folder: StoragePath, config: DataConfig) -> None:
    """Refuse to add to samples that were made from something else. Changes nothing.

    Args:
        folder: may be absent.
        config: what this run would generate.

    Raises:
        DataError: The folder holds samples made from something else, or from nobody knows what.
    """
    there = read_data_config(folder)
    if there is None:
        strangers = sorted(path.name for path in folder.iterdir() if path.suffix == ".pt") if folder.is_dir() else []
        if strangers:
            shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
            raise DataError(
                f"{folder}: holds {len(strangers)} .pt files ({shown}) but no {CONFIG_NAME}, so what they were made "
                "from is not known. Choose another --output-path."
            )
        return
    old, new = there.model_dump(), config.model_dump()
    differing = [name for name in new if name not in INFORMATIVE_FIELDS and old[name] != new[name]]
    if differing:
        lines = [f"  {name}: {_shown(old[name])} there, {_shown(new[name])} now" for name in differing]
        raise DataError(
            "\n".join([f"{folder / CONFIG_NAME}: the samples there were made from something else:", *lines])
            + "\nNothing was changed. Give the settings of then, or another --output-path."
        )


def claim_folder(folder: StoragePath, config: DataConfig) -> None:
    """Make the folder and say in it what its samples are made from; take away what a killed run left half-written.

    Args:
        folder: passed `check_folder`.
        config: what this run generates.

    Raises:
        DataError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(folder, Path):  # objects appear whole or not at all
            for leftover in folder.glob(".data_*.pt.tmp"):
                leftover.unlink()
        write_atomically(folder / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}). Choose another --output-path.") from error


def sample_path(folder: StoragePath, line_number: int) -> StoragePath:
    """Return where the sample of a line (counted from 1) lies."""
    return folder / f"data_{line_number - 1}.pt"


def write_sample(path: StoragePath, input_ids: Tensor, loss_mask: Tensor, states: list[Tensor]) -> None:
    """Write one v1 sample under a temporary name and rename it.

    Args:
        path: from `sample_path`.
        input_ids: [S] int64.
        loss_mask: [S] bool; stored as int64.
        states: A auxiliary states and the last one before the final norm, [S, H] bfloat16, each with its own storage.

    Raises:
        DataError: It cannot be written, for instance because the disk is full.
        StorageError: The object store cannot be written.
    """
    content = {"input_ids": input_ids, "loss_mask": loss_mask.to(torch.int64), "hidden_states": states}
    if isinstance(path, ObjectPath):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path.write_bytes(buffer.getvalue())
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:  # given a path, torch reports a full disk as an error of its own
            torch.save(content, file)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}). Samples that are written stay; type the "
            "same command to go on."
        ) from error


def read_whole_sample(path: StoragePath, spec: SampleSpec) -> Sample | None:
    """Return a sample that is there and whole, its states left on disk; None if it must be generated."""
    if not path.is_file():
        return None
    sample = inspect_sample(str(path), spec)
    return sample if isinstance(sample, Sample) else None


def digest_verifier(info: VerifierInfo) -> str:
    """Return a digest that changes when the verifier does, without reading gigabytes.

    A folder, local or on an object store: its small files whole, and of each file of weights the size and 16 evenly
    spaced pieces of 64 KiB; training touches every weight. A hub repository: the commit, by which its local copy is
    named.
    """
    folder = to_path(info.name_or_path)
    if isinstance(folder, Path) and not folder.is_dir():
        return Path(hf_hub_download(info.name_or_path, "config.json")).parent.name
    digest = hashlib.sha256()
    paths: list[StoragePath] = [*folder.iterdir()]
    for path in sorted(paths, key=lambda path: path.name):
        if path.suffix in SMALL_FILE_SUFFIXES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in WEIGHT_FILE_SUFFIXES:
            for piece in _iter_probes(path):
                digest.update(piece)
    return digest.hexdigest()


def _iter_probes(path: StoragePath) -> Iterator[bytes]:
    """Yield a file's name and size, then pieces of it, a request each on an object store."""
    opened = path.open_input() if isinstance(path, ObjectPath) else path.open("rb")
    with telling(path), opened as file:
        num_bytes = file.seek(0, os.SEEK_END)
        yield f"{path.name}\0{num_bytes}\0".encode()
        for probe in range(NUM_WEIGHT_PROBES):
            file.seek(max(num_bytes - PROBE_BYTES, 0) * probe // (NUM_WEIGHT_PROBES - 1))
            yield file.read(PROBE_BYTES)


def _shown(value: object) -> object:
    """Return a value short enough for a message: digests are cut."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) >= 40 else value
