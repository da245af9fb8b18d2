"""`samples.parquet` of a run folder: what the plan was made of, to plan alike whatever became of the files."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle3_ray.data.index import SampleIndex
from eagle3_ray.errors import DataError, StorageError
from eagle3_ray.storage import StoragePath, write_atomically

SCHEMA = pa.schema([("path", pa.binary()), ("num_tokens", pa.int64()), ("num_supervised", pa.int64())])


def write_planned(path: StoragePath, indexes: list[SampleIndex]) -> None:
    """Store the samples of a run, of the parts it was split into.

    Raises:
        DataError: The run folder cannot be written.
        StorageError: It lies on an object store that cannot be written.
    """
    tables = [
        pa.table([[os.fsencode(path) for path in index.paths], index.num_tokens, index.num_supervised], schema=SCHEMA)
        for index in indexes
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), buffer)
    try:
        write_atomically(path, buffer.getvalue().to_pybytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error


def read_planned(path: StoragePath, root: str) -> SampleIndex | None:
    """Return the samples that a run was planned with, in the order of an index; None if it left no such file.

    Args:
        path: where it was stored.
        root: the data folder as it is called now.

    Raises:
        DataError: The file is damaged.
        StorageError: The object store cannot be read.
    """
    try:
        columns = pq.read_table(pa.BufferReader(path.read_bytes()), schema=SCHEMA).to_pydict()
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), expected what the run was planned with. Move it away: then the samples "
            "are planned anew, which goes on only if none of them has changed."
        ) from error
    rows = sorted(zip(map(os.fsdecode, columns["path"]), columns["num_tokens"], columns["num_supervised"], strict=True))
    return SampleIndex(
        root=root,
        paths=[path for path, _, _ in rows],
        num_tokens=np.array([tokens for _, tokens, _ in rows], dtype=np.int64),
        num_supervised=np.array([supervised for _, _, supervised in rows], dtype=np.int64),
        num_not_samples=0,
    )
