"""Text that every Python brings along: CPython's documentation topics, and the docstrings of its standard library.

    topics, docstrings -> documents without repeated paragraphs -> seeded split -> one text a part -> cut at line ends

    training and held-out text   |-- prompt --|---- continuation ----|-- prompt --|--- ...
    held-out text again          |-- prompt --|-- prompt --|-- prompt --|- ...

Topics quote one another at length, so a paragraph is kept where it comes first and nowhere else; otherwise
held-out text would have been trained on.
"""

import ast
import importlib
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle3_ray.errors import DataError

PROMPT_CHARS, CONTINUATION_CHARS = 160, 320  # at least; a line is not cut
HELD_OUT_FRAC = 0.15
SHORTEST_DOCUMENT_CHARS = 160
LEAST_CHARS = 300_000  # below this, whole parts of the standard library are missing


@dataclass(frozen=True)
class Passage:
    """Consecutive lines of documentation, cut in two at the end of a line; neither part is blank."""

    prompt: str
    continuation: str


@dataclass(frozen=True)
class Corpus:
    """Text of this Python, split.

    Attributes:
        train: passages to train the verifier on.
        held_out: passages of other documents, to measure it on.
        prompts: the held-out documents once more, cut into prompts alone.
    """

    train: tuple[Passage, ...]
    held_out: tuple[Passage, ...]
    prompts: tuple[str, ...]


def build_corpus(documents: list[str], seed: int) -> Corpus:
    """Drop repeated paragraphs, split by document, and cut into passages.

    Args:
        documents: in any fixed order, as `read_documents` returns them.
        seed: of the order and of the split.
    """
    documents = drop_repeated_paragraphs(documents)
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[number] for number in order]
    num_held_out = max(1, round(len(shuffled) * HELD_OUT_FRAC))
    held_out, train = "\n\n".join(shuffled[:num_held_out]), "\n\n".join(shuffled[num_held_out:])
    return Corpus(
        train=tuple(cut_into_passages(train)),
        held_out=tuple(cut_into_passages(held_out)),
        prompts=tuple(text for text in cut_at_line_ends(held_out, [PROMPT_CHARS]) if text.strip()),
    )


def read_documents() -> list[str]:
    """Return the documentation topics by name, then the docstrings of the top-level modules in file order.

    Raises:
        DataError: This Python comes without its documentation or without its sources.
    """
    library_dir = Path(sysconfig.get_path("stdlib"))
    documents = [*_read_topics(), *_read_docstrings(library_dir)]
    num_chars = sum(map(len, documents))
    if num_chars < LEAST_CHARS:
        raise DataError(
            f"{library_dir}: this Python's documentation topics and docstrings have {num_chars:,} characters, expected "
            f"at least {LEAST_CHARS:,}. It was installed without pydoc_data or without the library's sources; use a "
            "complete one (from Debian, python.org, uv or conda)."
        )
    return documents


def drop_repeated_paragraphs(documents: list[str]) -> list[str]:
    """Keep a paragraph where it comes first, whatever its line breaks; leave out documents of which little is left."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document.strip("\n")):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= SHORTEST_DOCUMENT_CHARS:
            kept.append(text)
    return kept


def cut_into_passages(text: str) -> list[Passage]:
    """Cut a text into passages; a rest at the end that makes no whole one is left out."""
    parts = cut_at_line_ends(text, [PROMPT_CHARS, CONTINUATION_CHARS])
    pairs = zip(parts[::2], parts[1::2], strict=False)
    return [Passage(prompt, continuation) for prompt, continuation in pairs if prompt.strip() and continuation.strip()]


def cut_at_line_ends(text: str, part_chars: list[int]) -> list[str]:
    """Cut a text behind line ends into parts of at least `part_chars`, taken in turn; the rest is left out."""
    parts: list[str] = []
    lines: list[str] = []
    num_chars = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        num_chars += len(line)
        if num_chars >= part_chars[len(parts) % len(part_chars)]:
            parts.append("".join(lines))
            lines, num_chars = [], 0
    return parts


def _read_topics() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return []  # told apart by `read_documents`, with the sources
    return [topics[name] for name in sorted(topics)]


def _read_docstrings(library_dir: Path) -> list[str]:
    docstrings = []
    for path in sorted(library_dir.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old sources have invalid escapes
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstrings.append(ast.get_docstring(node) or "")
    return [text for text in docstrings if len(text) >= SHORTEST_DOCUMENT_CHARS]
