"""A verifier on an object store, as transformers loads it: copied once a node, beside its cache of the hub.

    $HF_HOME/eagle3_ray/<digest of the URL and of what lies there>/

A folder appears under its name once all of it is there.
"""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from eagle3_ray.storage import ObjectPath, StoredObject, copy_objects, is_remote, list_objects, to_path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def local_verifier(name_or_path: str, with_weights: bool) -> str:
    """Return what transformers can load: a URL's copy on this machine; anything else as it is.

    Args:
        name_or_path: hub id, folder or URL.
        with_weights: False copies config and tokenizer only.

    Raises:
        OSError: The copy cannot be written.
        StorageError: The object store cannot be read.
    """
    if not is_remote(name_or_path):
        return name_or_path
    source = to_path(name_or_path)
    assert isinstance(source, ObjectPath)
    stored = [entry for entry in list_objects(source) if with_weights or not _is_weights(entry)]
    key = hashlib.sha256(repr((source.uri, stored)).encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "eagle3_ray" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The processes of a node start together; the first one copies.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            try:
                copy_objects(source, [entry.name for entry in stored], unfinished)
                os.replace(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _is_weights(entry: StoredObject) -> bool:
    return entry.name.endswith(WEIGHT_SUFFIXES)
