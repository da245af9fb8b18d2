"""Settings as YAML: the file behind `--config`, and `run.yaml`, which repeats a run.

A file names settings as the schema does, with `_` or `-`: `total_seq_len: 8192`. What is left out keeps its
default; `null` stands for a default of None.
"""

from pathlib import Path
from typing import Any

import yaml

from eagle3_ray.errors import UsageError
from eagle3_ray.schema import Settings
from eagle3_ray.storage import StoragePath, write_atomically


class _Loader(yaml.SafeLoader):
    """Reads `2:8` as it is written; YAML 1.1 would take it for 2 minutes and 8 seconds, 128."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        if ":" in node.value:
            return str(node.value)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.construct_number)


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read settings by field name; their values are checked later, together with the flags.

    Raises:
        UsageError: The file cannot be read, is not YAML, is no mapping of names, names a setting twice, or names
            another file.
    """
    return _read(path, f"--config {path}")


def read_run_yaml(path: StoragePath) -> dict[str, Any]:
    """Read what `write_run_yaml` wrote. Errors as in `read_settings_file`."""
    return _read(path, str(path))


def _read(path: StoragePath, told: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        keys = _keys_as_written(yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{told}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{told}: is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{told}: expected lines of the form `name: value`, such as `epochs: 3`.")
    names = [key.replace("-", "_") for key in keys]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"{told}: sets {', '.join(repeated)} more than once. Keep one line of each.")
    if "config" in names:
        raise UsageError(f"{told}: sets config, but a file cannot name another file. Remove that line.")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _keys_as_written(document: yaml.Node | None) -> list[str]:
    # yaml.safe_load keeps the last of two equal keys and says nothing.
    return [str(key.value) for key, _ in document.value] if isinstance(document, yaml.MappingNode) else []


def dump_settings(settings: Settings) -> str:
    """Return settings as YAML that `read_settings_file` and the schema turn into the same settings."""
    values = settings.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_run_yaml(settings: Settings, path: StoragePath) -> None:
    """Write settings to `path`, whole or not at all."""
    write_atomically(path, dump_settings(settings))
