"""What a command tells its user: text for people, or with `--log-format json` one JSON object a line for machines.

In JSON everything goes to stdout, errors too: a line is `{"time", "level", "event", "message"}` and what belongs to
the event, such as `step` and `metrics`. What libraries print is theirs; it goes to stderr and stays text.
"""

import json
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_log_format: LogFormat = "text"  # a process speaks in one way


def use_log_format(log_format: LogFormat) -> None:
    """Speak in this format from now on."""
    global _log_format
    _log_format = log_format
    if speaks_json():
        sys.excepthook = _tell_bug
    elif sys.excepthook is _tell_bug:
        sys.excepthook = sys.__excepthook__


def speaks_json() -> bool:
    """Tell whether the output is for machines."""
    return _log_format == "json"


def say(message: str, event: str = "note", **fields: Any) -> None:
    """Tell the user something.

    Args:
        message: Text, one or more lines.
        event: What happened, in a word, for machines.
        fields: What belongs to it, for machines; plain JSON values.
    """
    if speaks_json():
        _write_json("info", message, event, fields)
    else:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def warn(message: str, event: str = "warning", **fields: Any) -> None:
    """Tell the user of something that is not as it should be, but does not end the command."""
    if speaks_json():
        _write_json("warning", message, event, fields)
    else:
        say(f"warning: {message}")


def complain(message: str, event: str = "error", **fields: Any) -> None:
    """Tell the user what ended the command."""
    if speaks_json():
        _write_json("error", message, event, fields)
    else:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def _write_json(level: str, message: str, event: str, fields: dict[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": now, "level": level, "event": event, "message": message, **fields})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _tell_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    complain(f"{kind.__name__}: {error}", "bug", exit_code=1, traceback=text)
