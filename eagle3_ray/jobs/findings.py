"""Checks, each made and told whatever came of the others: a line a check, and at the end one exit code.

ok       workers       2 workers with 1 GPU each; the cluster has 32 CPUs and 2 GPUs on 1 node
warning  disk          ...: what was found, then what to do
problem  data          the error that `train` would end with
skipped  memory        needs data, see above
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from eagle3_ray.console import complain, say, speaks_json, warn
from eagle3_ray.errors import Eagle3RayError

Result = Literal["ok", "warning", "problem", "skipped"]
T = TypeVar("T")

_COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m", "skipped": "\033[2m"}
_PLAIN = "\033[0m"
_RESULT_WIDTH, _NAME_WIDTH = 7, 12


@dataclass(frozen=True)
class Seen(Generic[T]):
    """What a check found where there is no problem.

    Attributes:
        value: For the checks that go on from it.
        found: In a line.
        advice: What to do; makes it a warning.
        details: More lines, for people.
        fields: Its numbers, for machines; plain JSON values.
    """

    value: T
    found: str
    advice: str = ""
    details: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A check that was made, or had to be left out.

    Attributes:
        name: Of the check.
        seen: None if it found a problem, or was left out.
    """

    name: str
    seen: Seen[T] | None

    @property
    def value(self) -> T:
        """What the check found; only for checks that need it."""
        assert self.seen is not None, self.name
        return self.seen.value


class Report:
    """Tells each check as it is made, and remembers the problems."""

    def __init__(self) -> None:
        self._results: Counter[Result] = Counter()
        self._problems: dict[str, Eagle3RayError] = {}

    def check(self, name: str, look: Callable[[], Seen[T]], needs: Sequence[Outcome[Any]] = ()) -> Outcome[T]:
        """Make a check, or leave it out if one that it needs has found a problem.

        Args:
            name: In a word or two.
            look: Makes it; an `Eagle3RayError` is a problem.
            needs: Checks whose values it uses.
        """
        missing = [outcome.name for outcome in needs if outcome.seen is None]
        if missing:
            self._tell(name, "skipped", f"needs {', '.join(missing)}, see above")
            return Outcome(name, None)
        try:
            seen = look()
        except Eagle3RayError as error:
            self._problems[name] = error
            first, *rest = str(error).split("\n")
            fields = {"error": type(error).__name__, "exit_code": error.exit_code}
            self._tell(name, "problem", first, details=[line.strip() for line in rest], fields=fields)
            return Outcome(name, None)
        result: Result = "warning" if seen.advice else "ok"
        self._tell(name, result, seen.found, seen.advice, seen.details, seen.fields)
        return Outcome(name, seen)

    def finish(self) -> None:
        """Tell how many checks went how.

        Raises:
            Eagle3RayError: Of the kind of the first problem; names all checks that found one.
        """
        counted = ", ".join(f"{number} {result}" for result, number in self._results.items())
        summary = f"{self._results.total()} checks: {counted}"
        if self._problems:
            kind = type(next(iter(self._problems.values())))
            raise kind(f"{summary}. Mend what is told above of: {', '.join(self._problems)}.")
        say(summary, "done", **{str(result): number for result, number in self._results.items()})

    def _tell(
        self,
        name: str,
        result: Result,
        found: str,
        advice: str = "",
        details: Sequence[str] = (),
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self._results[result] += 1
        text = f"{found.rstrip('.')}. {advice}" if advice else found
        if speaks_json():
            whole = "\n".join([text, *details]) if result == "problem" else text
            write = {"ok": say, "warning": warn, "problem": complain, "skipped": say}[result]
            write(whole, "check", check=name, result=result, found=found, advice=advice, **(fields or {}))
            return
        word = f"{result:<{_RESULT_WIDTH}}"
        if _has_colours():
            word = f"{_COLOURS[result]}{word}{_PLAIN}"
        indent = " " * (_RESULT_WIDTH + _NAME_WIDTH + 4)
        say("\n".join([f"{word}  {name:<{_NAME_WIDTH}}  {text}", *(indent + line for line in details)]))


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
