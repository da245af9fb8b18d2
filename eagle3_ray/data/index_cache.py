"""What was learnt of each file at its size and time, kept in `<data folder>/.eagle3_ray/` as Parquet.

The cache only saves time: a folder that cannot be written has none, a cache that cannot be read is built again.
"""

import hashlib
import logging
import os
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from eagle3_ray.data.folder import FileStamp
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.errors import StorageError
from eagle3_ray.storage import StoragePath, to_path, write_atomically

logger = logging.getLogger(__name__)

CACHE_DIR = ".eagle3_ray"
LAYOUT = 2  # count up when the columns, or what makes a file good, change

SCHEMA = pa.schema(
    [
        ("path", pa.binary()),  # relative, as bytes: a file name need not be UTF-8
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("is_sample", pa.bool_()),
        ("num_tokens", pa.int64()),
        ("num_supervised", pa.int64()),
        ("is_scanned", pa.bool_()),
    ]
)


class FileFacts(NamedTuple):
    """What an index keeps of a good file.

    Attributes:
        is_sample: False for token frequencies that lie among the samples.
        num_tokens: S; 0 if no sample.
        num_supervised: supervised tokens, the first one not counted; 0 if no sample.
        is_scanned: All its states were read.
    """

    is_sample: bool
    num_tokens: int
    num_supervised: int
    is_scanned: bool


def read_index_cache(root: str, spec: SampleSpec) -> dict[str, tuple[FileStamp, FileFacts]]:
    """Return what earlier runs with this spec learnt, by relative path; empty if there is nothing of use."""
    path = _cache_path(root, spec)
    try:
        columns = pq.read_table(pa.BufferReader(path.read_bytes()), schema=SCHEMA).to_pydict()
    except FileNotFoundError:
        return {}
    except (OSError, StorageError, pa.ArrowException) as error:
        logger.info("index cache %s cannot be read (%s), all files are read again", path, error)
        return {}
    stamps = map(FileStamp, columns["num_bytes"], columns["mtime_ns"])
    facts = map(FileFacts, *(columns[name] for name in FileFacts._fields))
    return dict(zip(map(os.fsdecode, columns["path"]), zip(stamps, facts, strict=True), strict=True))


def write_index_cache(root: str, spec: SampleSpec, files: dict[str, tuple[FileStamp, FileFacts]]) -> None:
    """Store what is known of the good files, under a temporary name first."""
    columns = [
        [os.fsencode(path) for path in files],
        [stamp.num_bytes for stamp, _ in files.values()],
        [stamp.mtime_ns for stamp, _ in files.values()],
        [facts.is_sample for _, facts in files.values()],
        [facts.num_tokens for _, facts in files.values()],
        [facts.num_supervised for _, facts in files.values()],
        [facts.is_scanned for _, facts in files.values()],
    ]
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    path = _cache_path(root, spec)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue().to_pybytes())
    except (OSError, StorageError) as error:
        logger.info("no index cache beside the samples: %s", error)


def _cache_path(root: str, spec: SampleSpec) -> StoragePath:
    """Name the cache after all that decides whether a file is good."""
    sizes = (LAYOUT, spec.data_format_version, spec.hidden_size, spec.num_aux_layers, spec.vocab_size)
    key = hashlib.sha256(repr(sizes).encode())
    if spec.final_norm_weight is not None:
        key.update(spec.final_norm_weight.float().contiguous().numpy().tobytes())
    return to_path(root) / CACHE_DIR / f"index-{key.hexdigest()[:16]}.parquet"
