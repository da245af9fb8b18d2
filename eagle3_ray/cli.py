"""`eagle3-ray <verb> [flags]`: from words on a command line to a verb's settings, and from errors to exit codes.

tyro knows which flags there are and how many values each takes; what a value may be is the schema's business
alone, so that every problem of flags and file is told at once and in one way. A verb's job is imported only when
its settings are whole: `--help` and mistakes are answered without torch and ray.

Values come from the flags, then from the file of `--config`, then from the schema's defaults.
"""

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from eagle3_ray import __version__
from eagle3_ray.config import PRESETS, OutputSettings
from eagle3_ray.console import complain, use_log_format
from eagle3_ray.errors import Eagle3RayError, UsageError
from eagle3_ray.flags import Flag, flag_groups, flag_name, flags_of
from eagle3_ray.schema import Settings
from eagle3_ray.settings_file import read_settings_file
from eagle3_ray.stopping import Stopped, stop_signals
from eagle3_ray.verbs import VERBS

# pydantic's kinds of problem in our words; the names in braces come with the problem.
PROBLEMS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text; quote it in the file",
    "string_too_short": "must not be empty",
    "path_type": "must be a path",
    "tuple_type": "must be a list, such as [2, 4, 5]",
    "too_short": "must name at least {min_length}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 143 or 130 stopped by SIGTERM or SIGINT, else the error's.

    Args:
        arguments: The verb and its flags; those of the process if None.

    Raises:
        SystemExit: From tyro: 0 after a verb's `--help`, 2 for a flag there is not.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stop_signals():
            return _run_command(words)
    except Eagle3RayError as error:
        kind = type(error).__name__
        complain(f"error: {error}", "error", exit_code=error.exit_code, error=kind)
        return error.exit_code
    except Stopped as stop:
        complain(str(stop), "stopped", exit_code=stop.exit_code, signal=stop.signal.name)
        return stop.exit_code


def _run_command(arguments: list[str]) -> int:
    use_log_format("text")
    if not arguments:
        print(_overview(), file=sys.stderr)
        return UsageError.exit_code
    if arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"eagle3-ray {__version__}")
        return 0
    verb = _read_verb(arguments[0])
    if _asks_for_json(arguments):
        use_log_format("json")  # before the settings are read: what is wrong with them is told in JSON too
    settings = read_settings(verb, arguments[1:])
    if isinstance(settings, OutputSettings):
        use_log_format(settings.log_format)
    job = importlib.import_module(f"eagle3_ray.jobs.{verb.replace('-', '_')}")
    job.run(settings)
    return 0


def _asks_for_json(arguments: Sequence[str]) -> bool:
    return "--log-format json" in " ".join(arguments).replace("--log-format=", "--log-format ")


def _overview() -> str:
    lines = [f"  {verb:<14} {(settings_class.__doc__ or '').strip()}" for verb, settings_class in VERBS.items()]
    return "\n".join(
        [
            f"eagle3-ray {__version__}: trains EAGLE-3 draft models on Ray.",
            "",
            "usage: eagle3-ray VERB [FLAGS]",
            "",
            *lines,
            "",
            "`eagle3-ray VERB --help` lists a verb's flags with their defaults; `--config FILE` reads them from YAML.",
            "Exit codes: 0 done, 1 a bug, 2 usage, 3 data, 4 checkpoint or export, 5 cluster; 143 or 130 stopped.",
        ]
    )


def _read_verb(word: str) -> str:
    verb = word.replace("_", "-")
    if verb in VERBS:
        return verb
    if verb.startswith("-"):
        raise UsageError(f"{word}: a verb comes first, one of {', '.join(VERBS)}.")
    raise UsageError(f"{word}: no such verb{_did_you_mean(verb, VERBS)} There are {', '.join(VERBS)}.")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "."


def read_settings(verb: str, arguments: Sequence[str]) -> Settings:
    """Return a verb's settings from its flags, the file of `--config`, and the defaults.

    Raises:
        SystemExit: From tyro: after `--help`, and for an unknown flag or one without its value.
        UsageError: The file cannot be read, or settings are missing, unknown, wrong, or contradict each other; all
            of them in one message.
    """
    settings_class = VERBS[verb]
    flags = flags_of(settings_class)
    given = read_flags(verb, arguments)
    path = given.pop("config", None)
    from_file = {} if path is None else read_settings_file(Path(path))
    if given.get("preset") is not None:  # a flag: what a file says of the same settings gives way to it
        from_file = {name: value for name, value in from_file.items() if name not in PRESETS["eagle3"]}
    try:
        return settings_class.model_validate({**from_file, **given})
    except ValidationError as error:
        in_order_of_help = sorted(error.errors(include_url=False), key=lambda detail: _position(detail, flags))
        problems = [line for detail in in_order_of_help for line in _describe(detail, flags, given, path)]
    unique = list(dict.fromkeys(problems))
    message = unique[0] if len(unique) == 1 else "\n  ".join([f"{len(unique)} settings cannot be used:", *unique])
    raise UsageError(f"{message}\nSee eagle3-ray {verb} --help.")


def read_flags(verb: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what was typed, by field name: text, lists of text, booleans; None for `none` where that is a value."""
    parsed: dict[str, Any] = tyro.cli(
        _flags_type(VERBS[verb]),
        args=list(arguments),
        prog=f"eagle3-ray {verb}",
        description=VERBS[verb].__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    typed: dict[str, Any] = {}
    for name, value in parsed.items():
        typed.update(value if isinstance(value, dict) else {name: value})
    flags = flags_of(VERBS[verb])
    return {
        name: None if flags[name].is_nullable and value in ("none", ("none",)) else value
        for name, value in typed.items()
    }


def _flags_type(settings_class: type[Settings]) -> Any:
    """Return the flags as a type for tyro: a dict of only what was typed, with a dict in it for each section."""
    own, *sections = flag_groups(settings_class)
    members = _flag_types(own.flags)
    for section in sections:
        inner = _dict_of_what_was_typed(section.title, _flag_types(section.flags))
        members[section.title] = Annotated[inner, tyro.conf.arg(help=section.meaning)]
    return _dict_of_what_was_typed(settings_class.__name__, members)


def _dict_of_what_was_typed(name: str, members: Mapping[str, Any]) -> Any:
    return TypedDict(name, members, total=False)  # type: ignore[operator]


def _flag_types(flags: Iterable[Flag]) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for flag in flags:
        hint = "(required)" if flag.default is None else f"(default: {flag.default})"
        told = tyro.conf.arg(help=flag.meaning, help_behavior_hint=hint, metavar=flag.metavar or None)
        text = bool if flag.is_switch else tuple[str, ...] if flag.is_list else str
        typed: Any = Annotated[text, told]
        types[flag.field] = tyro.conf.Positional[typed] if flag.is_positional else typed  # type: ignore[misc]
    return types


def _position(detail: ErrorDetails, flags: Mapping[str, Flag]) -> int:
    field = detail["loc"][0] if detail["loc"] else None
    return list(flags).index(str(field)) if field in flags else len(flags)


def _describe(detail: ErrorDetails, flags: Mapping[str, Flag], given: Mapping[str, Any], path: str | None) -> list[str]:
    """Return a problem as lines that name the flag, its value, and the file if it comes from there."""
    template = PROBLEMS.get(detail["type"])
    what = detail["msg"] if template is None else template.format(**detail.get("ctx", {}))
    if not detail["loc"]:
        return what.split("\n")
    field = str(detail["loc"][0])
    if detail["type"] == "missing":
        typed = "typed" if flags[field].is_positional else "as a flag"
        return [f"{flags[field].name}: is required, {typed} or in the file of --config"]
    if detail["type"] == "extra_forbidden":
        return [f"{field} (in {path}): no such setting{_did_you_mean(field, flags)}"]
    if len(detail["loc"]) > 1:
        what = f"{what}, found {detail['input']!r}"
    if field in given:
        return [f"{_as_typed(flags[field], given[field])}: {what}"]
    return [f"{flag_name(field)} {detail['input']!r} (in {path}): {what}"]


def _as_typed(flag: Flag, value: Any) -> str:
    if flag.is_switch:
        return flag.name if value else flag.negation
    words = value if flag.is_list and value is not None else [value]
    return " ".join([*([] if flag.is_positional else [flag.name]), *(str(word) or "''" for word in words)])
