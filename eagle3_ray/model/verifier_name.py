"""How a verifier is named: a local folder, a URL of an object store, or a hub id. Light: nothing is read here."""

from pathlib import Path

from eagle3_ray.errors import VerifierError
from eagle3_ray.storage import StoragePath, to_path


def absolute_name(name_or_path: str) -> str:
    """Return a local folder's absolute path, a URL in its one form, and a hub id as it is.

    Raises:
        VerifierError: A URL that names no object store.
    """
    folder = to_folder(name_or_path)
    return name_or_path if isinstance(folder, Path) and not folder.is_dir() else str(folder.resolve())


def to_folder(name_or_path: str) -> StoragePath:
    """Return the folder it would be if it were no hub id. Errors as in `absolute_name`."""
    try:
        return to_path(name_or_path)
    except ValueError as error:
        raise VerifierError(f"{name_or_path}: {error}.") from error
