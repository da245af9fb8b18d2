"""From the schema to flags: their names, defaults and meanings, for `--help` and for the README's tables.

`python -m eagle3_ray.flags README.md` writes the tables anew between the file's markers (`make flags`):

    <!-- flags:train -->
    ...
    <!-- /flags:train -->
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from eagle3_ray.errors import UsageError
from eagle3_ray.schema import WORDS, Settings, alternatives_of
from eagle3_ray.storage import ObjectPath
from eagle3_ray.verbs import VERBS

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", ObjectPath: "PATH|URL"}
_DEFAULT = "Default: "


@dataclass(frozen=True)
class Flag:
    """One field of a verb's settings, as it is typed and told.

    Attributes:
        field: Name of the field, `total_seq_len`.
        name: The flag, `--total-seq-len`; of words without one, what stands for them: `RUN`.
        kind: What it holds, None left out: `int`, `bool`, `Path`, a Literal or a tuple.
        metavar: What its value looks like, `INT`; empty for a switch.
        meaning: Help text, without the default.
        default: As told to a reader; None if the flag is required.
        is_nullable: Whether `none` is a value.
        is_positional: Whether its words are typed without a flag.
    """

    field: str
    name: str
    kind: Any
    metavar: str
    meaning: str
    default: str | None
    is_nullable: bool
    is_positional: bool

    @property
    def is_switch(self) -> bool:
        """Whether it is given as `--name` or `--no-name`, without a value."""
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.kind) is tuple

    @property
    def negation(self) -> str:
        """The flag that turns a switch off."""
        return "--no-" + self.name.removeprefix("--")


@dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together: a section of a verb's settings.

    Attributes:
        title: `optimizer` for OptimizerSettings; empty for the verb's own flags, which come first.
        meaning: First line of the section's docstring.
        flags: In the order of the class.
    """

    title: str
    meaning: str
    flags: tuple[Flag, ...]


def flag_name(field: str) -> str:
    """Return the flag of a field: `--total-seq-len` of `total_seq_len`."""
    return "--" + field.replace("_", "-")


def flag_groups(settings_class: type[Settings]) -> list[FlagGroup]:
    """Return all flags of a verb, grouped by the class that declares them; `--config` ends the first group."""
    own = [*_flags_declared_by(settings_class, settings_class), *_flags_declared_by(Settings, settings_class)]
    groups = [FlagGroup("", _first_line(settings_class), tuple(own))]
    for section in settings_class.__mro__[1:]:
        if issubclass(section, Settings) and section is not Settings:
            title = section.__name__.removesuffix("Settings").lower()
            groups.append(FlagGroup(title, _first_line(section), tuple(_flags_declared_by(section, settings_class))))
    return groups


def flags_of(settings_class: type[Settings]) -> dict[str, Flag]:
    """Return all flags of a verb by field name."""
    return {flag.field: flag for group in flag_groups(settings_class) for flag in group.flags}


def extended_verb(verb: str) -> str | None:
    """Return the verb whose flags this one has too, if there is one: `train` of `doctor`."""
    above = VERBS[verb].__mro__[1:]
    return next((other for other, settings_class in VERBS.items() if settings_class in above), None)


def flags_table(verb: str) -> str:
    """Return the Markdown tables of a verb's flags: one, or one a section; without those of the verb it extends."""
    parts = []
    extended = extended_verb(verb)
    told_there = VERBS[extended].model_fields if extended else {}
    for group in flag_groups(VERBS[verb]):
        flags = [flag for flag in group.flags if flag.field not in told_there]
        if not flags:
            continue
        if group.title:
            parts.append(f"**{group.title.capitalize()}.** {group.meaning}\n")
        parts.append("| Flag | Default | Meaning |\n| --- | --- | --- |")
        parts.extend(_table_row(flag) for flag in flags)
        parts.append("")
    return "\n".join(parts).rstrip("\n")


def write_flags_tables(text: str) -> str:
    """Return a Markdown text with every marked table made anew from the schema.

    Raises:
        UsageError: A marker names no verb, or is not closed by its own end marker.
    """
    for verb in re.findall(r"<!-- flags:(\S+) -->", text):
        if verb not in VERBS:
            raise UsageError(f"<!-- flags:{verb} -->: no verb is called {verb}; there are {', '.join(VERBS)}.")
        start, end = f"<!-- flags:{verb} -->", f"<!-- /flags:{verb} -->"
        before, _, rest = text.partition(start)
        old, found, after = rest.partition(end)
        if not found or "<!-- flags:" in old:
            raise UsageError(f"{start}: expected {end} after it, before the next table; found none.")
        text = f"{before}{start}\n{flags_table(verb)}\n{end}{after}"
    return text


def _flags_declared_by(declaring: type[Settings], settings_class: type[Settings]) -> Iterator[Flag]:
    fields = settings_class.model_fields
    for name in inspect.get_annotations(declaring):
        if name in fields:
            yield _flag(name, fields[name])


def _flag(name: str, field: FieldInfo) -> Flag:
    assert field.description is not None, name
    *others, kind = alternatives_of(field.annotation)  # of a path that may be a URL: ObjectPath
    meaning, _, default_text = field.description.partition(_DEFAULT)
    word = words_of(field)
    return Flag(
        field=name,
        name=word or flag_name(name),
        kind=kind,
        metavar=f"{word} [{word} ...]" if word else _metavar(kind, others),
        meaning=meaning.strip(),
        default=None if field.is_required() else default_text.rstrip(".") or _tell(field.default),
        is_nullable=NoneType in get_args(field.annotation),
        is_positional=word is not None,
    )


def words_of(field: FieldInfo) -> str | None:
    """Return what stands for the words of a field that is typed without a flag: `schema.words`; None of others."""
    extra = field.json_schema_extra
    return str(extra[WORDS]) if isinstance(extra, dict) and WORDS in extra else None


def _metavar(kind: Any, others: list[Any]) -> str:
    if get_origin(kind) is Literal and others:
        return "|".join([*map(_METAVARS.__getitem__, others), *get_args(kind)])
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return "INT [INT ...]"
    return "" if kind is bool else _METAVARS[kind]


def _tell(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    assert default is not None, "a default of None needs its meaning after 'Default:' in the description"
    return str(default) or "none"


def _first_line(settings_class: type[Settings]) -> str:
    return (settings_class.__doc__ or "").partition("\n")[0]


def _table_row(flag: Flag) -> str:
    if flag.is_positional:
        typed = f"`{flag.metavar}`"
    else:
        typed = f"`{flag.name}`, `{flag.negation}`" if flag.is_switch else f"`{flag.name} {flag.metavar}`"
    default = "required" if flag.default is None else flag.default
    return (
        "| "
        + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in (typed, default, flag.meaning))
        + " |"
    )


def main(paths: list[str]) -> None:
    """Write the tables of the Markdown files named anew, or print every verb's table."""
    for name in paths:
        path = Path(name)
        path.write_text(write_flags_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    if not paths:
        print("\n\n".join(f"### {verb}\n\n{flags_table(verb)}" for verb in VERBS))


if __name__ == "__main__":
    main(sys.argv[1:])
