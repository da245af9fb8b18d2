"""What the settings of every verb share: how a value is read, be it a flag's text or a line of a file."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from eagle3_ray.storage import ObjectPath, StoragePath, is_remote, to_path

# In a field's json_schema_extra: its values are words without a flag, and what stands for each in the usage.
WORDS = "words"


def alternatives_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types a field may hold, None left out: `int | None` gives `(int,)`."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for part in get_args(annotation) if part is not NoneType)
    return (annotation,)


class Settings(BaseModel):
    """What every verb's settings share: frozen, no unknown key, one reading of text for flags and files."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    config: Path | None = Field(
        None,
        exclude=True,
        description="YAML file of these settings by the same names. Flags win; `none` as a flag's value unsets. "
        "Default: no file.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Turn down what pydantic would quietly read as something else, and read paths and choices given as text."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = alternatives_of(annotation)
        is_unset = value is None and NoneType in get_args(annotation)
        if Path in kinds and not (is_unset or isinstance(value, str | Path | ObjectPath)):
            raise ValueError("must be a path")
        for kind in kinds:
            if isinstance(value, bool) and kind in (int, float):
                raise ValueError("must be a number")
            if isinstance(value, str) and kind is Path:
                value = _read_path(value, may_be_remote=ObjectPath in kinds)
            if get_origin(kind) is tuple and Path in (inner := alternatives_of(get_args(kind)[0])):
                value = _read_paths(value, may_be_remote=ObjectPath in inner)
            if isinstance(value, str) and get_origin(kind) is Literal:
                value = {str(choice): choice for choice in get_args(kind)}.get(value, value)
        return value


def _read_paths(value: Any, may_be_remote: bool) -> Any:
    """Return a list's texts as paths; what is no list of texts is for the schema to refuse."""
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(item, str | Path | ObjectPath) for item in value):
        raise ValueError("must be paths")
    return tuple(_read_path(item, may_be_remote) if isinstance(item, str) else item for item in value)


def _read_path(text: str, may_be_remote: bool) -> StoragePath:
    if not text:
        raise ValueError("must not be empty")
    if is_remote(text) and not may_be_remote:
        raise ValueError("is a URL; a path of this machine, or of a mount, is needed here")
    return to_path(text)
