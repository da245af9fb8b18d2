"""JSONL lines -> conversations; whatever is wrong with a line is said in one text.

A line is one sample, in one of three forms:

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}    ShareGPT
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"text": "..."}                                                                            plain text

Both lists take either pair of names; other keys of a line are left alone. Line l becomes data_<l-1>.pt.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from eagle3_ray.errors import DataError
from eagle3_ray.storage import StoragePath

LINE_KEYS = ("conversations", "messages", "text")
TURN_KEYS = (("role", "content"), ("from", "value"))
ROLES = {
    "system": "system", "developer": "developer", "tool": "tool",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip

LINES_PER_CHUNK = 512  # sorting by length happens inside a chunk: enough lines for batches of nearly equal lengths
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Turn:
    """One message: role is a value of `ROLES`, content is not blank."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One sample before tokenisation: turns of a chat, or plain text (then there are no turns)."""

    turns: tuple[Turn, ...]
    text: str


@dataclass(frozen=True)
class LineChunk:
    """A run of whole lines of a JSONL file, the work of one task.

    Attributes:
        first_line: number of the first line, counted from 1.
        start_byte: where it begins.
        num_bytes: length of the run.
    """

    first_line: int
    start_byte: int
    num_bytes: int


def index_lines(path: StoragePath) -> tuple[list[LineChunk], str]:
    """Read the file once, as bytes: where its lines are, and its digest.

    Args:
        path: JSONL file.

    Returns:
        Chunks of at most 512 lines or about 16 MiB, in file order; sha256 of the file in hex.

    Raises:
        DataError: There is no such file, it is no plain file, or it is blank.
    """
    if not path.is_file():
        found = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}. Give a JSONL file with one conversation a line.")
    chunks: list[LineChunk] = []
    digest = hashlib.sha256()
    first_line, start_byte, num_bytes, num_lines, is_blank = 1, 0, 0, 0, True
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            is_blank = is_blank and not line.strip()
            num_bytes, num_lines = num_bytes + len(line), num_lines + 1
            if num_lines == LINES_PER_CHUNK or num_bytes >= CHUNK_BYTES:
                chunks.append(LineChunk(first_line, start_byte, num_bytes))
                first_line, start_byte, num_bytes, num_lines = first_line + num_lines, start_byte + num_bytes, 0, 0
    if num_lines:
        chunks.append(LineChunk(first_line, start_byte, num_bytes))
    if is_blank:
        raise DataError(f"{path}: holds no lines. Expected JSONL with one conversation a line.")
    return chunks, digest.hexdigest()


def iter_lines(path: StoragePath, chunk: LineChunk) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes of the line) of a chunk; blank lines are left out but counted."""
    with path.open("rb") as file:
        file.seek(chunk.start_byte)
        lines = file.read(chunk.num_bytes).split(b"\n")  # as the file object does: only \n ends a line
    for line_number, line in enumerate(lines, chunk.first_line):
        if line.strip():
            yield line_number, line


def parse_conversation(line: bytes) -> Conversation:
    """Read one JSONL line.

    Args:
        line: UTF-8 bytes of a JSON object.

    Returns:
        The conversation, roles translated to system, developer, user, assistant or tool.

    Raises:
        DataError: All that is wrong with the line, without saying which line it is.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, found a {_json_name(record)}")
    present = [key for key in LINE_KEYS if key in record]
    if len(present) != 1:
        found = " and ".join(present) if present else f"keys {sorted(record)[:8]}"
        raise DataError(f"expected exactly one of the keys {', '.join(LINE_KEYS)}; found {found}")
    key = present[0]
    if key == "text":
        problem = _problem_of_text(record["text"])
        if problem:
            raise DataError(f"text {problem}")
        return Conversation(turns=(), text=record["text"])
    return Conversation(turns=_parse_turns(key, record[key]), text="")


def _parse_turns(key: str, items: object) -> tuple[Turn, ...]:
    if not isinstance(items, list) or not items:
        raise DataError(f"{key} is {'empty' if items == [] else 'a ' + _json_name(items)}, expected a list of turns")
    turns, problems = [], []
    for number, item in enumerate(items):
        keys = next((pair for pair in TURN_KEYS if isinstance(item, dict) and set(pair) <= item.keys()), None)
        if keys is None:
            problems.append(f"turn {number} has neither role and content nor from and value")
            continue
        role, content = item[keys[0]], item[keys[1]]
        if not isinstance(role, str) or role not in ROLES:
            problems.append(f"turn {number} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        content_problem = _problem_of_text(content)
        if content_problem:
            problems.append(f"turn {number}: {keys[1]} {content_problem}")
        if not problems:
            turns.append(Turn(ROLES[role], content))
    if problems:
        raise DataError("; ".join(problems))
    return tuple(turns)


def _problem_of_text(text: object) -> str:
    """Return what is wrong with a string that should be tokenised, or nothing."""
    if not isinstance(text, str):
        return f"is a {_json_name(text)}, expected a string"
    if not text.strip():
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no character"
    return ""


def _json_name(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
